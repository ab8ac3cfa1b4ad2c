"""Predictors whose matrices were fitted in closed form: low-rank change of the input, and the hybrid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_offload._native import gate_chances
from moe_offload.planning.prediction import Forecast, StatelessPredictor, used_by_any
from moe_offload.predictors.history import Float32Array, HistoryPredictor, LayerOrder
from moe_offload.predictors.one_token import FIRST, OneToken
from moe_offload.predictors.routers import DEFAULT_CURVE, Curve, RouterScores, probabilities

Pair = tuple[int, int]  # (layer, later layer)
Embed = Callable[[Tensor], Tensor]  # (T,) token ids -> (T, H)


class LowRankGate(StatelessPredictor):
    """Predict the later router's input from this one, x + (x U) V + b, and ask the later router.

    Args:
        routers: by decoder layer index, of every MoE layer.
        maps: by (layer, later layer), U (H, r), V (r, H) and b (H,).
        depth: how many MoE layers ahead.
        curves: by (layer, later layer), from scores to probabilities.
    """

    def __init__(
        self,
        routers: Mapping[int, nn.Module],
        maps: Mapping[Pair, tuple[Float32Array, Float32Array, Float32Array]],
        *,
        depth: int = 1,
        curves: Mapping[Pair, Curve] | None = None,
    ) -> None:
        self.order = LayerOrder(list(routers), depth)
        self._scores = {layer_idx: RouterScores(router) for layer_idx, router in routers.items()}
        self._maps = {pair: tuple(map(torch.from_numpy, arrays)) for pair, arrays in maps.items()}
        self._curves = dict(curves or {})

    def predict(
        self,
        layer_idx: int,
        router_input: Any,
        expert_ids: NDArray[np.int64],
        expert_weights: Float32Array,
    ) -> Sequence[Forecast]:
        """Return the later routers' answers on the inputs that are expected there."""
        hidden: Tensor = router_input.detach().float()
        forecasts = []
        for later in self.order.after(layer_idx):
            down, up, shift = self._maps[layer_idx, later]
            router, curve = self._scores[later], self._curves.get((layer_idx, later), DEFAULT_CURVE)
            scores = router(hidden + torch.addmm(shift, hidden @ down, up))
            forecasts.append(Forecast(later, used_by_any(probabilities(scores, router.top_k, curve))))
        return forecasts


class Features(HistoryPredictor):  # type: ignore[misc]
    """Base of those that see all there is at a layer: its router input and choice, and the past.

    A row of features for one later layer is [router input (H), routing weights of this layer's choice
    (E), 1, the previous token's weights at the later layer (E), decayed frequency there (E)].
    """

    def __init__(
        self, layers: Sequence[int], num_experts: int, hidden_size: int, *, top_k: int, depth: int = 1
    ) -> None:
        super().__init__(layers, num_experts, depth=depth)
        self._top_k, self.num_experts, self.hidden_size = top_k, num_experts, hidden_size

    def seen_here(
        self, router_input: Tensor, expert_ids: NDArray[np.int64], expert_weights: Float32Array
    ) -> Float32Array:
        """Return (T, H + E + 1), the part of the features that all later layers share."""
        num_tokens, hidden_size = len(expert_ids), self.hidden_size
        seen = np.zeros((num_tokens, hidden_size + self.num_experts + 1), np.float32)
        seen[:, :hidden_size] = router_input.detach().float().numpy()
        seen[np.arange(num_tokens)[:, None], hidden_size + expert_ids] = expert_weights
        seen[:, -1] = 1.0
        return seen

    def past_of(self, layer_idx: int) -> Float32Array:
        """Return (2 E,): what the last token chose in a layer, and the decayed frequencies there."""
        row = self.order.row_of[layer_idx]
        return np.concatenate([self.history.previous[row], self.history.frequency[row]])


def answering(along: Float32Array, choice: Float32Array) -> Float32Array:
    """Return (T, E D): what the chosen experts' matrices, side by side, are multiplied with.

    Args:
        along: (T, D), the router input along some directions.
        choice: (T, E), routing weights, 0 where an expert was not chosen.
    """
    products: Float32Array = choice[:, :, None] * along[:, None, :]
    return products.reshape(len(along), -1)


