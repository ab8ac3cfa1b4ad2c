"""From predictions to speculative reads. Knows no torch: a predictor's answers are expert keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.storage.expert_format import ExpertKey


class Predictor(Protocol):
    """Guess which experts the next MoE layers will choose, before their routers have spoken."""

    def predict(self, layer_idx: int, router_input: Any) -> Sequence[ExpertKey]:
        """Return keys of later layers, the most probable first; empty after the last layer.

        Args:
            layer_idx: the layer that routes now.
            router_input: (T, H), what its router saw.
        """


class Prefetcher:
    """Let ``predictor`` move bytes early; it never changes what a step computes.

    ``predictor`` None or ``enabled`` False: every call returns at once.
    """

    def __init__(self, cache: ExpertCache, predictor: Predictor | None, *, enabled: bool = True) -> None:
        self._cache, self._predictor = cache, predictor
        self.enabled = enabled and predictor is not None

    def routed(self, layer_idx: int, expert_ids: Iterable[int]) -> None:
        """Cancel queued reads of this layer that its router did not choose."""
        if self.enabled:
            self._cache.contradict(layer_idx, expert_ids)

    def look_ahead(self, layer_idx: int, router_input: Any) -> None:
        """Queue reads for the next layers; call after ``cache.begin``, whose demand reads go first."""
        if not self.enabled or self._cache.has_every_expert:
            return
        assert self._predictor is not None
        self._cache.prefetch(self._predictor.predict(layer_idx, router_input))
