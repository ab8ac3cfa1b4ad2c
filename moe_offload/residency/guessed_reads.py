"""Which guesses become reads: what the link carries in time, and what has no slot yet. Knows no torch.

What is worth reading is planning/prefetch_plan.py's to say; how fast everything is, prefetch_pace.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

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
from moe_offload.residency.prefetch_pace import Pace
from moe_offload.storage.expert_format import ExpertKey

PARALLEL_BYTES = READERS * (64 << 10)  # small reads under way together take hardly longer than one

Likely = tuple[int, int, int, float]  # layers ahead, layer_idx, expert_id, probability
Rank = Callable[[Sequence[Likely], Sequence[Guess]], list[Guess]]


class GuessedReads:
    """A predictor's guesses, those of them that are read, and how far ahead they look.

    Attributes:
        switch: turns prefetching off where steps are faster without; None: always on.
        threshold: the least probability that is read for.
    """

    def __init__(
        self,
        cache: ExpertCache,
        predictor: Predictor | None,
        *,
        enabled: bool,
        switch: GainSwitch | None,
        pace: Pace,
    ) -> None:
        self._cache, self._predictor, self._pace = cache, predictor, pace
        self.enabled = enabled and predictor is not None
        self.switch = switch
        self.threshold = Threshold()
        self._rank: Rank | None = None
        self._is_allowed: Callable[[], bool] | None = None
        self._set_depth_limit()

    @property
    def is_on(self) -> bool:
        """Whether the next step prefetches: enabled, and not switched off by what was measured."""
        if not self.enabled:
            return False
        return self._is_allowed() if self._is_allowed else self.switch is None or self.switch.is_on

    def _look_ahead(self, layer_idx: int, ask: Callable[[], list[Guess]]) -> None:
        cache, pace = self._cache, self._pace
        if not self.is_on or cache.has_every_expert or pace.rests(layer_idx, cache.needs_not_resident):
            return
        pace.look(cache.stats.stall_s)
        self._measure()
        queued_bytes = cache.guessed_bytes(layer_idx) - PARALLEL_BYTES
        is_link_full = queued_bytes > pace.window_bytes
        if is_link_full or not pace.layers.is_worth_predicting(layer_idx):
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

    def _measure(self) -> None:
        """Now and then, adapt threshold and depth to the link's speed and to what was wasted."""
        stats, pace = self._cache.stats, self._pace
        if not pace.is_time_to_measure or not pace.measure_link(self._cache.largest_expert_bytes):
            return
        pace.measure_needs(stats.decode_bytes - stats.prefetch_wasted_bytes, stats.stall_s)
        worth = break_even(pace.layers.read_s, pace.layers.submit_s, pace.busy_share)
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

    def _set_depth(self) -> None:
        """Look as many layers ahead as it takes to read what a layer needs, and one more.

        A read that begins with its own window is late more often than not: others go before, and it waits for
        the disk as long as it reads.
        """
        needs = self._pace.layers.mean_needs()
        if self._order is not None and needs is not None:
            depth = lookahead_depth(needs * self._cache.largest_expert_bytes, self._pace.window_bytes)
            self._order.depth = min(self._most_depth, depth + 1)
