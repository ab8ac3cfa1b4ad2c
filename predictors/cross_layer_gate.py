"""Cross-layer gate: ask the next layers' routers now, with this layer's router input (Fate).

The residual stream changes little from one layer to the next, so the next router's answer on this
input names most of the experts that it will choose on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from moe_offload.planning.prediction import Forecast, StatelessPredictor, used_by_any
from moe_offload.predictors.routers import DEFAULT_TEMPERATURE, RouterScores, probabilities


class CrossLayerGate(StatelessPredictor):
    """Predict with the model's own routers; they are not touched.

    Args:
        routers: by decoder layer index, of every MoE layer.
        depth: how many MoE layers ahead.
        temperatures: by (layer, layers ahead), what makes its numbers probabilities (fit.py); others
            have DEFAULT_TEMPERATURE.
    """

    def __init__(
        self,
        routers: Mapping[int, nn.Module],
        *,
        depth: int = 1,
        temperatures: Mapping[tuple[int, int], float] | None = None,
    ) -> None:
        layers = sorted(routers)
        scores = {layer_idx: RouterScores(routers[layer_idx]) for layer_idx in layers}
        known = temperatures or {}
        self._next: dict[int, list[tuple[int, RouterScores, float]]] = {
            layer_idx: [
                (later, scores[later], known.get((layer_idx, ahead), DEFAULT_TEMPERATURE))
                for ahead, later in enumerate(layers[position + 1 : position + 1 + depth], start=1)
            ]
            for position, layer_idx in enumerate(layers)
        }

    def predict(
        self,
        layer_idx: int,
        router_input: Any,
        expert_ids: NDArray[np.int64],
        expert_weights: NDArray[np.float32],
    ) -> Sequence[Forecast]:
        """Return the next routers' answers on this layer's ``router_input``."""
        return [
            Forecast(later, used_by_any(probabilities(router(router_input), router.top_k, temperature)))
            for later, router, temperature in self._next[layer_idx]
        ]
