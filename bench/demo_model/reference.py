"""The outside oracle: a GGUF's weights dequantized by gguf-py in a plain transformers Qwen3-MoE.

Imports nothing from moe_offload and shares no code with it, so that neither can hide the other's
mistakes. For small models: every weight is in memory as ``dtype``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
}


def reference_model(path: Path, dtype: torch.dtype = torch.float64) -> Qwen3MoeForCausalLM:
    """Load ``path`` (a qwen3moe GGUF); transformers still takes norms and softmax in float32."""
    reader = GGUFReader(path)
    config = reference_config(reader)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model.to_empty(device="cpu").to(dtype)
    model.tie_weights()
    state = {name: torch.from_numpy(value.copy()).to(dtype) for name, value in state_dict(reader).items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not in the file
    return model.eval()


def reference_config(reader: GGUFReader) -> Qwen3MoeConfig:
    """Translate the metadata."""

    def value(key: str) -> Any:
        return reader.fields[f"qwen3moe.{key}"].contents()

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return Qwen3MoeConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=value("embedding_length"),
        intermediate_size=value("expert_feed_forward_length"),
        moe_intermediate_size=value("expert_feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        head_dim=value("attention.key_length"),
        num_experts=value("expert_count"),
        num_experts_per_tok=value("expert_used_count"),
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings="output.weight" not in tensors,
    )


def state_dict(reader: GGUFReader) -> dict[str, np.ndarray]:
    """Return float32 weights under transformers' names; gate and up rows become one matrix."""
    weights = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    state = {GLOBAL_NAMES[name]: weights[name] for name in GLOBAL_NAMES if name in weights}
    for layer_idx in range(reader.fields["qwen3moe.block_count"].contents()):
        ours, theirs = f"model.layers.{layer_idx}.", f"blk.{layer_idx}."
        for name in LAYER_NAMES:
            state[ours + LAYER_NAMES[name]] = weights[theirs + name]
        gate, up = weights[theirs + "ffn_gate_exps.weight"], weights[theirs + "ffn_up_exps.weight"]
        state[ours + "mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)  # (E, 2I, H)
    return state
