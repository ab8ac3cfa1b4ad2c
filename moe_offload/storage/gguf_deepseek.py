"""GGUF architectures with DeepSeek's routing: deepseek2 (V2, V3, GLM-4.7-Flash, Kimi-K2) and glm4moe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_offload.storage.gguf_architecture import (
    ATTENTION,
    DENSE_FFN,
    QK_NORMS,
    QKV_BIASES,
    SHARED_EXPERT,
    Architecture,
    Config,
    Made,
)
from moe_offload.storage.gguf_metadata import (
    MetadataView,
    attention_config,
    decoder_config,
    experts_config,
    rope_parameters,
)

_SOFTMAX, _SIGMOID = 1, 2  # values of expert_gating_func

# (experts, gating) of models published in groups (groups, groups used): files before 2026 do not say it.
_PUBLISHED_GROUPS = {(160, _SOFTMAX): (8, 3), (256, _SIGMOID): (8, 4)}


def _routing(view: MetadataView, gating: int) -> dict[str, Any]:
    """Return what chooses experts, under DeepSeek's names."""
    experts = experts_config(view, "n_routed_experts")
    published = _PUBLISHED_GROUPS.get((experts["n_routed_experts"], gating), (1, 1))
    groups = view.maybe("expert_group_count", low=0) or published[0]
    used = view.maybe("expert_group_used_count", low=0) or (published[1] if groups == published[0] else 1)
    return {
        **experts,
        "moe_intermediate_size": view.count("expert_feed_forward_length"),
        "intermediate_size": view.count("feed_forward_length"),
        "n_shared_experts": view.count("expert_shared_count"),
        "first_k_dense_replace": view.maybe("leading_dense_block_count", low=0) or 0,
        "n_group": groups,
        "topk_group": used,
        "norm_topk_prob": view.switch("expert_weights_norm", False),
        "routed_scaling_factor": view.number("expert_weights_scale", 1.0),
    }


def _gating(view: MetadataView, default: int) -> int:
    gating = view.maybe("expert_gating_func", low=0) or default
    if gating not in (_SOFTMAX, _SIGMOID):
        raise view.fail("expert_gating_func", f"is {gating}; 1 (softmax) and 2 (sigmoid) are known")
    return gating


