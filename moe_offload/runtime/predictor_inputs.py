"""What predictors need of a transformers model beside its routers: norms, shared experts, embeddings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.runtime import skeleton

NORM_NAMES = ("post_attention_layernorm", "ffn_norm", "pre_feedforward_layernorm")
SAMPLED_TOKENS = 256  # of the vocabulary, for the size of its embeddings
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


@torch.no_grad()
def first_gate_of(model: Any, router: nn.Module) -> NDArray[np.float32] | None:
    """Return (E, H) float32, from a token's embedding to layer 0's scores, as if it attended to itself only.

    What the first attention adds is most of the residual there. Attending to itself, a token adds its own
    value projected back: a linear function but for a norm, for which the vocabulary's mean stands in. The
    scores' size is arbitrary. None where layer 0 has not the parts for it as plain matrices.
    """
    layer = skeleton.decoder_layers(model)[0]
    attention: Any = getattr(layer, "self_attn", None)
    value, output = getattr(attention, "v_proj", None), getattr(attention, "o_proj", None)
    before, after = (getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm"))
    head_dim = getattr(attention, "head_dim", None)
    if type(value) is not nn.Linear or type(output) is not nn.Linear or not isinstance(head_dim, int):
        return None
    if not all(hasattr(norm, "variance_epsilon") for norm in (before, after)):
        return None
    if output.in_features % value.out_features or value.out_features % head_dim:
        return None
    if {value.weight.device.type, output.weight.device.type} != {"cpu"}:
        return None
    gate = router.get_parameter("weight").float() * cast(Any, after).weight.float()
    heads = (value.out_features // head_dim, -1, head_dim)  # a value serves several heads
    by_value = (gate @ output.weight.float()).unflatten(1, heads).sum(2).flatten(1)
    own_value = by_value @ value.weight.float() * cast(Any, before).weight.float()
    some_ids = torch.linspace(0, model.config.get_text_config().vocab_size - 1, SAMPLED_TOKENS).long()
    mean_size = embed(model, some_ids).float().square().mean(-1).sqrt().mean()
    table: NDArray[np.float32] = (gate + own_value / mean_size).contiguous().numpy()
    return table
