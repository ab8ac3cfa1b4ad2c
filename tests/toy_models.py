"""Tiny random models of each family, saved as Hugging Face folders: the outside oracle's input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)
from transformers.cache_utils import DynamicCache
from transformers.integrations.moe import ExpertsInterface
from transformers.models.auto import AutoModelForCausalLM

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def _config(family: str) -> Any:
    if family == "qwen3_moe":
        return Qwen3MoeConfig(
            **COMMON, num_experts=8, moe_intermediate_size=24, intermediate_size=40, head_dim=16
        )
    if family == "qwen3_moe_with_dense_layers":
        return Qwen3MoeConfig(
            **{**COMMON, "num_hidden_layers": 4, "tie_word_embeddings": True},
            num_experts=8, moe_intermediate_size=24, intermediate_size=40, head_dim=16,
            mlp_only_layers=[0], decoder_sparse_step=2, norm_topk_prob=True,
        )  # fmt: skip
    if family == "mixtral":
        return MixtralConfig(**COMMON, num_local_experts=6, intermediate_size=48)
    if family == "olmoe":
        return OlmoeConfig(**COMMON, num_experts=8, intermediate_size=24)
    if family == "deepseek_v2":
        return DeepseekV2Config(
            **{**COMMON, "num_key_value_heads": 4},
            n_routed_experts=8, n_shared_experts=1, moe_intermediate_size=24, intermediate_size=40,
            first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8,
            qk_nope_head_dim=12, v_head_dim=12, topk_method="greedy", routed_scaling_factor=1.0,
        )  # fmt: skip
    if family == "gpt_oss":
        return GptOssConfig(
            **COMMON, num_local_experts=6, intermediate_size=40, head_dim=16, sliding_window=8
        )
    raise ValueError(family)


FAMILIES = ("qwen3_moe", "qwen3_moe_with_dense_layers", "mixtral", "olmoe", "deepseek_v2", "gpt_oss")


def save_toy_model(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **overrides: Any
) -> Path:
    """Make a random model of the family (same weights every time) and save it in ``folder``."""
    torch.manual_seed(20)
    config = _config(family)
    for name, value in overrides.items():
        assert hasattr(config, name), f"{family} has no {name}"
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the default init: biases and routing must matter
            parameter.normal_(0.0, 0.15 if parameter.ndim > 1 else 0.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def model_on_meta(config: Any) -> Any:
    """Transformers' model of a configuration, without memory; its experts compute nothing."""
    ExpertsInterface.register("nothing", lambda experts, hidden, ids, weights: torch.empty_like(hidden))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, experts_implementation="nothing")


def cached_elements(model: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """By layer, what transformers' own cache holds: elements of one token, and of a sequence's state."""
    with torch.device("meta"):
        cache = DynamicCache(config=model.config)
        model(torch.ones(1, 5, dtype=torch.long), use_cache=True, past_key_values=cache)
    tokens, states = [], []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        tokens.append(0 if keys is None else (keys.numel() + values.numel()) // 5)
        held = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        states.append(sum(state.numel() for state in held if state is not None))
    return tuple(tokens), tuple(states)


def experts_by_layer(model: Any) -> dict[int, Any]:
    """Every experts module by its decoder layer."""
    return {
        layer_idx: module
        for layer_idx, layer in enumerate(model.get_decoder().layers)
        for module in layer.modules()
        if hasattr(module, "is_transposed")
    }


def plain_model(folder: Path, **kwargs: Any) -> Any:
    """Load with plain transformers, expert by expert, the oracle."""
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **kwargs).eval()
