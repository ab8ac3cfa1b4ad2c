"""GGUF architectures of one plain decoder each: llama (Mixtral), granitemoe, olmoe, gpt-oss, phimoe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_offload.storage.gguf_architecture import (
    ATTENTION,
    QK_NORMS,
    QKV_BIASES,
    Architecture,
    Config,
    Made,
    llama_leaves,
)
from moe_offload.storage.gguf_metadata import (
    MetadataView,
    attention_config,
    experts_config,
    float_tensor,
    original_context,
)

# Phi-3.5-MoE, the only published model of its architecture, scales its rotary embedding by this; no key
# holds it (rope.scaling.attn_factor is llama.cpp's own estimate, 1.19).
PHI_35_MOE_MSCALE = 1.243163121016122


_SOFTMAX_OF_CHOSEN = 3  # a value of expert_gating_func


def _permuted_qk(config: Config, layer_idx: int, is_moe: bool) -> Sequence[Made]:
    """llama.cpp turns neighbours, transformers halves: Q and K rows are in the other order."""
    return [
        _unpermuted("q", "QH", config["num_attention_heads"]),
        _unpermuted("k", "KH", config["num_key_value_heads"]),
    ] + [
        _unpermuted(f"{kind}", symbols, heads, "bias")
        for kind, symbols, heads in (
            ("q", "Q", config["num_attention_heads"]),
            ("k", "K", config["num_key_value_heads"]),
        )
        if config.get("attention_bias")
    ]


def _unpermuted(kind: str, symbols: str, heads: int, what: str = "weight") -> Made:
    part = (f"attn_{kind}.{what}", symbols)
    return Made(f"self_attn.{kind}_proj.{what}", symbols, "unpermute", (part,), (heads,))


def _leaves_without_qk(config: Config, layer_idx: int, is_moe: bool) -> list[str]:
    permuted = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")
    return [leaf for leaf in llama_leaves(config, layer_idx, is_moe) if leaf not in permuted]


def _llama(view: MetadataView) -> dict[str, Any]:
    """Mixtral when the file has experts, else a dense Llama (or Mistral, when it has a window)."""
    config = attention_config(view) | {"intermediate_size": view.count("feed_forward_length")}
    window = view.window()
    num_experts = view.maybe("expert_count", low=0)
    used = view.maybe("expert_used_count", low=0)
    if num_experts:
        return config | {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": num_experts,
            "num_experts_per_tok": used or view.count("expert_used_count", high=num_experts),
            "sliding_window": window,
        }
    if window is not None:
        return config | {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": window,
        }
    return config | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": view.has("blk.0.attn_q.bias"),
    }


def _granitemoe(view: MetadataView) -> dict[str, Any]:
    """Four scales; a shared expert makes it GraniteMoeShared."""
    shared = view.maybe("expert_shared_feed_forward_length", low=0)
    width = view.count("feed_forward_length")
    family = "GraniteMoeShared" if shared else "GraniteMoe"
    return (
        attention_config(view)
        | experts_config(view, "num_local_experts")
        | {
            "model_type": family.lower(),
            "architectures": [f"{family}ForCausalLM"],
            "intermediate_size": view.maybe("expert_feed_forward_length") or width,
            "embedding_multiplier": view.number("embedding_scale"),
            "residual_multiplier": view.number("residual_scale"),
            "attention_multiplier": view.number("attention.scale"),
            "logits_scaling": view.number("logit_scale"),
            "attention_bias": view.has("blk.0.attn_q.bias"),
        }
        | ({"shared_intermediate_size": shared} if shared else {})
    )


def _granite_made(config: Config, layer_idx: int, is_moe: bool) -> Sequence[Made]:
    made = list(_permuted_qk(config, layer_idx, is_moe))
    if config.get("shared_intermediate_size"):
        parts = (("ffn_gate_shexp.weight", "SH"), ("ffn_up_shexp.weight", "SH"))
        made.append(Made("shared_mlp.input_linear.weight", "TH", "concat_rows", parts))
    return made


def _granite_leaves(config: Config, layer_idx: int, is_moe: bool) -> list[str]:
    shared = ["ffn_down_shexp.weight"] if config.get("shared_intermediate_size") else []
    return [*_leaves_without_qk(config, layer_idx, is_moe), *shared]


def _granite_sizes(config: Config) -> dict[str, int]:
    shared = config.get("shared_intermediate_size") or 0
    return {"S": shared, "T": 2 * shared}


def _olmoe(view: MetadataView) -> dict[str, Any]:
    width = view.count("feed_forward_length")
    clip = view.key("attention.clamp_kqv")
    return (
        attention_config(view)
        | experts_config(view)
        | {
            "model_type": "olmoe",
            "architectures": ["OlmoeForCausalLM"],
            "intermediate_size": view.maybe("expert_feed_forward_length") or width,
            "norm_topk_prob": False,  # the architecture's meaning in llama.cpp; no key says so
            "attention_bias": False,
            "clip_qkv": view.number("attention.clamp_kqv") if clip in view.config else None,
        }
    )


def _gpt_oss(view: MetadataView) -> dict[str, Any]:
    """Windows in every second layer, from the first on; YaRN whose limits are not rounded."""
    config = attention_config(view) | experts_config(view, "num_local_experts")
    view.maybe("feed_forward_length")  # the experts' own, or nothing that is used
    if view.maybe("expert_gating_func", low=0) not in (None, 0, _SOFTMAX_OF_CHOSEN):
        raise view.fail("expert_gating_func", "must be 3: gpt-oss takes the softmax of the chosen experts")
    rope = config["rope_parameters"]
    return config | {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "intermediate_size": view.count("expert_feed_forward_length"),
        "sliding_window": view.count("attention.sliding_window"),
        "layer_types": [
            "full_attention" if layer % 2 else "sliding_attention"
            for layer in range(config["num_hidden_layers"])
        ],
        "attention_bias": True,
        "rope_parameters": rope | ({"truncate": False} if rope["rope_type"] == "yarn" else {}),
    }


def _gpt_oss_leaves(config: Config, layer_idx: int, is_moe: bool) -> list[str]:
    return [
        *ATTENTION,
        *QKV_BIASES,
        "attn_output.bias",
        "attn_sinks.weight",
        "post_attention_norm.weight",
        "ffn_gate_inp.weight",
        "ffn_gate_inp.bias",
        "ffn_down_exps.bias",
    ]


def _gpt_oss_made(config: Config, layer_idx: int, is_moe: bool) -> Sequence[Made]:
    """The biases of gate and up side by side, in the order of the rows that the kernels see."""
    parts = (("ffn_gate_exps.bias", "EI"), ("ffn_up_exps.bias", "EI"))
    return [Made("mlp.experts.gate_up_proj_bias", "EJ", "concat_columns", parts)]


def _phimoe(view: MetadataView) -> dict[str, Any]:
    """transformers' Phi-3.5-MoE: LayerNorm and sparsemixer, where llama.cpp has RMSNorm and softmax."""
    config = attention_config(view) | experts_config(view, "num_local_experts")
    view.maybe("expert_feed_forward_length")
    config["rope_parameters"] |= _phi_rope(view, config["head_dim"])
    return config | {
        "model_type": "phimoe",
        "architectures": ["PhimoeForCausalLM"],
        "intermediate_size": view.count("feed_forward_length"),
        "sliding_window": view.window(),
        "attention_bias": view.has("blk.0.attn_q.bias"),
        "lm_head_bias": view.has("output.bias"),
        "input_jitter_noise": 0.0,
        "router_jitter_noise": 0.01,  # the threshold of sparsemixer, a constant of the architecture
    }


