"""What a predictor answers, and the protocol that all of them follow.

A forecast's numbers are probabilities, so that one list ranks experts of several layers: an expert
of the layer after next at 0.9 is a better read than one of the next layer at 0.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_offload.storage.expert_format import ExpertKey


class Forecast(NamedTuple):
    """How probably this step will use each expert of a layer that has not routed yet.

    Attributes:
        layer_idx: decoder layer.
        probabilities: (E,) float32, of use by any of the step's tokens; over a calibrated forecast of
            one token they sum to about top_k.
    """

    layer_idx: int
    probabilities: NDArray[np.float32]


class Predictor(Protocol):
    """Guess which experts the next MoE layers will choose, before their routers have spoken.

    Order of calls in a forward pass: ``begin_step``; then for every MoE layer ``observe`` and, where
    somebody wants to know, ``predict``. Experts of a token are in no order. Arrays are the caller's:
    copy what is kept.
    """

    def new_sequence(self) -> None:
        """Forget the previous token: what follows is another text."""

    def begin_step(self, token_ids: NDArray[np.int64] | None) -> Sequence[Forecast]:
        """Start a forward pass; return what its tokens alone say about the first layers.

        Args:
            token_ids: (T,); None where the caller gave embeddings.
        """

    def observe(
        self, layer_idx: int, expert_ids: NDArray[np.int64], expert_weights: NDArray[np.float32]
    ) -> None:
        """Learn what a layer's router chose; also called for prompts and where nobody asks for a forecast.

        Args:
            expert_ids: (T, K).
            expert_weights: (T, K).
        """

    def predict(
        self,
        layer_idx: int,
        router_input: Any,
        expert_ids: NDArray[np.int64],
        expert_weights: NDArray[np.float32],
    ) -> Sequence[Forecast]:
        """Return forecasts for the next MoE layers, nearest first; empty after the last layer.

        Args:
            layer_idx: the layer that has just routed.
            router_input: (T, H) float tensor, what its router saw.
            expert_ids: (T, K) its choice.
            expert_weights: (T, K).
        """


class StatelessPredictor:
    """Base of predictors that keep nothing from step to step."""

    def new_sequence(self) -> None:
        """Nothing to forget."""

    def begin_step(self, token_ids: NDArray[np.int64] | None) -> Sequence[Forecast]:
        """Nothing is known before a router has spoken."""
        return ()

    def observe(
        self, layer_idx: int, expert_ids: NDArray[np.int64], expert_weights: NDArray[np.float32]
    ) -> None:
        """Nothing to keep."""


def used_by_any(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """(T, E) probabilities of use by each token -> (E,) of use by any, as if tokens were independent."""
    if len(probabilities) == 1:
        one: NDArray[np.float32] = probabilities[0]
        return one
    any_token: NDArray[np.float32] = 1.0 - np.prod(1.0 - probabilities, axis=0)
    return any_token


def expected_keys(forecasts: Iterable[Forecast]) -> list[ExpertKey]:
    """Return, layer after layer, as many of the most probable experts as are expected to be used."""
    keys: list[ExpertKey] = []
    for layer_idx, probabilities in forecasts:
        count = round(float(probabilities.sum()))
        best = np.argsort(-probabilities, kind="stable")[:count]
        keys += [ExpertKey(layer_idx, expert_id) for expert_id in best.tolist()]
    return keys
