"""Lookahead that is no guess: routers that a token's id decides, routers that spoke early, the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_offload.planning.prediction import Forecast, Predictor
from moe_offload.predictors.history import LayerOrder


class TokenLookahead:
    """Hash routing (DeepSeek-V4's first layers): a table from token ids to experts, known at once.

    Layers that route by hidden state are left to ``others``.

    Args:
        tables: by layer, (V, K) expert ids of each token id.
        num_experts: of a layer.
        others: made for every other layer; None: they are not forecast.
    """

    def __init__(
        self, tables: Mapping[int, NDArray[np.int64]], num_experts: int, others: Predictor | None = None
    ) -> None:
        self._tables, self._num_experts, self._others = dict(sorted(tables.items())), num_experts, others

    def new_sequence(self) -> None:
        """Forget what ``others`` keeps."""
        if self._others is not None:
            self._others.new_sequence()

    def begin_step(self, token_ids: NDArray[np.int64] | None) -> Sequence[Forecast]:
        """Return all of the table's layers, with certainty, nearest first."""
        exact = []
        for layer_idx, table in self._tables.items():
            if token_ids is not None:
                exact.append(certain(layer_idx, table[token_ids], self._num_experts))
        rest = () if self._others is None else self._others.begin_step(token_ids)
        return [*exact, *(forecast for forecast in rest if forecast.layer_idx not in self._tables)]

    def observe(
        self, layer_idx: int, expert_ids: NDArray[np.int64], expert_weights: NDArray[np.float32]
    ) -> None:
        """Pass on, but for layers that ``others`` have not been told of."""
        if self._others is not None and layer_idx not in self._tables:
            self._others.observe(layer_idx, expert_ids, expert_weights)

    def predict(
        self,
        layer_idx: int,
        router_input: Any,
        expert_ids: NDArray[np.int64],
        expert_weights: NDArray[np.float32],
    ) -> Sequence[Forecast]:
        """Return what ``others`` say after a layer that no table decides; of the rest they may not know."""
        if self._others is None or layer_idx in self._tables:
            return ()
        rest = self._others.predict(layer_idx, router_input, expert_ids, expert_weights)
        return [forecast for forecast in rest if forecast.layer_idx not in self._tables]


class EarlyRouters:
    """Routers that run before their layer's attention: what they said is certain from then on.

    A forward hook on each router keeps its choice; ``spoken`` hands it over. Where a router runs right before
    its experts, this knows nothing early.

    Args:
        routers: by layer, whose forward returns (logits, weights, expert ids (T, K)).
        num_experts: of a layer.
    """

    def __init__(self, routers: Mapping[int, nn.Module], num_experts: int) -> None:
        self._num_experts = num_experts
        self._spoken: dict[int, NDArray[np.int64]] = {}
        self._hooks = [
            router.register_forward_hook(self._keeper(layer_idx)) for layer_idx, router in routers.items()
        ]

    def spoken(self, layer_idx: int) -> list[Forecast]:
        """Return, once, the choices of layers after ``layer_idx`` whose routers have run already."""
        spoken, self._spoken = sorted(self._spoken.items()), {}
        early = [item for item in spoken if item[0] > layer_idx]
        return [certain(later, expert_ids, self._num_experts) for later, expert_ids in early]

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _keeper(self, layer_idx: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
            self._spoken[layer_idx] = output[2].detach().numpy()

        return keep


class Oracle:
    """Knows a recorded run: the bound of every predictor.

    Args:
        layers: decoder indices of the MoE layers.
        experts: (T, L, K) what each token of the run chooses; steps take them in order.
        num_experts: of a layer.
        depth: how many MoE layers ahead.
    """

    def __init__(
        self, layers: Sequence[int], experts: NDArray[Any], num_experts: int, *, depth: int = 1
    ) -> None:
        self.order = LayerOrder(layers, depth)
        self._experts, self._num_experts = experts, num_experts
        self._start = self._end = 0

    def new_sequence(self) -> None:
        """The run goes on."""

    def begin_step(self, token_ids: NDArray[np.int64] | None) -> Sequence[Forecast]:
        """Move on to the next tokens; return the first layers' choices.

        Raises:
            ValueError: without ``token_ids`` the oracle does not know how long a step is.
        """
        if token_ids is None:
            raise ValueError("the oracle counts tokens: begin_step needs their ids")
        self._start, self._end = self._end, self._end + len(token_ids)
        return [self._truth(layer_idx) for layer_idx in self.order.layers[: self.order.depth]]

    def observe(
        self, layer_idx: int, expert_ids: NDArray[np.int64], expert_weights: NDArray[np.float32]
    ) -> None:
        """Nothing to learn."""

    def predict(
        self,
        layer_idx: int,
        router_input: Any,
        expert_ids: NDArray[np.int64],
        expert_weights: NDArray[np.float32],
    ) -> Sequence[Forecast]:
        """Return what the next layers will choose."""
        return [self._truth(later) for later in self.order.after(layer_idx)]

    def _truth(self, layer_idx: int) -> Forecast:
        chosen = self._experts[self._start : self._end, self.order.row_of[layer_idx]]
        return certain(layer_idx, chosen, self._num_experts)


def certain(layer_idx: int, expert_ids: NDArray[Any], num_experts: int) -> Forecast:
    """Return 1 for every expert of (T, K) ``expert_ids``, 0 for the others."""
    chances = np.zeros(num_experts, np.float32)
    chances[expert_ids.reshape(-1)] = 1.0
    return Forecast(layer_idx, chances)


def token_tables(routers: Mapping[int, nn.Module]) -> dict[int, NDArray[np.int64]]:
    """Return the (V, K) tables of the routers that choose by token id."""
    tables = {layer_idx: getattr(router, "tid2eid", None) for layer_idx, router in routers.items()}
    return {i: table.numpy() for i, table in tables.items() if isinstance(table, Tensor)}
