"""From predictions to speculative reads. Knows no torch: a predictor's answers are arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.planning.prediction import Predictor, expected_keys
from moe_offload.residency.expert_cache import ExpertCache

REST_AFTER_STEPS = 64  # a few tokens


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
        if self.enabled:
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
        if not self.enabled or self._cache.has_every_expert or self._rests():
            return
        assert self._predictor is not None
        forecasts = self._predictor.predict(layer_idx, router_input, expert_ids, expert_weights)
        self._cache.prefetch(expected_keys(forecasts))

    def _rests(self) -> bool:
        """Count layer steps since one needed an expert that was not resident."""
        needs = self._cache.needs_not_resident
        self._steps_without_need = self._steps_without_need + 1 if needs == self._needs_seen else 0
        self._needs_seen = needs
        return self._steps_without_need > REST_AFTER_STEPS
