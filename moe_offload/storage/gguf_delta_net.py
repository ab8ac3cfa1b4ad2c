"""GGUF architectures with a gated delta net in most layers: qwen3next and qwen35moe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_offload.storage.gguf_architecture import (
    ATTENTION,
    SHARED_EXPERT,
    Architecture,
    Config,
    Made,
)
from moe_offload.storage.gguf_metadata import (
    MetadataView,
    attention_config,
    experts_config,
)
from moe_offload.storage.gguf_qwen import SHARED_EXPERT_NAMES, shared_gate

_LINEAR, _FULL = "linear_attention", "full_attention"


def _delta_net(view: MetadataView) -> dict[str, Any]:
    """What Qwen3-Next and Qwen3.5 share: a gated delta net, full attention in every so many layers."""
    config = attention_config(view, partial_rotary=True) | experts_config(view)
    value_heads = view.count("ssm.time_step_rank")
    inner = view.count("ssm.inner_size")
    if inner % value_heads:
        raise view.fail("ssm.inner_size", f"is {inner}, not a multiple of the {value_heads} value heads")
    interval = view.maybe("full_attention_interval") or 4
    width = view.maybe("feed_forward_length", low=0)
    return (
        config
        | {
            "moe_intermediate_size": view.count("expert_feed_forward_length"),
            "shared_expert_intermediate_size": view.count("expert_shared_feed_forward_length"),
            "linear_conv_kernel_dim": view.count("ssm.conv_kernel"),
            "linear_key_head_dim": view.count("ssm.state_size"),
            "linear_num_key_heads": view.count("ssm.group_count"),
            "linear_num_value_heads": value_heads,
            "linear_value_head_dim": inner // value_heads,
            "layer_types": [
                _LINEAR if (layer + 1) % interval else _FULL for layer in range(config["num_hidden_layers"])
            ],
            "attention_bias": False,
        }
        | ({"intermediate_size": width} if width else {})
    )


def _qwen3next(view: MetadataView) -> dict[str, Any]:
    return _delta_net(view) | {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "norm_topk_prob": True,  # the architecture's meaning in llama.cpp; no key says so
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen35moe(view: MetadataView) -> dict[str, Any]:
    config = _delta_net(view) | {
        "model_type": "qwen3_5_moe_text",
        "architectures": ["Qwen3_5MoeForCausalLM"],
    }
    sections = view.counts("rope.dimension_sections", 4)  # of text, all have the same positions
    config["rope_parameters"] |= {
        "mrope_section": [size for size in sections if size],
        "mrope_interleaved": True,
    }
    return config


def _delta_leaves(config: Config, layer_idx: int, is_moe: bool) -> list[str]:
    ffn = ["ffn_gate_inp.weight", *SHARED_EXPERT]
    if config["layer_types"][layer_idx] == _FULL:
        return [*ATTENTION[1:], *ffn]
    return ["ssm_norm.weight", *ffn]


def _norms(config: Config, layer_idx: int) -> list[Made]:
    """Norms that multiply by 1 + weight are stored with the 1 added."""
    leaves = {"attn_norm": ("input_layernorm", "H"), "post_attention_norm": ("post_attention_layernorm", "H")}
    if config["layer_types"][layer_idx] == _FULL:
        leaves |= {"attn_q_norm": ("self_attn.q_norm", "D"), "attn_k_norm": ("self_attn.k_norm", "D")}
    return [
        Made(f"{name}.weight", symbols, "minus_one", ((f"{leaf}.weight", symbols),))
        for leaf, (name, symbols) in leaves.items()
    ]


def _qwen3next_leaves(config: Config, layer_idx: int, is_moe: bool) -> list[str]:
    leaves = _delta_leaves(config, layer_idx, is_moe)
    if config["layer_types"][layer_idx] == _FULL:
        return leaves
    return [*leaves, "ssm_in.weight", "ssm_ba.weight", "ssm_dt.bias", "ssm_out.weight"]


def _qwen3next_made(config: Config, layer_idx: int, is_moe: bool) -> Sequence[Made]:
    """Rows of q, k, v and z are together for each key head in transformers, one after the other here."""
    made = [*_norms(config, layer_idx), *shared_gate(config, layer_idx, is_moe)]
    if config["layer_types"][layer_idx] == _FULL:
        return made
    joined = (("attn_qkv.weight", "UH"), ("attn_gate.weight", "ZH"))
    heads = (config["linear_num_key_heads"], config["linear_key_head_dim"])
    return [
        *made,
        Made("linear_attn.in_proj_qkvz.weight", "PH", "join_qkvz", joined, heads),
        Made("linear_attn.conv1d.weight", "U1C", "as_is", (("ssm_conv1d.weight", "UC"),)),
        Made("linear_attn.A_log", "N", "log_negated", (("ssm_a", "N"),)),
    ]


def _qwen35moe_made(config: Config, layer_idx: int, is_moe: bool) -> Sequence[Made]:
    """Value heads are tiled over the key heads in the file, grouped by them in transformers."""
    made = [*_norms(config, layer_idx), *shared_gate(config, layer_idx, is_moe)]
    if config["layer_types"][layer_idx] == _FULL:
        return made
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    heads = (values // keys, keys)
    first = 2 * keys * config["linear_key_head_dim"]

    def grouped(name: str, symbols: str, leaf: str, stored: str = "", offset: int = 0) -> Made:
        part = ((leaf, stored or symbols),)
        return Made(f"linear_attn.{name}", symbols, "group_value_heads", part, (offset, *heads))

    return [
        *made,
        grouped("in_proj_qkv.weight", "UH", "attn_qkv.weight", offset=first),
        grouped("in_proj_z.weight", "ZH", "attn_gate.weight"),
        grouped("in_proj_a.weight", "NH", "ssm_alpha.weight"),
        grouped("in_proj_b.weight", "NH", "ssm_beta.weight"),
        grouped("dt_bias", "N", "ssm_dt.bias"),
        grouped("conv1d.weight", "U1C", "ssm_conv1d.weight", "UC", first),
        Made("linear_attn.A_log", "N", "log_negated_heads", (("ssm_a", "N"),), heads),
        Made("linear_attn.out_proj.weight", "HZ", "group_value_columns", (("ssm_out.weight", "HZ"),), heads),
    ]


def _delta_sizes(config: Config) -> dict[str, int]:
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    heads = config["linear_num_value_heads"]
    values = heads * config["linear_value_head_dim"]
    return {
        "G": 2 * config["num_attention_heads"] * config["head_dim"],  # queries and their gates
        "U": 2 * keys + values, "Z": values, "P": 2 * keys + 2 * values, "N": heads, "B": 2 * heads,
        "Y": config["linear_value_head_dim"], "C": config["linear_conv_kernel_dim"],
        "S": config["shared_expert_intermediate_size"],
    }  # fmt: skip


_DELTA_NAMES = {
    **SHARED_EXPERT_NAMES,
    "attn_q.weight": ("self_attn.q_proj.weight", "GH"),
    "ssm_norm.weight": ("linear_attn.norm.weight", "Y"),
    "ssm_in.weight": ("linear_attn.in_proj_qkvz.weight", "PH"),
    "ssm_ba.weight": ("linear_attn.in_proj_ba.weight", "BH"),
    "ssm_dt.bias": ("linear_attn.dt_bias", "N"),
    "ssm_out.weight": ("linear_attn.out_proj.weight", "HZ"),
}
_FINAL_NORM = (Made("model.norm.weight", "H", "minus_one", (("output_norm.weight", "H"),)),)


def _only_embedding(config: Config) -> list[str]:
    return ["token_embd.weight"]


QWEN3NEXT = Architecture(
    _qwen3next,
    _qwen3next_leaves,
    _DELTA_NAMES,
    sizes=_delta_sizes,
    made=_qwen3next_made,
    model_leaves=_only_embedding,
    model_made=_FINAL_NORM,
)
QWEN35MOE = Architecture(
    _qwen35moe,
    _delta_leaves,
    _DELTA_NAMES,
    sizes=_delta_sizes,
    made=_qwen35moe_made,
    model_leaves=_only_embedding,
    model_made=_FINAL_NORM,
)
