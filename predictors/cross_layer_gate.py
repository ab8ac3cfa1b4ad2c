"""Cross-layer gate: ask the next layers' routers now, with this layer's router input (Fate).

The residual stream changes little from one layer to the next, so the next router's answer on this
input names most of the experts that it will choose on its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_offload.storage.expert_format import ExpertKey


class CrossLayerGate:
    """Predict with copies of the model's own routers; the originals are not touched.

    Args:
        routers: by decoder layer index, of every MoE layer: transformers' top-k routers, whose
            forward maps (T, H) to (logits, weights (T, K), expert ids (T, K)). A copy shares the
            weights and skips hooks.
        depth: how many MoE layers ahead.
        num_guesses: experts per token and layer; None is the router's own top_k. More than top_k
            needs a router with the attribute ``top_k``.
    """

    def __init__(
        self, routers: dict[int, nn.Module], *, depth: int = 1, num_guesses: int | None = None
    ) -> None:
        layers = sorted(routers)
        copies = {layer_idx: _with_top_k(routers[layer_idx], num_guesses) for layer_idx in layers}
        self._next: dict[int, list[tuple[int, nn.Module]]] = {
            layer_idx: [(later, copies[later]) for later in layers[position + 1 : position + 1 + depth]]
            for position, layer_idx in enumerate(layers)
        }

    @torch.no_grad()
    def predict(self, layer_idx: int, router_input: Tensor) -> Sequence[ExpertKey]:
        """Return the guesses for the next layers, nearest layer first, then by descending weight.

        Args:
            router_input: (T, H) of layer ``layer_idx``; over its tokens an expert's largest weight counts.
        """
        keys: list[ExpertKey] = []
        for later, router in self._next[layer_idx]:
            _, weights, expert_ids = router.forward(router_input)  # not __call__: hooks are the model's
            keys += [ExpertKey(later, expert_id) for expert_id in _by_weight(weights, expert_ids)]
        return keys


def _with_top_k(router: nn.Module, top_k: int | None) -> nn.Module:
    """Return a copy that shares the router's weights and chooses ``top_k`` experts."""
    wider: Any = copy.copy(router)
    if top_k is not None and hasattr(wider, "top_k"):
        wider.top_k = min(top_k, wider.num_experts)
    assert isinstance(wider, nn.Module)
    return wider


def _by_weight(weights: Tensor, expert_ids: Tensor) -> list[int]:
    """Return the union of (T, K) ids, the largest weight first; ids of weight 0 were masked out."""
    largest: dict[int, float] = {}
    pairs = zip(expert_ids.reshape(-1).tolist(), weights.reshape(-1).tolist(), strict=True)
    for expert_id, weight in pairs:
        if weight > largest.get(expert_id, 0.0):
            largest[expert_id] = weight
    return sorted(largest, key=lambda expert_id: (-largest[expert_id], expert_id))
