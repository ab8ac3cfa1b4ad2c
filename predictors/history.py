"""Predictors that look at past choices only: popularity, frequency, previous token, transition.

They cost little and need no hidden state; what they find bounds what a look at the residual stream adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.planning.prediction import Forecast

DECAY = 0.9  # of a layer's frequencies, per token
STAY = 0.4  # how probably an expert of the previous token is used again, where nothing was fitted

Float32Array = NDArray[np.float32]


class History:
    """What the tokens so far chose, layer by layer.

    The rows of a step of several tokens are taken as tokens of one text, in order.

    Attributes:
        previous: (L, E) float32, the routing weights of the last token, 0 for what it did not choose.
        frequency: (L, E) float32, of use, decayed per token by ``decay``; kept over sequences.
    """

    def __init__(self, num_layers: int, num_experts: int, decay: float = DECAY) -> None:
        self.previous = np.zeros((num_layers, num_experts), np.float32)
        self.frequency = np.zeros((num_layers, num_experts), np.float32)
        self.decay = decay

    def new_sequence(self) -> None:
        """Forget the last token."""
        self.previous[:] = 0.0

    def observe(self, row: int, expert_ids: NDArray[Any], expert_weights: Float32Array) -> None:
        """Take in a step's (T, K) choices in the layer at ``row``."""
        previous, frequency, num_tokens = self.previous[row], self.frequency[row], len(expert_ids)
        previous[:] = 0.0
        previous[expert_ids[-1]] = expert_weights[-1]
        if num_tokens == 1:
            frequency *= self.decay
            frequency[expert_ids[0]] += 1.0 - self.decay
        else:
            age = np.arange(num_tokens - 1, -1, -1)
            share = (1.0 - self.decay) * self.decay**age  # (T,)
            frequency *= self.decay**num_tokens
            np.add.at(frequency, expert_ids.reshape(-1), np.repeat(share, expert_ids.shape[1]))


def past_of(
    one_hot: Float32Array, weighted: Float32Array, starts: NDArray[np.int64]
) -> tuple[Float32Array, Float32Array]:
    """Return (T, E) twice: previous and frequency that History holds before each token of one layer."""
    previous = np.zeros_like(weighted)
    previous[1:] = weighted[:-1]
    previous[starts] = 0.0
    frequency = np.zeros_like(one_hot)
    for token in range(1, len(one_hot)):
        frequency[token] = DECAY * frequency[token - 1] + (1.0 - DECAY) * one_hot[token - 1]
    return previous, frequency


class LayerOrder:
    """Rows of the MoE layers, and which come after which.

    Args:
        layers: decoder indices of the MoE layers.
        depth: how many of them a forecast reaches.
    """

    def __init__(self, layers: Sequence[int], depth: int) -> None:
        self.layers = sorted(layers)
        self.depth = depth
        self.row_of = {layer_idx: row for row, layer_idx in enumerate(self.layers)}

    def after(self, layer_idx: int) -> list[int]:
        """Return the next layers, at most ``depth``."""
        row = self.row_of[layer_idx]
        return self.layers[row + 1 : row + 1 + self.depth]


class HistoryPredictor:
    """Base: keeps a History and forecasts each later layer by ``chances``."""

    def __init__(self, layers: Sequence[int], num_experts: int, *, depth: int = 1) -> None:
        self.order = LayerOrder(layers, depth)
        self.history = History(len(self.order.layers), num_experts)

    def new_sequence(self) -> None:
        """Forget the last token."""
        self.history.new_sequence()

    def begin_step(self, token_ids: NDArray[np.int64] | None) -> Sequence[Forecast]:
        """Return what the past says about the first layers."""
        return [Forecast(layer_idx, self.chances(layer_idx)) for layer_idx in self.first_layers()]

    def first_layers(self) -> list[int]:
        """Return the layers that are forecast before any router has spoken."""
        return self.order.layers[: self.order.depth]

    def observe(self, layer_idx: int, expert_ids: NDArray[np.int64], expert_weights: Float32Array) -> None:
        """Keep a layer's choice."""
        self.history.observe(self.order.row_of[layer_idx], expert_ids, expert_weights)

    def predict(
        self,
        layer_idx: int,
        router_input: Any,
        expert_ids: NDArray[np.int64],
        expert_weights: Float32Array,
    ) -> Sequence[Forecast]:
        """Return forecasts of the next layers; the router's input is not looked at."""
        return [Forecast(later, self.chances(later)) for later in self.order.after(layer_idx)]

    def chances(self, layer_idx: int) -> Float32Array:
        """Return (E,) probabilities of use of a layer that has not routed this step."""
        raise NotImplementedError


