"""From predictions to speculative reads. Knows no torch: a predictor's answers are expert keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.storage.expert_format import ExpertKey

REST_AFTER_STEPS = 64  # a few tokens


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

    ``predictor`` None or ``enabled`` False: every call returns at once. A prediction costs a router's
    time in every layer, so it rests while ``REST_AFTER_STEPS`` layer steps in a row found all they
    needed resident, until one does not.
    """

    def __init__(self, cache: ExpertCache, predictor: Predictor | None, *, enabled: bool = True) -> None:
        self._cache, self._predictor = cache, predictor
        self.enabled = enabled and predictor is not None
        self._steps_without_need = 0
        self._needs_seen = -1

    def routed(self, layer_idx: int, expert_ids: Iterable[int]) -> None:
        """Cancel queued reads of this layer that its router did not choose."""
        if self.enabled:
            self._cache.contradict(layer_idx, expert_ids)

    def look_ahead(self, layer_idx: int, router_input: Any) -> None:
        """Queue reads for the next layers; call after ``cache.begin``, whose demand reads go first."""
        if not self.enabled or self._cache.has_every_expert or self._rests():
            return
        assert self._predictor is not None
        self._cache.prefetch(self._predictor.predict(layer_idx, router_input))

    def _rests(self) -> bool:
        """Count layer steps since one needed an expert that was not resident."""
        needs = self._cache.needs_not_resident
        self._steps_without_need = self._steps_without_need + 1 if needs == self._needs_seen else 0
        self._needs_seen = needs
        return self._steps_without_need > REST_AFTER_STEPS
