"""Gates that ask a later router not with this layer's input but with what the residual may become.

A router sees norm(residual) * norm_weight. Dividing this layer's norm weight out and multiplying the later
one's in gives the later router the residual as its own norm would show it; the residual's size cancels
in a ranking. What the layer itself adds to the residual is known in part before it is computed: the shared
expert's output can be computed, the routed experts' is near its mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_offload.errors import ConfigError
from moe_offload.planning.prediction import Forecast, StatelessPredictor, used_by_any
from moe_offload.predictors.history import LayerOrder
from moe_offload.predictors.routers import DEFAULT_CURVE, Curve, RouterScores, probabilities

Pair = tuple[int, int]  # (layer, later layer)
Curves = Mapping[Pair, Curve]


class ResidualGate(StatelessPredictor):
    """The later router on this residual under the later layer's norm.

    Args:
        routers: by decoder layer index, of every MoE layer.
        norms: by layer, the norm before the router; its weight is used.
        depth: how many MoE layers ahead.
        curves: by (layer, later layer), from scores to probabilities, where fitted.
    """

    def __init__(
        self,
        routers: Mapping[int, nn.Module],
        norms: Mapping[int, nn.Module],
        *,
        depth: int = 1,
        curves: Curves | None = None,
    ) -> None:
        self.order = LayerOrder(list(routers), depth)
        self._scores = {layer_idx: RouterScores(router) for layer_idx, router in routers.items()}
        self._curves = dict(curves or {})
        weights = {layer_idx: norm_weight(norms[layer_idx], layer_idx) for layer_idx in routers}
        self.norm_weights = weights
        self._ratio = {
            (layer_idx, later): weights[later] / weights[layer_idx]
            for layer_idx in self.order.layers
            for later in self.order.after(layer_idx)
        }

    def predict(
        self,
        layer_idx: int,
        router_input: Any,
        expert_ids: NDArray[np.int64],
        expert_weights: NDArray[np.float32],
    ) -> Sequence[Forecast]:
        """Return the later routers' answers on the expected residual."""
        hidden = router_input.detach().float() + self.expected_change(layer_idx, router_input)
        forecasts = []
        for later in self.order.after(layer_idx):
            router = self._scores[later]
            scores = router(hidden * self._ratio[layer_idx, later])
            scores += self.correction(layer_idx, later, expert_ids, expert_weights)
            curve = self._curves.get((layer_idx, later), DEFAULT_CURVE)
            forecasts.append(Forecast(later, used_by_any(probabilities(scores, router.top_k, curve))))
        return forecasts

    def expected_change(self, layer_idx: int, router_input: Tensor) -> Tensor | float:
        """Return what is added to (T, H) in the router input's scale: here nothing."""
        return 0.0

    def correction(
        self,
        layer_idx: int,
        later: int,
        expert_ids: NDArray[np.int64],
        expert_weights: NDArray[np.float32],
    ) -> NDArray[np.float32] | float:
        """Return what is added to the (T, E) scores: here nothing."""
        return 0.0


class MeanOutputGate(ResidualGate):
    """Adds what the chosen experts add on average, as the later router sees it.

    Args:
        mean_scores: by (layer, later layer), (E + 1, E): row e is what expert e at weight 1 adds to the later
            scores, in the mean over the fit's text; the last row is added always.
    """

    def __init__(self, *args: Any, mean_scores: Mapping[Pair, NDArray[np.float32]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mean_scores = dict(mean_scores)

    def correction(
        self,
        layer_idx: int,
        later: int,
        expert_ids: NDArray[np.int64],
        expert_weights: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Return the weighted sum of the chosen experts' rows."""
        table = self._mean_scores[layer_idx, later]
        added: NDArray[np.float32] = np.einsum("tk,tke->te", expert_weights, table[expert_ids]) + table[-1]
        return added


class SharedExpertGate(ResidualGate):
    """Adds the shared expert's output, computed from this router input.

    Args:
        shared_experts: by layer, (T, H) router input -> (T, H) output of the shared expert.
        residual_rms: by layer, the root mean square of the residual, in the mean over the fit's text: the
            output is in the residual's units, the router input is not.
    """

    def __init__(
        self,
        *args: Any,
        shared_experts: Mapping[int, Callable[[Tensor], Tensor]],
        residual_rms: Mapping[int, float],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._shared, self._rms = dict(shared_experts), dict(residual_rms)

    @torch.no_grad()
    def expected_change(self, layer_idx: int, router_input: Tensor) -> Tensor:
        """Return the output over the residual's size, under this layer's norm weight."""
        output = self._shared[layer_idx](router_input).float()
        return output / self._rms[layer_idx] * self.norm_weights[layer_idx]


def norm_weight(norm: nn.Module, layer_idx: int) -> Tensor:
    """Return an RMS norm's weight (H,) in float32, with 0 replaced so that it can divide.

    Raises:
        ConfigError: the norm has no weight, or a bias, which does not divide out.
    """
    weight = getattr(norm, "weight", None)
    if weight is None or getattr(norm, "bias", None) is not None:
        raise ConfigError(
            f"layer {layer_idx} has a {type(norm).__name__} before its router; a residual predictor needs an "
            "RMS norm with a weight and no bias: choose predictor='cross_layer_gate'"
        )
    weight = weight.detach().float()
    return torch.where(weight.abs() < 1e-6, torch.full_like(weight, 1e-6), weight)
