"""From predictions to speculative reads. Knows no torch: a predictor's answers are arrays.

Which guesses are read is guessed_reads.py's to say; what native code reads in a run of layers,
run_reads.py's. Here are a step's calls, and whether prefetching pays at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.planning.correction import RunningCorrection
from moe_offload.planning.gain_switch import GainSwitch
from moe_offload.planning.prediction import Predictor
from moe_offload.planning.prefetch_plan import Guess, Threshold
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.guessed_reads import Rank
from moe_offload.residency.prefetch_pace import LINK_RATE, LinkCounters, Pace
from moe_offload.residency.run_reads import FIRST, RunReads


class Prefetcher(RunReads):
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
        super().__init__(cache, predictor, enabled=enabled, switch=switch, pace=Pace(link, speeds, clock))
        self._needs_before_step = 0

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
