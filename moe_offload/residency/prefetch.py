"""From predictions to speculative reads. Knows no torch: a predictor's answers are arrays.

What is worth reading is planning/prefetch_plan.py's to say; how fast everything is, prefetch_pace.py's; here
it is measured how much of what is read is wasted, and whether prefetching pays at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload._native import LayerWatch
from moe_offload.planning.correction import RunningCorrection
from moe_offload.planning.gain_switch import GainSwitch
from moe_offload.planning.next_token import NextToken
from moe_offload.planning.prediction import Forecast, Predictor
from moe_offload.planning.prefetch_plan import (
    READERS,
    Guess,
    Threshold,
    break_even,
    lookahead_depth,
    plan_reads,
)
from moe_offload.residency.early_reads import EarlyReads
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.prefetch_pace import LINK_RATE, LinkCounters, Pace
from moe_offload.storage.expert_format import ExpertKey

PARALLEL_BYTES = READERS * (64 << 10)  # small reads under way together take hardly longer than one

FIRST = -1  # stands for the layer that has routed, before any has

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
        self._pace = Pace(link, speeds, clock)
        self._needs_before_step = 0
        self._begins_in_run = False  # the token before began in a run, and so will the next
        self._next_token = NextToken()
        self._rank: Rank | None = None
        self._is_allowed: Callable[[], bool] | None = None
        self._set_depth_limit()

    @property
    def is_on(self) -> bool:
        """Whether the next step prefetches: enabled, and not switched off by what was measured."""
        if not self.enabled:
            return False
        return self._is_allowed() if self._is_allowed else self.switch is None or self.switch.is_on

    @property
    def needs_not_resident(self) -> int:
        """How often a step needed what was not resident in the tier that is filled."""
        return self._cache.needs_not_resident

    @property
    def link(self) -> LinkCounters | None:
        """The counters of the reader that guesses are read by."""
        return self._pace.link

    def describe(self) -> str:
        """Return in a few words what it does and why, for stats."""
        if not self.enabled:
            return "off"
        return "on" if self.switch is None else self.switch.describe()

    @property
    def is_trying(self) -> bool:
        """Whether some steps are made without it, to compare."""
        if self._is_allowed is not None:
            return False
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
        self._pace.use(link)
        self._set_depth_limit()

    def turn_to(
        self,
        cache: ExpertCache,
        link: LinkCounters,
        rank: Rank | None = None,
        is_allowed: Callable[[], bool] | None = None,
    ) -> None:
        """Fill another tier from now on: before any step, where the one below has every expert.

        Args:
            rank: puts guesses in the order of their worth there, and leaves out what has none.
            is_allowed: whether the next step prefetches, asked instead of ``switch``, by who keeps it.
        """
        self._cache, self._rank, self._is_allowed = cache, rank, is_allowed
        self._pace.turn_to(link, LINK_RATE)
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
        came = None if token_ids is None or len(token_ids) != 1 or is_new_text else int(token_ids[0])
        self._next_token.came(came, self._pace.clock())
        self._pace.layers.begin_step()
        if not self.is_on:
            self._pace.rest()
        elif self._begins_in_run and token_ids is not None and len(token_ids) == 1:
            self._begins_in_run = False  # until a run has begun
            self._measure()
        elif not self._cache.has_every_expert:
            self._look_at_the_beginning(token_ids)

    def _look_at_the_beginning(self, token_ids: NDArray[np.int64] | None) -> None:
        assert self._predictor is not None
        if self._one_token is None or token_ids is None or len(token_ids) != 1:
            return self._read(self._guesses(self._predictor.begin_step(token_ids)))
        first_input = getattr(self._predictor, "first_input", None)
        hidden = None if first_input is None else first_input(token_ids)
        if hidden is not None:
            likely = self._one_token.likely(FIRST, hidden.data_ptr(), [], [], self.threshold.value)
            self._read(self._absent_of(likely))

    def step_done(self, seconds: float) -> None:
        """Take note of a decode step's time; a step's prefetching is switched as a whole."""
        if self._is_allowed is not None:
            return
        needs = self.take_needs()
        if self.enabled and self.switch is not None and not self._cache.has_every_expert:
            self.switch.record(seconds, needs)

    def take_needs(self) -> int:
        """Return how many experts were needed and not resident since this was last asked."""
        needs = self._cache.needs_not_resident
        taken, self._needs_before_step = needs - self._needs_before_step, needs
        return taken

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

    # Where a token's layers run in one call.

    @property
    def looks_natively(self) -> bool:
        """Whether ``begin_run`` and ``look_ahead_natively`` may be called instead of ``..._one``."""
        return self._early is not None

    def begin_run(self, after_layer: int) -> LayerWatch | None:
        """Return who watches the layers after ``after_layer`` (-1: from the first) run in one call.

        None where nothing is prefetched. Every run is followed by ``end_run``, also when it failed.
        """
        if self._early is None or not self.is_on or self._cache.has_every_expert:
            return None
        if after_layer == FIRST:  # the next token's first layers are looked at there, too
            self._begins_in_run = True
        depth = self._most_depth if self._order is None else self._order.depth
        value = self.threshold.value
        return self._early.begin(value, depth, self._most_depth, PARALLEL_BYTES, after_layer)

    def end_run(self) -> None:
        """Book what was read in a run; also after an interrupt, wherever it came."""
        if self._early is not None:
            self._early.end()

    def look_at_next_token(self, expect: Callable[[LayerWatch | None], int]) -> None:
        """Begin to read for the first layers of the next token, before who samples it has chosen it.

        Args:
            expect: returns the likeliest token, and tells it to a watch, where there is one.
        """
        early, next_token = self._early, self._next_token
        if early is None or not self.is_on or self._cache.has_every_expert or not self._knows_first:
            return
        if not next_token.asks():
            return
        watch = None
        if next_token.is_trusted:
            gap_bytes = next_token.gap_s * self._pace.bytes_per_s if next_token.gap_s else 0.0
            value, free_bytes = self.threshold.value / next_token.share, PARALLEL_BYTES + gap_bytes
            watch = early.begin(value, self._most_depth, self._most_depth, free_bytes, FIRST)
        try:
            next_token.expect(expect(watch), self._pace.clock())
        finally:
            early.end()

    def look_ahead_natively(
        self, layer_idx: int, hidden: int, expert_ids: list[int], weights: list[float]
    ) -> None:
        """``look_ahead_one`` after a layer that stopped a run, which has told what the layer routed.

        The next run, or ``end_run``, ends it.
        """
        if self.begin_run(layer_idx) is not None:
            assert self._early is not None
            self._early.native.look_ahead(layer_idx, hidden, expert_ids, weights)

    def _look_ahead(self, layer_idx: int, ask: Callable[[], list[Guess]]) -> None:
        cache, pace = self._cache, self._pace
        if not self.is_on or cache.has_every_expert or pace.rests(layer_idx, cache.needs_not_resident):
            return
        pace.look(cache.stats.stall_s)
        self._measure()
        queued_bytes = cache.guessed_bytes(layer_idx) - PARALLEL_BYTES
        if self._is_link_full(queued_bytes) or not pace.layers.is_worth_predicting(layer_idx):
            return
        pace.predicting()
        self._read(ask(), queued_bytes)
        pace.predicted()

    def _read(self, guesses: list[Guess], queued_bytes: int = -PARALLEL_BYTES) -> None:
        if not guesses:
            return
        keys = plan_reads(
            guesses,
            queued_bytes=queued_bytes,
            window_bytes=self._pace.window_bytes,
            threshold=self.threshold.value,
            ranked=self._rank is not None,
        )
        if keys:
            started = self._pace.clock()
            self._cache.prefetch(keys)
            self._pace.submitted(started, len(keys))

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
        reach_bytes = self._most_depth * self._pace.window_bytes
        return queued_bytes + 0.5 * self._cache.largest_expert_bytes > reach_bytes

    def _measure(self) -> None:
        """Now and then, adapt threshold and depth to the link's speed and to what was wasted."""
        stats, pace = self._cache.stats, self._pace
        if not pace.is_time_to_measure or not pace.measure_link(self._cache.largest_expert_bytes):
            return
        worth = break_even(pace.layers.read_s, pace.layers.submit_s)
        self.threshold.update(stats.decode_bytes, stats.prefetch_wasted_bytes, worth)
        self._set_depth()

    def _set_depth_limit(self) -> None:
        """Take the layers ahead that the predictor was made for as the most; begin with one."""
        self._one_token = getattr(self._predictor, "one_token", None)
        self._knows_first = getattr(self._one_token, "knows_first", False)
        self._order = getattr(self._predictor, "order", None)
        self._most_depth = self._order.depth if self._order is not None else 1
        self._tell_slots()

    def _tell_slots(self) -> None:
        """Let the native forecast leave out who has a slot already: most of what is likely."""
        leave_out = getattr(self._one_token, "leave_out", None)
        if leave_out is not None:  # a rank judges the residents with the others
            leave_out(self._cache.slot_tables() if self._rank is None else {})
        self._early: EarlyReads | None = None
        self._begins_in_run = False
        if self._rank is None and (store := EarlyReads.serves(self._cache, self._one_token)) is not None:
            self._early = EarlyReads(self._cache, store, self._one_token, self._pace)

    def _set_depth(self) -> None:
        """Look as many layers ahead as it takes to read what a layer needs, and one more.

        A read that begins with its own window is late more often than not: others go before, and it waits for
        the disk as long as it reads.
        """
        needs = self._pace.layers.mean_needs()
        if self._order is not None and needs is not None:
            depth = lookahead_depth(needs * self._cache.largest_expert_bytes, self._pace.window_bytes)
            self._order.depth = min(self._most_depth, depth + 1)
