"""From predictions to speculative reads. Knows no torch: a predictor's answers are arrays.

What is worth reading is planning/prefetch_plan.py's to say; here it is measured how fast the link reads, how
long a layer computes, what it needs and a prediction costs, how much of what is read is wasted, and whether
prefetching pays at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.planning.correction import RunningCorrection
from moe_offload.planning.gain_switch import GainSwitch
from moe_offload.planning.prediction import Forecast, Predictor
from moe_offload.planning.prefetch_plan import (
    READERS,
    Guess,
    Threshold,
    break_even,
    lookahead_depth,
    plan_reads,
)
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.storage.expert_format import ExpertKey

REST_AFTER_STEPS = 64  # a few tokens
MEASURE_EVERY_STEPS = 32  # layer steps between two looks at the link's counters and the waste
SMOOTHING = 0.2  # of measured windows
BEST_SPEED_KEPT = 0.98  # a link is as fast as it was with much to do; with little it is waited for
PARALLEL_BYTES = READERS * (64 << 10)  # small reads under way together take hardly longer than one
DISK_RATE, LINK_RATE = "disk_bytes_per_s", "link_bytes_per_s"  # names in a RunningCorrection
SUBMIT_S = 2e-5  # compute time that asking for a read takes, until it is measured
EXPECTED_RECALL = 0.7  # share of a layer's needs that a prediction finds, for judging what it is worth
PROBE_EVERY = 16  # a prediction that is not worth its cost is made all the same now and then

FIRST = -1  # stands for the layer that has routed, before any has

LinkCounters = Callable[[], tuple[int, float]]  # bytes read so far, seconds in which something was being read
Likely = tuple[int, int, int, float]  # layers ahead, layer_idx, expert_id, probability
Rank = Callable[[Sequence[Likely], Sequence[Guess]], list[Guess]]


class Prefetcher:
    """Let ``predictor`` move bytes early; it never changes what a step computes.

    ``predictor`` None or ``enabled`` False: every call returns at once. A prediction costs a router's
    time in every layer, so it rests while ``REST_AFTER_STEPS`` layer steps in a row found all they
    needed resident, until one does not; and ``switch`` turns it off where steps are faster without.

    Args:
        link: of the reader; None: guesses are admitted by probability alone.
        switch: None: always on.
        speeds: what to expect of the link ("disk_bytes_per_s") and of a layer ("layer_s") until they are
            measured, and where the measurements go.
    """

    def __init__(
        self,
        cache: ExpertCache,
        predictor: Predictor | None,
        *,
        enabled: bool = True,
        link: LinkCounters | None = None,
        switch: GainSwitch | None = None,
        speeds: RunningCorrection | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._cache, self._predictor = cache, predictor
        self.enabled = enabled and predictor is not None
        self.switch = switch
        self.threshold = Threshold()
        self._link, self._clock = link, clock
        self._steps_without_need = 0
        self._needs_seen = -1
        self._needs_before_step = 0
        self._last_look: tuple[float, float] | None = None  # (time, stall_s so far) of the last layer step
        self._speeds = speeds or RunningCorrection()
        self._window_s = self._speeds.get("layer_s")  # a layer's compute time; inf: not known
        self._rate = DISK_RATE  # the link's name in speeds
        self._bytes_per_s = self._speeds.get(self._rate)
        self._read_s = math.inf  # an expert's read, as they come
        self._link_seen = (0, 0.0)
        self._steps = 0
        self._needs: dict[int, float] = {}  # by layer: experts of a step that are not resident, smoothed
        self._next_layer: dict[int, int] = {}  # as steps have shown
        self._last_layer = -1
        self._predict_s = 0.0  # a prediction's time and that of planning its reads, smoothed
        self._submit_s = SUBMIT_S  # and that of asking for one, which takes the processor from computing
        self._submitting_s = 0.0  # in the prediction under way
        self._rank: Rank | None = None
        self._set_depth_limit()

    @property
    def is_on(self) -> bool:
        """Whether the next step prefetches: enabled, and not switched off by what was measured."""
        return self.enabled and (self.switch is None or self.switch.is_on)

    @property
    def needs_not_resident(self) -> int:
        """How often a step needed what was not resident in the tier that is filled."""
        return self._cache.needs_not_resident

    @property
    def link(self) -> LinkCounters | None:
        """The counters of the reader that guesses are read by."""
        return self._link

    def describe(self) -> str:
        """Return in a few words what it does and why, for stats."""
        if not self.enabled:
            return "off"
        return "on" if self.switch is None else self.switch.describe()

    @property
    def is_trying(self) -> bool:
        """Whether some steps are made without it, to compare."""
        tries = self.enabled and self.switch is not None and not self._cache.has_every_expert
        return tries and self.switch is not None and self.switch.is_trying

    def use(
        self,
        predictor: Predictor | None,
        *,
        switch: GainSwitch | None,
        threshold: Threshold | None = None,
        link: LinkCounters | None = None,
    ) -> None:
        """Go on with another predictor and its state: benchmarks compare several on one model."""
        self._predictor, self.enabled = predictor, predictor is not None
        self.switch, self.threshold = switch, threshold or Threshold()
        self.threshold.skip(self._cache.stats.decode_bytes, self._cache.stats.prefetch_wasted_bytes)
        self._link, self._bytes_per_s = link, self._speeds.get(self._rate)
        self._set_depth_limit()

    def turn_to(self, cache: ExpertCache, link: LinkCounters, rank: Rank | None = None) -> None:
        """Fill another tier from now on: before any step, where the one below has every expert.

        Args:
            rank: puts guesses in the order of their worth there, and leaves out what has none.
        """
        self._cache, self._link, self._rank, self._rate = cache, link, rank, LINK_RATE
        self._bytes_per_s = self._speeds.get(self._rate)
        self._tell_slots()

    def begin_step(self, token_ids: NDArray[np.int64] | None, *, is_new_text: bool = False) -> None:
        """Start a forward pass: read what its tokens alone say of the first layers.

        Args:
            is_new_text: nothing came before these tokens.
        """
        if self._predictor is None or not self.enabled:
            return
        if is_new_text:
            self._predictor.new_sequence()
        self._last_look = None
        self._last_layer = -1
        if not self.is_on:
            self._needs_seen = -1
        elif not self._cache.has_every_expert:
            self._read(self._first_guesses(token_ids))

    def _first_guesses(self, token_ids: NDArray[np.int64] | None) -> list[Guess]:
        assert self._predictor is not None
        if self._one_token is None or token_ids is None or len(token_ids) != 1:
            return self._guesses(self._predictor.begin_step(token_ids))
        first_input = getattr(self._predictor, "first_input", None)
        hidden = None if first_input is None else first_input(token_ids)
        if hidden is None:
            return []
        likely = self._one_token.likely(FIRST, hidden.data_ptr(), [], [], self.threshold.value)
        return self._absent_of(likely)

    def step_done(self, seconds: float) -> None:
        """Take note of a decode step's time; a step's prefetching is switched as a whole."""
        needs = self._cache.needs_not_resident
        step_needs, self._needs_before_step = needs - self._needs_before_step, needs
        if self.enabled and self.switch is not None and not self._cache.has_every_expert:
            self.switch.record(seconds, step_needs)

    def routed(
        self,
        layer_idx: int,
        used: Iterable[int],
        expert_ids: NDArray[np.int64],
        expert_weights: NDArray[np.float32],
    ) -> None:
        """Cancel queued reads of this layer that its router did not choose; let the predictor learn.

        Args:
            used: distinct experts of the step.
            expert_ids: (T, K), of each token.
            expert_weights: (T, K).
        """
        if self.is_on:
            assert self._predictor is not None
            self._predictor.observe(layer_idx, expert_ids, expert_weights)
            self._cache.contradict(layer_idx, used)

    def look_ahead(
        self,
        layer_idx: int,
        router_input: Any,
        expert_ids: NDArray[np.int64],
        expert_weights: NDArray[np.float32],
    ) -> None:
        """Queue reads for the next layers; call after ``cache.begin``, whose demand reads go first."""

        def ask() -> list[Guess]:
            assert self._predictor is not None
            return self._guesses(self._predictor.predict(layer_idx, router_input, expert_ids, expert_weights))

        self._look_ahead(layer_idx, ask)

    @property
    def serves_one_token(self) -> bool:
        """Whether ``routed_one`` and ``look_ahead_one`` may be called instead of the general ones."""
        return self._one_token is not None

    def routed_one(self, layer_idx: int, expert_ids: list[int], weights: list[float]) -> None:
        """``routed`` for a single token."""
        if self.is_on:
            assert self._one_token is not None
            self._one_token.observe(layer_idx, expert_ids, weights)
            self._cache.contradict(layer_idx, expert_ids)

    def look_ahead_one(
        self, layer_idx: int, hidden: int, expert_ids: list[int], weights: list[float]
    ) -> None:
        """``look_ahead`` for a single token; ``hidden``: address of what its router saw, float32."""

        def ask() -> list[Guess]:
            assert self._one_token is not None
            threshold = self.threshold.value
            return self._absent_of(self._one_token.likely(layer_idx, hidden, expert_ids, weights, threshold))

        self._look_ahead(layer_idx, ask)

    def _look_ahead(self, layer_idx: int, ask: Callable[[], list[Guess]]) -> None:
        if not self.is_on or self._cache.has_every_expert or self._rests(layer_idx):
            return
        started = self._measure()
        queued_bytes = self._cache.guessed_bytes(layer_idx) - PARALLEL_BYTES
        if self._is_link_full(queued_bytes) or not self._is_worth_predicting(layer_idx):
            return
        self._submitting_s = 0.0
        self._read(ask(), queued_bytes)
        predict_s = self._clock() - started - self._submitting_s
        self._predict_s += SMOOTHING * (predict_s - self._predict_s)

    def _read(self, guesses: list[Guess], queued_bytes: int = -PARALLEL_BYTES) -> None:
        if not guesses:
            return
        keys = plan_reads(
            guesses,
            queued_bytes=queued_bytes,
            window_bytes=self._window_s * self._bytes_per_s,
            threshold=self.threshold.value,
            ranked=self._rank is not None,
        )
        if keys:
            started = self._clock()
            self._cache.prefetch(keys)
            submit_s = (self._clock() - started) / len(keys)
            self._submit_s += SMOOTHING * (submit_s - self._submit_s)
            self._submitting_s = submit_s * len(keys)

    def _guesses(self, forecasts: Sequence[Forecast]) -> list[Guess]:
        """Return the likely experts of some layers that have no slot."""
        likely = [
            (windows, layer_idx, expert_id, float(probabilities[expert_id]))
            for windows, (layer_idx, probabilities) in enumerate(forecasts, start=1)
            for expert_id in np.flatnonzero(probabilities >= self.threshold.value).tolist()
        ]
        return self._absent_of(likely)

    def _absent_of(self, likely: Iterable[Likely]) -> list[Guess]:
        """Return those of (layers ahead, layer_idx, expert_id, probability) that have no slot."""
        cache = self._cache
        likely = list(likely)
        if not likely:
            return []
        guesses = [
            Guess(ExpertKey(layer_idx, expert_id), probability, cache.expert_bytes(layer_idx), windows)
            for windows, layer_idx, expert_id, probability in likely
            if cache.absent(layer_idx, (expert_id,))
        ]
        return guesses if self._rank is None else self._rank(likely, guesses)

    def _is_link_full(self, queued_bytes: int) -> bool:
        """Whether guesses keep the link busy for as long as a prediction reaches."""
        reach_bytes = self._most_depth * self._window_s * self._bytes_per_s
        return queued_bytes + 0.5 * self._cache.largest_expert_bytes > reach_bytes

    def _is_worth_predicting(self, layer_idx: int) -> bool:
        """Whether the stall that a prediction may save is above the time that it takes."""
        needs = self._needs.get(self._next_layer.get(layer_idx, -1))
        if needs is None or self._steps % PROBE_EVERY == 0:
            return True
        saved_s = self._read_s - self._submit_s
        return EXPECTED_RECALL * needs * saved_s > self._predict_s

    def _measure(self) -> float:
        """Bring the window's compute time up to date; now and then the link's speed and what follows.

        Returns:
            The time.
        """
        now, stall_s = self._clock(), self._cache.stats.stall_s
        if self._last_look is not None:
            window_s = max(1e-6, now - self._last_look[0] - (stall_s - self._last_look[1]))
            known = self._window_s < math.inf
            self._window_s = self._window_s + SMOOTHING * (window_s - self._window_s) if known else window_s
            self._speeds.note("layer_s", self._window_s)
        self._last_look = (now, stall_s)
        self._steps += 1
        if self._link is not None and self._steps % MEASURE_EVERY_STEPS == 0:
            self._measure_link(*self._link())
        return now

    def _measure_link(self, bytes_read: int, busy_s: float) -> None:
        new_bytes, new_s = bytes_read - self._link_seen[0], busy_s - self._link_seen[1]
        self._link_seen = (bytes_read, busy_s)
        if new_bytes <= 0 or new_s <= 0:
            return
        speed = new_bytes / new_s
        best = self._bytes_per_s * BEST_SPEED_KEPT
        self._bytes_per_s = speed if best == math.inf else max(speed, best)
        self._speeds.note(self._rate, self._bytes_per_s)
        stats = self._cache.stats
        self._read_s = read_s = self._cache.largest_expert_bytes / speed
        self.threshold.update(
            stats.decode_bytes, stats.prefetch_wasted_bytes, break_even(read_s, self._submit_s)
        )
        self._set_depth()

    def _set_depth_limit(self) -> None:
        """Take the layers ahead that the predictor was made for as the most; begin with one."""
        self._one_token = getattr(self._predictor, "one_token", None)
        self._order = getattr(self._predictor, "order", None)
        self._most_depth = self._order.depth if self._order is not None else 1
        self._tell_slots()

    def _tell_slots(self) -> None:
        """Let the native forecast leave out who has a slot already: most of what is likely."""
        leave_out = getattr(self._one_token, "leave_out", None)
        if leave_out is not None:  # a rank judges the residents with the others
            leave_out(self._cache.slot_tables() if self._rank is None else {})

    def _set_depth(self) -> None:
        """Look as many layers ahead as it takes to read what a layer needs, and one more.

        A read that begins with its own window is late more often than not: others go before, and it waits for
        the disk as long as it reads.
        """
        if self._order is not None and self._needs:
            needs = sum(self._needs.values()) / len(self._needs)
            window_bytes = self._window_s * self._bytes_per_s
            depth = lookahead_depth(needs * self._cache.largest_expert_bytes, window_bytes)
            self._order.depth = min(self._most_depth, depth + 1)

    def _rests(self, layer_idx: int) -> bool:
        """Note what the layer needed; whether for long no layer needed what was not resident."""
        needs = self._cache.needs_not_resident
        new = needs - self._needs_seen if self._needs_seen >= 0 else 1
        self._needs_seen = needs
        before = self._needs.get(layer_idx)
        self._needs[layer_idx] = new if before is None else before + SMOOTHING * (new - before)
        if self._last_layer >= 0:
            self._next_layer[self._last_layer] = layer_idx
        self._last_layer = layer_idx
        self._steps_without_need = 0 if new else self._steps_without_need + 1
        return self._steps_without_need > REST_AFTER_STEPS
