"""GGUF architectures whose layers differ: lfm2moe and gemma4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_offload.storage.gguf import GgufArray
from moe_offload.storage.gguf_architecture import (
    ATTENTION,
    DENSE_FFN,
    QK_NORMS,
    Architecture,
    Config,
    Made,
)
from moe_offload.storage.gguf_metadata import (
    MetadataView,
    decoder_config,
    experts_config,
    float_tensor,
    rope_parameters,
)

_LINEAR, _FULL = "linear_attention", "full_attention"


def _lfm2moe(view: MetadataView) -> dict[str, Any]:
    """Short convolutions where a layer has no key-value heads; scores are sigmoids with a correction."""
    config = decoder_config(view)
    counts = view.counts("attention.head_count_kv", config["num_hidden_layers"])
    head_dim = view.maybe("attention.key_length") or config["hidden_size"] // config["num_attention_heads"]
    if (gating := view.maybe("expert_gating_func", low=0)) not in (None, 2):
        raise view.fail("expert_gating_func", f"is {gating}; lfm2moe scores with sigmoids (2)")
    view.maybe("attention.value_length"), view.maybe("rope.dimension_count")
    return (
        config
        | experts_config(view)
        | {
            "model_type": "lfm2_moe",
            "architectures": ["Lfm2MoeForCausalLM"],
            "num_key_value_heads": max(counts),
            "head_dim": head_dim,
            "layer_types": [_FULL if count else "conv" for count in counts],
            "intermediate_size": view.count("feed_forward_length"),
            "moe_intermediate_size": view.count("expert_feed_forward_length"),
            "num_dense_layers": view.maybe("leading_dense_block_count", low=0) or 0,
            "conv_L_cache": view.count("shortconv.l_cache"),
            "conv_bias": False,
            "norm_eps": view.number("attention.layer_norm_rms_epsilon"),
            "rope_parameters": rope_parameters(view, head_dim),
            "use_expert_bias": True,
            "norm_topk_prob": True,
            "routed_scaling_factor": view.number("expert_weights_scale", 1.0),
        }
    )


def _lfm2_leaves(config: Config, layer_idx: int, is_moe: bool) -> list[str]:
    mixer = ["shortconv.in_proj.weight", "shortconv.out_proj.weight"]
    if config["layer_types"][layer_idx] == _FULL:
        mixer = [*ATTENTION[1:], *QK_NORMS]
    ffn = ["ffn_gate_inp.weight", "exp_probs_b.bias"] if is_moe else [*DENSE_FFN]
    return ["attn_norm.weight", *mixer, "ffn_norm.weight", *ffn]


def _lfm2_made(config: Config, layer_idx: int, is_moe: bool) -> Sequence[Made]:
    if config["layer_types"][layer_idx] == _FULL:
        return ()
    return [Made("conv.conv.weight", "H1C", "as_is", (("shortconv.conv.weight", "HC"),))]


def _gemma4(view: MetadataView) -> dict[str, Any]:
    """Windows in most layers; full attention has larger heads, and turns only a part of them."""
    config = decoder_config(view)
    if view.maybe("embedding_length_per_layer_input", low=0):
        raise view.fail("embedding_length_per_layer_input", "is set: embeddings for each layer are not read")
    softcap = view.key("final_logit_softcapping")
    return (
        config
        | experts_config(view)
        | _gemma4_attention(view, config["num_hidden_layers"])
        | {
            "model_type": "gemma4_text",
            "architectures": ["Gemma4ForCausalLM"],
            "enable_moe_block": True,
            "top_k_experts": view.count("expert_used_count"),
            "moe_intermediate_size": view.count("expert_feed_forward_length"),
            "intermediate_size": view.count("feed_forward_length"),
            "num_kv_shared_layers": view.maybe("attention.shared_kv_layers", low=0) or 0,
            "hidden_size_per_layer_input": 0,
            "use_double_wide_mlp": False,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": view.number("attention.layer_norm_rms_epsilon"),
            "final_logit_softcapping": view.number("final_logit_softcapping")
            if softcap in view.config
            else None,
        }
    )


def _gemma4_attention(view: MetadataView, layers: int) -> dict[str, Any]:
    """Heads, windows and rotary positions: of either kind of layer its own."""
    windowed = _window_pattern(view, layers)
    counts = view.counts("attention.head_count_kv", layers)
    wide, narrow = view.count("attention.key_length"), view.count("attention.key_length_swa")
    for name in ("attention.value_length", "attention.value_length_swa", "rope.dimension_count",
                 "rope.dimension_count_swa"):  # fmt: skip
        view.maybe(name)
    full_heads = {count for count, window in zip(counts, windowed, strict=True) if not window}
    window_heads = {count for count, window in zip(counts, windowed, strict=True) if window}
    if len(full_heads) > 1 or len(window_heads) != 1:
        raise view.fail("attention.head_count_kv", f"differs among layers of a kind: {counts}")
    shares_keys = not all(
        view.has(f"blk.{i}.attn_v.weight") for i, window in enumerate(windowed) if not window
    )
    return {
        "num_key_value_heads": window_heads.pop(),
        "num_global_key_value_heads": full_heads.pop() if full_heads else None,
        "head_dim": narrow,
        "global_head_dim": wide,
        "attention_k_eq_v": shares_keys,
        "layer_types": ["sliding_attention" if window else _FULL for window in windowed],
        "sliding_window": view.count("attention.sliding_window"),
        "rope_parameters": {
            _FULL: {
                "rope_type": "proportional",
                "rope_theta": view.number("rope.freq_base"),
                "partial_rotary_factor": _turned_share(view, wide),
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": view.number("rope.freq_base_swa", 10000.0),
            },
        },
    }


def _window_pattern(view: MetadataView, layers: int) -> list[bool]:
    name = "attention.sliding_window_pattern"
    value = view.config.get(view.key(name))
    pattern = view.header.array(view.key(name), bool) if isinstance(value, GgufArray) else None
    if pattern is None or len(pattern) != layers:
        raise view.fail(name, f"must say for each of {layers} layers whether it has a window")
    return pattern


def _turned_share(view: MetadataView, head_dim: int) -> float:
    """Of the wide heads only the first frequencies turn: the others' divisors are beyond all measure."""
    if not view.has("rope_freqs.weight"):
        return 1.0
    divisors = float_tensor(view, "rope_freqs.weight", head_dim // 2)
    return sum(divisor == 1.0 for divisor in divisors) / len(divisors)


def _gemma4_leaves(config: Config, layer_idx: int, is_moe: bool) -> list[str]:
    has_values = config["layer_types"][layer_idx] != _FULL or not config["attention_k_eq_v"]
    attention = [leaf for leaf in ATTENTION if has_values or leaf != "attn_v.weight"]
    if layer_idx >= config["num_hidden_layers"] - config["num_kv_shared_layers"]:
        attention = [leaf for leaf in attention if leaf not in ("attn_k.weight", "attn_v.weight")]
    return [
        *attention, *QK_NORMS, "post_attention_norm.weight", "ffn_norm.weight", *DENSE_FFN,
        "post_ffw_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp.scale", "ffn_down_exps.scale",
        "pre_ffw_norm_2.weight", "post_ffw_norm_1.weight", "post_ffw_norm_2.weight",
        "layer_output_scale.weight",
    ]  # fmt: skip


def _gemma4_layer_sizes(config: Config, layer_idx: int) -> dict[str, int]:
    if config["layer_types"][layer_idx] != _FULL:
        return {}
    head_dim = config["global_head_dim"]
    kv_heads = config["num_global_key_value_heads"] or config["num_key_value_heads"]
    return {"D": head_dim, "Q": config["num_attention_heads"] * head_dim, "K": kv_heads * head_dim}


LFM2MOE = Architecture(
    _lfm2moe,
    _lfm2_leaves,
    {
        "token_embd_norm.weight": ("model.embedding_norm.weight", "H"),
        "attn_norm.weight": ("operator_norm.weight", "H"),
        "attn_output.weight": ("self_attn.out_proj.weight", "HQ"),
        "attn_q_norm.weight": ("self_attn.q_layernorm.weight", "D"),
        "attn_k_norm.weight": ("self_attn.k_layernorm.weight", "D"),
        "shortconv.in_proj.weight": ("conv.in_proj.weight", "TH"),
        "shortconv.out_proj.weight": ("conv.out_proj.weight", "HH"),
        "ffn_norm.weight": ("ffn_norm.weight", "H"),
        "ffn_gate.weight": ("feed_forward.w1.weight", "FH"),
        "ffn_up.weight": ("feed_forward.w3.weight", "FH"),
        "ffn_down.weight": ("feed_forward.w2.weight", "HF"),
        "ffn_gate_inp.weight": ("feed_forward.gate.weight", "EH"),
        "exp_probs_b.bias": ("feed_forward.expert_bias", "E"),
    },
    sizes=lambda config: {"T": 3 * config["hidden_size"], "C": config["conv_L_cache"]},
    made=_lfm2_made,
    model_leaves=lambda config: ["token_embd.weight", "token_embd_norm.weight"],
)
GEMMA4 = Architecture(
    _gemma4,
    _gemma4_leaves,
    {
        "ffn_norm.weight": ("pre_feedforward_layernorm.weight", "H"),
        "post_ffw_norm.weight": ("post_feedforward_layernorm.weight", "H"),
        "ffn_gate_inp.weight": ("router.proj.weight", "EH"),
        "ffn_gate_inp.scale": ("router.scale", "H"),
        "ffn_down_exps.scale": ("router.per_expert_scale", "E"),
        "pre_ffw_norm_2.weight": ("pre_feedforward_layernorm_2.weight", "H"),
        "post_ffw_norm_1.weight": ("post_feedforward_layernorm_1.weight", "H"),
        "post_ffw_norm_2.weight": ("post_feedforward_layernorm_2.weight", "H"),
        "layer_output_scale.weight": ("layer_scalar", "1"),
    },
    layer_sizes=_gemma4_layer_sizes,
)