class Hybrid(Features):
    """A later router's scores by ridge regression on hidden state, choice and past, and on every expert.

    Args:
        tables: by (layer, later layer), (H + 3 E + 1, E): from features to scores.
        first_tables: by layer, (H + 2 E + 1, E): from [token embedding (H), 1, past (2 E)] to the scores of
            the first layers, before any router has spoken.
        embed: token ids to what ``first_tables`` were fitted with; None: the first layers are not forecast.
        curves: by (layer, later layer), and (-1, layer) for ``first_tables``.
        directions: by layer, (D, H), along which experts answer.
        answers: by (layer, later layer), (E, D, E): what each expert of the layer, if it is chosen, adds to
            the later scores for each direction. Where there are none, scores are linear in the features.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_experts: int,
        hidden_size: int,
        tables: Mapping[Pair, Float32Array],
        *,
        top_k: int,
        depth: int = 1,
        first_tables: Mapping[int, Float32Array] | None = None,
        embed: Embed | None = None,
        curves: Mapping[Pair, Curve] | None = None,
        directions: Mapping[int, Float32Array] | None = None,
        answers: Mapping[Pair, Float32Array] | None = None,
    ) -> None:
        super().__init__(layers, num_experts, hidden_size, top_k=top_k, depth=depth)
        self._directions = {i: np.ascontiguousarray(array) for i, array in (directions or {}).items()}
        self._answers = {pair: np.ascontiguousarray(array) for pair, array in (answers or {}).items()}
        self._tables = {pair: np.ascontiguousarray(table.T) for pair, table in tables.items()}  # (E, F)
        self._first = {i: np.ascontiguousarray(table.T) for i, table in (first_tables or {}).items()}
        self._embed, self._curves = embed, dict(curves or {})
        pairs = [
            (layer_idx, later) for layer_idx in self.order.layers for later in self.order.after(layer_idx)
        ]
        is_whole = top_k < num_experts and all(pair in self._tables for pair in pairs)
        self.one_token = self._for_one_token(pairs) if is_whole else None

    def _for_one_token(self, pairs: list[Pair]) -> OneToken:
        one_token = OneToken(self.order, self.num_experts, self.hidden_size, self.history)
        for layer_idx, later in pairs:
            curve = self._curves.get((layer_idx, later), DEFAULT_CURVE)
            one_token.add(layer_idx, later, self._tables[layer_idx, later], None, self._top_k, curve)
            answers = self._answers.get((layer_idx, later))
            if answers is not None:
                one_token.add_answers(layer_idx, later, self._directions[layer_idx], answers)
        for later in self._known_first():
            curve = self._curves.get((FIRST, later), DEFAULT_CURVE)
            one_token.add(FIRST, later, self._first[later], None, self._top_k, curve)
        return one_token

    def _known_first(self) -> list[int]:
        return [layer_idx for layer_idx in self.first_layers() if layer_idx in self._first]

    def first_input(self, token_ids: NDArray[np.int64]) -> Tensor | None:
        """Return the tokens' embeddings (T, H) float32, by which the first layers are forecast."""
        if self._embed is None or not self._first:
            return None
        with torch.no_grad():
            return self._embed(torch.from_numpy(token_ids)).float()

    def begin_step(self, token_ids: NDArray[np.int64] | None) -> Sequence[Forecast]:
        """Return what the tokens' embeddings and the past say of the first layers."""
        embedding = None if token_ids is None else self.first_input(token_ids)
        if embedding is None:
            return ()
        seen = np.concatenate([embedding.numpy(), np.ones((len(embedding), 1), np.float32)], axis=1)
        return [self._forecast(seen, later, self._first[later], FIRST, None) for later in self._known_first()]

    def predict(
        self,
        layer_idx: int,
        router_input: Any,
        expert_ids: NDArray[np.int64],
        expert_weights: Float32Array,
    ) -> Sequence[Forecast]:
        """Return forecasts of the next layers."""
        seen = self.seen_here(router_input, expert_ids, expert_weights)
        answering = self._answering(layer_idx, seen)
        return [
            self._forecast(seen, later, self._tables[layer_idx, later], layer_idx, answering)
            for later in self.order.after(layer_idx)
        ]

    def _answering(self, layer_idx: int, seen: Float32Array) -> Float32Array | None:
        directions = self._directions.get(layer_idx)
        if directions is None:
            return None
        inputs, choice = seen[:, : self.hidden_size], seen[:, self.hidden_size : -1]
        return answering(inputs @ directions.T, choice)

    def _forecast(
        self,
        seen: Float32Array,
        later: int,
        table: Float32Array,
        layer_idx: int,
        answering: Float32Array | None,
    ) -> Forecast:
        """Apply ``table`` (E, F) to the features; one token in one native call, as decoding asks for it."""
        features = np.empty((len(seen), table.shape[1]), np.float32)
        features[:, : seen.shape[1]] = seen
        features[:, seen.shape[1] :] = self.past_of(later)
        curve = self._curves.get((layer_idx, later), DEFAULT_CURVE)
        answers = self._answers.get((layer_idx, later))
        added = None
        if answering is not None and answers is not None:
            added = answering @ answers.reshape(-1, self.num_experts)
        if len(seen) == 1 and self._top_k < self.num_experts:
            bias = None if added is None else added[0]
            chances = gate_chances(features.ctypes.data, table, bias, self._top_k, curve.slope, curve.offset)
            return Forecast(later, chances)
        scores = features @ table.T + (0.0 if added is None else added)
        return Forecast(later, used_by_any(probabilities(scores, self._top_k, curve)))