class Frequency(HistoryPredictor):
    """An expert is as probable as it was used lately: its decayed frequency."""

    def chances(self, layer_idx: int) -> Float32Array:
        """Return the decayed frequencies."""
        recent: Float32Array = self.history.frequency[self.order.row_of[layer_idx]].copy()
        return recent


class PreviousToken(HistoryPredictor):
    """The previous token's experts are used again with probability ``stay``, heavy ones rather than light."""

    def __init__(
        self,
        layers: Sequence[int],
        num_experts: int,
        *,
        top_k: int,
        depth: int = 1,
        stay: Mapping[int, float] | None = None,
    ) -> None:
        super().__init__(layers, num_experts, depth=depth)
        self._top_k, self._stay = top_k, dict(stay or {})

    def chances(self, layer_idx: int) -> Float32Array:
        """Return ``stay``, tilted by weight, for the previous token's experts, the rest for the others."""
        previous = self.history.previous[self.order.row_of[layer_idx]]
        stay, (num_experts,) = self._stay.get(layer_idx, STAY), previous.shape
        used = previous > 0.0
        others = self._top_k * (1.0 - stay) / max(1, num_experts - self._top_k) if used.any() else 0.0
        others = min(others, 0.75 * stay)  # never above those that were used
        tilt = 0.75 + 0.5 * np.minimum(previous * self._top_k, 2.0) / 2.0
        chances: Float32Array = np.where(used, np.minimum(stay * tilt, 1.0), others).astype(np.float32)
        return chances


class Static(HistoryPredictor):
    """Every token uses an expert as often as the text of the fit did.

    Args:
        popularity: by layer, (E,) shares of the tokens that used each expert; they sum to top_k.
    """

    def __init__(self, popularity: Mapping[int, Float32Array], *, depth: int = 1) -> None:
        super().__init__(list(popularity), len(next(iter(popularity.values()))), depth=depth)
        self._popularity = dict(popularity)

    def chances(self, layer_idx: int) -> Float32Array:
        """Return the popularity in the fit's text."""
        shares: Float32Array = self._popularity[layer_idx]
        return shares


class Transition(HistoryPredictor):
    """From this layer's experts to a later layer's: the mean of their conditional frequencies.

    Args:
        tables: by (layer, later layer), (E, E): row e is how often each later expert was used by the
            tokens that used e.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_experts: int,
        tables: Mapping[tuple[int, int], Float32Array],
        *,
        depth: int = 1,
    ) -> None:
        super().__init__(layers, num_experts, depth=depth)
        self._tables = dict(tables)

    def begin_step(self, token_ids: NDArray[np.int64] | None) -> Sequence[Forecast]:
        """Nothing comes before the first layer."""
        return ()

    def predict(
        self,
        layer_idx: int,
        router_input: Any,
        expert_ids: NDArray[np.int64],
        expert_weights: Float32Array,
    ) -> Sequence[Forecast]:
        """Return the mean row of this layer's experts; of several tokens, of each, then of any."""
        forecasts = []
        for later in self.order.after(layer_idx):
            each = self._tables[layer_idx, later][expert_ids].mean(axis=1)  # (T, E)
            chances = each[0] if len(each) == 1 else 1.0 - np.prod(1.0 - each, axis=0)
            forecasts.append(Forecast(later, chances))
        return forecasts
