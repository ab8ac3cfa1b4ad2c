"""What predictors need of a transformers model beside its routers: norms, shared experts, embeddings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.runtime import skeleton

NORM_NAMES = ("post_attention_layernorm", "ffn_norm", "pre_feedforward_layernorm")
SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp")


def norms_of(model: Any, layers: list[int]) -> dict[int, nn.Module]:
    """Return the norm before the router of each layer.

    Raises:
        CheckpointError: a layer has none by a name that is known.
    """
    norms = {}
    for layer_idx in layers:
        layer = skeleton.decoder_layers(model)[layer_idx]
        found = [getattr(layer, name) for name in NORM_NAMES if hasattr(layer, name)]
        if len(found) != 1:
            raise CheckpointError(
                f"layer {layer_idx} has {len(found)} norms that may stand before its router; choose another "
                "predictor"
            )
        norms[layer_idx] = found[0]
    return norms


def shared_expert_of(model: Any, layer_idx: int) -> Callable[[Tensor], Tensor]:
    """Return the shared expert of a layer as a function of the router's input.

    Raises:
        ConfigError: the layer has none.
    """
    for module in skeleton.decoder_layers(model)[layer_idx].modules():
        for name in SHARED_NAMES:
            shared = getattr(module, name, None)
            if isinstance(shared, nn.Module):
                return partial(_run_shared, shared, getattr(module, "shared_expert_gate", None))
    raise ConfigError(f"predictor='shared_expert_gate': layer {layer_idx} has no shared expert")


def _run_shared(shared: nn.Module, gate: nn.Module | None, router_input: Tensor) -> Tensor:
    output: Tensor = shared(router_input)
    return output if gate is None else torch.sigmoid(gate(router_input)) * output


@torch.no_grad()
def embed(model: Any, token_ids: Tensor) -> Tensor:
    """Return the model's (T, H) embeddings of (T,) token ids."""
    embeddings: Tensor = model.get_input_embeddings()(token_ids)
    return embeddings
