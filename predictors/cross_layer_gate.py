"""Cross-layer gate: ask the next layers' routers now, with this layer's router input (Fate).

The residual stream changes little from one layer to the next, so the next router's answer on this
input names most of the experts that it will choose on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_offload.planning.prediction import Forecast, StatelessPredictor, used_by_any
from moe_offload.predictors.history import LayerOrder
from moe_offload.predictors.native_gate import NativeGate
from moe_offload.predictors.one_token import FIRST, OneToken, router_rows
from moe_offload.predictors.routers import DEFAULT_CURVE, Curve, RouterScores, probabilities


class CrossLayerGate(StatelessPredictor):
    """Predict with the model's own routers; they are not touched.

    Args:
        routers: by decoder layer index, of every MoE layer.
        depth: how many MoE layers ahead.
        curves: by (layer, later layer), what makes of scores probabilities, where fitted.
        first_gate: (E, H), from a token's embedding to the first layer's scores; None: it is not forecast,
            nor where its router ranks by more than such a product.
        embed: token ids (T,) to embeddings (T, H), for ``first_gate``.
    """

    def __init__(
        self,
        routers: Mapping[int, nn.Module],
        *,
        depth: int = 1,
        curves: Mapping[tuple[int, int], Curve] | None = None,
        first_gate: NDArray[np.float32] | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.order = LayerOrder(list(routers), depth)
        self._scores = {layer_idx: RouterScores(router) for layer_idx, router in routers.items()}
        self._curves = dict(curves or {})
        ranks_by_product = bool(routers) and self._ranks_by_product(self.order.layers[0])
        self._first_gate, self._embed = first_gate if ranks_by_product else None, embed
        self._native = {
            (layer_idx, later): NativeGate(
                self._scores[later], self._curves.get((layer_idx, later), DEFAULT_CURVE)
            )
            for layer_idx in self.order.layers
            for later in self.order.after(layer_idx)
            if NativeGate.serves(self._scores[later])
        }
        self.one_token = self._for_one_token()

    def _for_one_token(self) -> OneToken | None:
        routers, order = self._scores, self.order
        if not routers or not all(map(NativeGate.serves, routers.values())):
            return None
        any_router = next(iter(routers.values()))
        num_experts = max(router.num_experts for router in routers.values())
        one_token = OneToken(order, num_experts, any_router.hidden_size)
        for layer_idx in order.layers:
            for later in order.after(layer_idx):
                router, bias = routers[later], routers[later].linear_bias
                assert router.linear_weight is not None
                one_token.add(
                    layer_idx,
                    later,
                    router_rows(router.linear_weight),
                    None if bias is None else bias.float().numpy(),
                    router.top_k,
                    self._curves.get((layer_idx, later), DEFAULT_CURVE),
                )
        if self._first_gate is not None:
            first = order.layers[0]
            one_token.add(FIRST, first, self._first_gate, None, routers[first].top_k, DEFAULT_CURVE)
        return one_token

    def _ranks_by_product(self, layer_idx: int) -> bool:
        scores = self._scores[layer_idx]
        return scores.linear_weight is not None and scores.linear_bias is None

    def first_input(self, token_ids: NDArray[np.int64]) -> Tensor | None:
        """Return the tokens' embeddings (T, H) float32, by which the first layer is forecast."""
        if self._first_gate is None or self._embed is None:
            return None
        with torch.no_grad():
            return self._embed(torch.from_numpy(token_ids)).float()

    def begin_step(self, token_ids: NDArray[np.int64] | None) -> Sequence[Forecast]:
        """Return what the tokens' embeddings say of the first layer."""
        embedding = None if token_ids is None else self.first_input(token_ids)
        if embedding is None or self._first_gate is None:
            return ()
        first = self.order.layers[0]
        scores = embedding.numpy() @ self._first_gate.T
        return [Forecast(first, used_by_any(probabilities(scores, self._scores[first].top_k, DEFAULT_CURVE)))]

    def predict(
        self,
        layer_idx: int,
        router_input: Any,
        expert_ids: NDArray[np.int64],
        expert_weights: NDArray[np.float32],
    ) -> Sequence[Forecast]:
        """Return the next routers' answers on this layer's ``router_input``."""
        forecasts = []
        for later in self.order.after(layer_idx):
            native = self._native.get((layer_idx, later)) if len(router_input) == 1 else None
            if native is not None:
                forecasts.append(Forecast(later, native(router_input)))
                continue
            router = self._scores[later]
            curve = self._curves.get((layer_idx, later), DEFAULT_CURVE)
            chances = probabilities(router(router_input), router.top_k, curve)
            forecasts.append(Forecast(later, used_by_any(chances)))
        return forecasts
