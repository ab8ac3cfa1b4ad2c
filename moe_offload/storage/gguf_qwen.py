"""GGUF architectures of the Qwen family: qwen2, qwen3 (dense), qwen2moe, qwen3moe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_offload.storage.gguf_architecture import (
    QK_NORMS,
    QKV_BIASES,
    SHARED_EXPERT,
    Architecture,
    Config,
    Made,
    llama_leaves,
)
from moe_offload.storage.gguf_metadata import MetadataView, attention_config, experts_config


def _dense_qwen(view: MetadataView) -> dict[str, Any]:
    number = view.architecture.removeprefix("qwen")
    window = view.window()
    if window:
        raise view.fail(
            "attention.sliding_window",
            f"sliding_window={window}: the file does not say which layers have the window; "
            "use the safetensors folder of the model",
        )
    return attention_config(view) | {
        "model_type": view.architecture,
        "architectures": [f"Qwen{number}ForCausalLM"],
        "intermediate_size": view.count("feed_forward_length"),
        "use_sliding_window": False,
    }


def _qwen3moe(view: MetadataView) -> dict[str, Any]:
    view.count("attention.key_length")
    config = attention_config(view) | experts_config(view, "num_local_experts")
    window = view.window()
    layers = range(config["num_hidden_layers"])
    return config | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": view.count("feed_forward_length"),
        "moe_intermediate_size": view.count("expert_feed_forward_length"),
        "norm_topk_prob": True,  # the architecture's meaning in llama.cpp; no key says so
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in layers if not view.has_experts(layer)],
        "attention_bias": view.has("blk.0.attn_q.bias"),
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def _qwen2moe(view: MetadataView) -> dict[str, Any]:
    """A shared expert with a gate of its own; files before mid 2024 leave out both widths."""
    config = attention_config(view) | experts_config(view)
    width = view.count("feed_forward_length")
    experts_width = view.maybe("expert_feed_forward_length") or width // config["num_experts_per_tok"]
    return config | {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "intermediate_size": width,
        "moe_intermediate_size": experts_width,
        "shared_expert_intermediate_size": view.maybe("expert_shared_feed_forward_length") or width,
        "norm_topk_prob": False,  # the architecture's meaning in llama.cpp; no key says so
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
        "use_sliding_window": False,
    }


def shared_gate(config: Config, layer_idx: int, is_moe: bool) -> Sequence[Made]:
    """The shared expert's gate is one row, stored as a vector."""
    if not is_moe:
        return ()
    return [Made("mlp.shared_expert_gate.weight", "1H", "as_is", (("ffn_gate_inp_shexp.weight", "H"),))]


def _qwen2_leaves(config: Config, layer_idx: int, is_moe: bool) -> list[str]:
    leaves = [*llama_leaves(config, layer_idx, is_moe), *QKV_BIASES]
    return [*leaves, *SHARED_EXPERT] if is_moe else leaves


def _qwen3_leaves(config: Config, layer_idx: int, is_moe: bool) -> list[str]:
    return [*llama_leaves(config, layer_idx, is_moe), *QK_NORMS]


SHARED_EXPERT_NAMES = {
    "ffn_gate_shexp.weight": ("mlp.shared_expert.gate_proj.weight", "SH"),
    "ffn_up_shexp.weight": ("mlp.shared_expert.up_proj.weight", "SH"),
    "ffn_down_shexp.weight": ("mlp.shared_expert.down_proj.weight", "HS"),
}


def shared_expert_size(config: Config) -> dict[str, int]:
    return {"S": config["shared_expert_intermediate_size"]}


QWEN2 = Architecture(_dense_qwen, _qwen2_leaves)
QWEN3 = Architecture(_dense_qwen, _qwen3_leaves)
QWEN3MOE = Architecture(_qwen3moe, _qwen3_leaves)
QWEN2MOE = Architecture(
    _qwen2moe, _qwen2_leaves, SHARED_EXPERT_NAMES, sizes=shared_expert_size, made=shared_gate
)
