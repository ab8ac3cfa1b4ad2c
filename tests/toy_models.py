"""Tiny random models of each family, saved as Hugging Face folders: the outside oracle's input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING
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


_SHARED_EXPERTS = {"moe_intermediate_size": 24, "intermediate_size": 40}
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12, "v_head_dim": 12,
}  # fmt: skip
_DELTA_NET = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_GRANITE = {
    "num_local_experts": 6, "intermediate_size": 40, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
    "residual_multiplier": 0.5, "attention_multiplier": 0.2,
}  # fmt: skip

# By name: transformers' model_type, and what differs from COMMON.
TOY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {"num_experts": 8, **_SHARED_EXPERTS, "head_dim": 16}),
    "qwen3_moe_with_dense_layers": ("qwen3_moe", {
        "num_hidden_layers": 4, "tie_word_embeddings": True, "num_experts": 8, **_SHARED_EXPERTS,
        "head_dim": 16, "mlp_only_layers": [0], "decoder_sparse_step": 2, "norm_topk_prob": True,
    }),
    "mixtral": ("mixtral", {"num_local_experts": 6, "intermediate_size": 48}),
    "olmoe": ("olmoe", {"num_experts": 8, "intermediate_size": 24}),
    "deepseek_v2": ("deepseek_v2", {
        **_LATENT, **_SHARED_EXPERTS, "q_lora_rank": None, "n_routed_experts": 8, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0,
    }),
    "gpt_oss": ("gpt_oss", {
        "num_local_experts": 6, "intermediate_size": 40, "head_dim": 16, "sliding_window": 8,
    }),
    "qwen2_moe": ("qwen2_moe", {
        "num_experts": 8, **_SHARED_EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0],
    }),
    "deepseek_v3": ("deepseek_v3", {
        **_LATENT, **_SHARED_EXPERTS, "n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 2,
        "topk_group": 1, "num_nextn_predict_layers": 0,
    }),
    "granitemoe": ("granitemoe", _GRANITE),
    "granitemoeshared": ("granitemoeshared", {**_GRANITE, "shared_intermediate_size": 24}),
    "granitemoehybrid": ("granitemoehybrid", {
        **_GRANITE, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16,
    }),
    "phimoe": ("phimoe", {"num_local_experts": 6, "intermediate_size": 40, "lm_head_bias": True}),
    "glm4_moe": ("glm4_moe", {
        **_SHARED_EXPERTS, "n_routed_experts": 8, "first_k_dense_replace": 1, "use_qk_norm": True,
        "num_nextn_predict_layers": 0,
    }),
    "glm4_moe_lite": ("glm4_moe_lite", {**_LATENT, **_SHARED_EXPERTS, "n_routed_experts": 8}),
    "qwen3_next": ("qwen3_next", {
        **_DELTA_NET, **_SHARED_EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 24,
        "head_dim": 16,
    }),
    "qwen3_5_moe": ("qwen3_5_moe_text", {
        **_DELTA_NET, "moe_intermediate_size": 24, "num_experts": 8, "shared_expert_intermediate_size": 24,
        "head_dim": 16,
    }),
    "gemma4": ("gemma4_text", {
        "num_experts": 8, "top_k_experts": 2, "enable_moe_block": True, **_SHARED_EXPERTS, "head_dim": 16,
        "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0, "tie_word_embeddings": True,
    }),
    "lfm2_moe": ("lfm2_moe", {
        "num_experts": 8, **_SHARED_EXPERTS, "num_dense_layers": 1, "tie_word_embeddings": True,
        "layer_types": ["conv", "full_attention", "conv"],
    }),
    "ernie4_5_moe": ("ernie4_5_moe", {
        "moe_num_experts": 8, "moe_k": 2, **_SHARED_EXPERTS, "moe_layer_start_index": 1,
        "moe_layer_end_index": 2, "tie_word_embeddings": True,
    }),
    "minimax_m2": ("minimax_m2", {"num_local_experts": 8, "intermediate_size": 40, "head_dim": 16}),
}  # fmt: skip


def _config(family: str) -> Any:
    model_type, values = TOY_CONFIGS[family]
    return CONFIG_MAPPING[model_type](**{**COMMON, **values})


# Those that all tests of storage and runtime go through, and those that only test_families.py does.
FAMILIES = ("qwen3_moe", "qwen3_moe_with_dense_layers", "mixtral", "olmoe", "deepseek_v2", "gpt_oss")
OTHER_FAMILIES = tuple(name for name in TOY_CONFIGS if name not in FAMILIES)


def save_toy_model(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **overrides: Any
) -> Path:
    """Make a random model of the family (same weights every time) and save it in ``folder``."""
    config = _config(family)
    for name, value in overrides.items():
        assert hasattr(config, name), f"{family} has no {name}"
        setattr(config, name, value)
    return save_model(config, folder, dtype, shard_size)


def save_model(
    config: Any, folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "5GB"
) -> Path:
    """Make a random model of a configuration (same weights every time) and save it in ``folder``."""
    torch.manual_seed(20)
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


def decode(model: Any, ids: torch.Tensor, num_prompt_tokens: int, cache: Any = None) -> torch.Tensor:
    """The logits of every token after the prompt, one forward each."""
    logits = []
    with torch.no_grad():
        for start, end in [
            (0, num_prompt_tokens),
            *((i, i + 1) for i in range(num_prompt_tokens, len(ids[0]))),
        ]:
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0, -1])
    return torch.stack(logits)
