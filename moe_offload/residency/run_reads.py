"""Speculative reads where a token's layers run in one native call, and between two tokens.

Native code asks the predictor and begins the reads (early_reads.py); here is what it may do, and when.
"""

from __future__ import annotations

from collections.abc import Callable

from moe_offload._native import LayerWatch
from moe_offload.planning.gain_switch import GainSwitch
from moe_offload.planning.next_token import NextToken
from moe_offload.planning.prediction import Predictor
from moe_offload.residency.early_reads import EarlyReads
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.guessed_reads import PARALLEL_BYTES, GuessedReads
from moe_offload.residency.prefetch_pace import Pace

FIRST = -1  # stands for the layer that has routed, before any has


class RunReads(GuessedReads):
    """Guesses that native code makes and reads, in a run of layers and before the next token's first."""

    def __init__(
        self,
        cache: ExpertCache,
        predictor: Predictor | None,
        *,
        enabled: bool,
        switch: GainSwitch | None,
        pace: Pace,
    ) -> None:
        super().__init__(cache, predictor, enabled=enabled, switch=switch, pace=pace)
        self._next_token = NextToken()

    @property
    def looks_natively(self) -> bool:
        """Whether ``begin_run`` and ``look_ahead_natively`` may be called instead of ``..._one``."""
        return self._early is not None

    def begin_run(self, after_layer: int) -> LayerWatch | None:
        """Return who watches the layers after ``after_layer`` (-1: from the first) run in one call.

        None where nothing is prefetched. Every run is followed by ``end_run``, also when it failed.
        """
        if self._early is None:
            return None
        if self._early.has_lent:  # a look-ahead from the layer that stopped the last run has asked all this
            return self._early.go_on()
        if not self.is_on or self._cache.has_every_expert:
            return None
        if after_layer == FIRST:  # the next token's first layers are looked at there, too
            self._begins_in_run = True
        depth = self._most_depth if self._order is None else self._order.depth
        value = self.threshold.value
        return self._early.begin(value, depth, PARALLEL_BYTES, after_layer)

    def end_run(self) -> list[tuple[int, int]]:
        """Book what was read in a run; also after an interrupt, wherever it came.

        Returns:
            Guesses that had arrived and that the run used; see ``EarlyReads.end``.
        """
        return [] if self._early is None else self._early.end()

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
            watch = early.begin(value, self._most_depth, free_bytes, FIRST)
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

    def _tell_slots(self) -> None:
        super()._tell_slots()
        self._early: EarlyReads | None = None
        self._begins_in_run = False  # the token before began in a run, and so will the next
        if self._rank is None and (store := EarlyReads.serves(self._cache, self._one_token)) is not None:
            self._early = EarlyReads(self._cache, store, self._one_token, self._pace)