def _deepseek2(view: MetadataView) -> dict[str, Any]:
    """V3 scores with sigmoids and a correction, V2 with softmax; both attend through a latent."""
    corrected = view.has(f"blk.{view.layers() - 1}.exp_probs_b.bias")
    gating = _gating(view, _SIGMOID if corrected else _SOFTMAX)
    config = decoder_config(view) | _latent_attention(view) | _routing(view, gating)
    if gating == _SIGMOID:
        return config | {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    if config["norm_topk_prob"]:
        raise view.fail(
            "expert_weights_norm", "is set with softmax gating, which transformers' DeepSeek-V2 has not"
        )
    method = "group_limited_greedy" if config["n_group"] > 1 else "greedy"
    return config | {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "topk_method": method,
    }


def _latent_attention(view: MetadataView) -> dict[str, Any]:
    """Sizes of MLA. Files that are ready for the absorbed form state the latent's as head sizes."""
    rotary = view.count("rope.dimension_count")
    key = view.maybe("attention.key_length_mla") or view.count("attention.key_length")
    value = view.maybe("attention.value_length_mla") or view.count("attention.value_length")
    for name in ("attention.key_length", "attention.value_length", "attention.head_count_kv"):
        view.maybe(name)  # one latent head, where the *_mla keys have the real sizes
    if key <= rotary:
        raise view.fail("rope.dimension_count", f"is {rotary}, but a whole key has {key} elements")
    return {
        "num_key_value_heads": view.count("attention.head_count"),
        "kv_lora_rank": view.count("attention.kv_lora_rank"),
        "q_lora_rank": view.maybe("attention.q_lora_rank", low=0) or None,
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key - rotary,
        "v_head_dim": value,
        "head_dim": rotary,
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": view.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _latent_rope(view, rotary),
    }


def _latent_rope(view: MetadataView, rotary: int) -> dict[str, Any]:
    """YaRN scales the scores by mscale², not the rotary embedding: the multiplier is 0.1 · mscale."""
    rope = rope_parameters(view, rotary)
    if rope["rope_type"] != "yarn":
        return rope
    mscale = round(view.number("rope.scaling.yarn_log_multiplier", 0.1) / 0.1, 6)
    rope |= {"mscale": mscale, "mscale_all_dim": mscale, "attention_factor": 1.0}
    return rope


def _deepseek2_leaves(config: Config, layer_idx: int, is_moe: bool) -> list[str]:
    leaves = ["attn_norm.weight", "attn_kv_a_mqa.weight", "attn_kv_a_norm.weight", "attn_output.weight"]
    leaves += ["attn_q_a.weight", "attn_q_a_norm.weight", "attn_q_b.weight"] if config["q_lora_rank"] else []
    leaves += [] if config["q_lora_rank"] else ["attn_q.weight"]
    return [*leaves, "attn_kv_b.weight", "ffn_norm.weight", *_deepseek_ffn(config, is_moe)]


def _deepseek_ffn(config: Config, is_moe: bool) -> list[str]:
    if not is_moe:
        return [*DENSE_FFN]
    corrected = config["model_type"] != "deepseek_v2"
    return ["ffn_gate_inp.weight", *SHARED_EXPERT, *["exp_probs_b.bias"] * corrected]


def _deepseek2_made(config: Config, layer_idx: int, is_moe: bool) -> Sequence[Made]:
    """Newer files hold kv_b in halves, that of the keys transposed, as the absorbed form wants them."""
    parts = (("attn_k_b.weight", "ALN"), ("attn_v_b.weight", "AYL"))
    return [Made("self_attn.kv_b_proj.weight", "BL", "join_kv_b", parts)]


def _deepseek2_sizes(config: Config) -> dict[str, int]:
    heads, nope, value = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    rotary, latent = config["qk_rope_head_dim"], config["kv_lora_rank"]
    return {
        "A": heads, "N": nope, "Y": value, "L": latent, "R": config["q_lora_rank"] or 0,
        "Q": heads * (nope + rotary), "W": heads * value, "B": heads * (nope + value), "C": latent + rotary,
        "S": config["moe_intermediate_size"] * config["n_shared_experts"],
    }  # fmt: skip


def _glm4moe(view: MetadataView) -> dict[str, Any]:
    gating = _gating(view, _SIGMOID)
    if gating != _SIGMOID:
        raise view.fail("expert_gating_func", f"is {gating}; glm4moe scores with sigmoids (2)")
    return (
        attention_config(view, partial_rotary=True)
        | _routing(view, gating)
        | {
            "model_type": "glm4_moe",
            "architectures": ["Glm4MoeForCausalLM"],
            "attention_bias": view.has("blk.0.attn_q.bias"),
            "use_qk_norm": view.has("blk.0.attn_q_norm.weight"),
        }
    )


def _glm4moe_leaves(config: Config, layer_idx: int, is_moe: bool) -> list[str]:
    leaves = [*ATTENTION, "post_attention_norm.weight"]
    leaves += QKV_BIASES if config["attention_bias"] else ()
    leaves += QK_NORMS if config["use_qk_norm"] else ()
    return [*leaves, *_deepseek_ffn(config, is_moe)]


DEEPSEEK2 = Architecture(
    _deepseek2,
    _deepseek2_leaves,
    {
        "attn_q.weight": ("self_attn.q_proj.weight", "QH"),
        "attn_q_a.weight": ("self_attn.q_a_proj.weight", "RH"),
        "attn_q_a_norm.weight": ("self_attn.q_a_layernorm.weight", "R"),
        "attn_q_b.weight": ("self_attn.q_b_proj.weight", "QR"),
        "attn_kv_a_mqa.weight": ("self_attn.kv_a_proj_with_mqa.weight", "CH"),
        "attn_kv_a_norm.weight": ("self_attn.kv_a_layernorm.weight", "L"),
        "attn_kv_b.weight": ("self_attn.kv_b_proj.weight", "BL"),
        "attn_output.weight": ("self_attn.o_proj.weight", "HW"),
    },
    sizes=_deepseek2_sizes,
    made=_deepseek2_made,
)
GLM4MOE = Architecture(
    _glm4moe,
    _glm4moe_leaves,
    sizes=lambda config: {"S": config["moe_intermediate_size"] * config["n_shared_experts"]},
)