def _phi_rope(view: MetadataView, head_dim: int) -> dict[str, Any]:
    original = original_context(view)
    view.number("rope.scaling.attn_factor", 1.0)
    if not view.has("rope_factors_long.weight"):
        return {}
    return {
        "rope_type": "longrope",
        "long_factor": float_tensor(view, "rope_factors_long.weight", head_dim // 2),
        "short_factor": float_tensor(view, "rope_factors_short.weight", head_dim // 2),
        "long_mscale": PHI_35_MOE_MSCALE,
        "short_mscale": PHI_35_MOE_MSCALE,
        "original_max_position_embeddings": original,
    }


def _phimoe_leaves(config: Config, layer_idx: int, is_moe: bool) -> list[str]:
    return [*llama_leaves(config, layer_idx, is_moe), "attn_norm.bias", "ffn_norm.bias"]


def _phimoe_model_leaves(config: Config) -> list[str]:
    leaves = ["token_embd.weight", "output_norm.weight", "output_norm.bias"]
    return [*leaves, "output.bias"] if config["lm_head_bias"] else leaves


LLAMA = Architecture(_llama, _leaves_without_qk, made=_permuted_qk)
GRANITEMOE = Architecture(
    _granitemoe,
    _granite_leaves,
    {
        "ffn_gate_inp.weight": ("block_sparse_moe.router.weight", "EH"),
        "ffn_down_shexp.weight": ("shared_mlp.output_linear.weight", "HS"),
    },
    sizes=_granite_sizes,
    made=_granite_made,
)
OLMOE = Architecture(
    _olmoe,
    lambda config, layer_idx, is_moe: [*llama_leaves(config, layer_idx, is_moe), *QK_NORMS],
    {
        "attn_q_norm.weight": ("self_attn.q_norm.weight", "Q"),
        "attn_k_norm.weight": ("self_attn.k_norm.weight", "K"),
    },
)
GPT_OSS = Architecture(
    _gpt_oss,
    _gpt_oss_leaves,
    {
        "attn_sinks.weight": ("self_attn.sinks", "A"),
        "ffn_gate_inp.weight": ("mlp.router.weight", "EH"),
        "ffn_gate_inp.bias": ("mlp.router.bias", "E"),
        "ffn_down_exps.bias": ("mlp.experts.down_proj_bias", "EH"),
    },
    sizes=lambda config: {"A": config["num_attention_heads"], "J": 2 * config["intermediate_size"]},
    made=_gpt_oss_made,
)
PHIMOE = Architecture(
    _phimoe,
    _phimoe_leaves,
    {"ffn_gate_inp.weight": ("mlp.router.weight", "EH")},
    model_leaves=_phimoe_model_leaves,
    not_loaded=frozenset({"rope_factors_long.weight", "rope_factors_short.weight"}),
)
