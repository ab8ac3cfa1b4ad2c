"""What describes one GGUF architecture: metadata → config, and which tensors become which parameters.

Shapes are written as symbols, one letter for a dimension: V vocabulary, H hidden_size, Q and K rows of
the query and key projections, D head_dim, E experts, I width of an expert, F of a dense feed-forward,
S of the shared expert, 1. An architecture adds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_offload.storage.gguf_metadata import MetadataView

Config = Mapping[str, Any]

# GGUF name → (transformers name, shape).
MODEL_NAMES = {
    "token_embd.weight": ("model.embed_tokens.weight", "VH"),
    "output_norm.weight": ("model.norm.weight", "H"),
    "output_norm.bias": ("model.norm.bias", "H"),
    "output.weight": ("lm_head.weight", "VH"),
    "output.bias": ("lm_head.bias", "V"),
}
LAYER_NAMES = {
    "attn_norm.weight": ("input_layernorm.weight", "H"),
    "attn_norm.bias": ("input_layernorm.bias", "H"),
    "attn_q.weight": ("self_attn.q_proj.weight", "QH"),
    "attn_k.weight": ("self_attn.k_proj.weight", "KH"),
    "attn_v.weight": ("self_attn.v_proj.weight", "KH"),
    "attn_output.weight": ("self_attn.o_proj.weight", "HQ"),
    "attn_q.bias": ("self_attn.q_proj.bias", "Q"),
    "attn_k.bias": ("self_attn.k_proj.bias", "K"),
    "attn_v.bias": ("self_attn.v_proj.bias", "K"),
    "attn_output.bias": ("self_attn.o_proj.bias", "H"),
    "attn_q_norm.weight": ("self_attn.q_norm.weight", "D"),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", "D"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "H"),
    "ffn_norm.bias": ("post_attention_layernorm.bias", "H"),
    "post_attention_norm.weight": ("post_attention_layernorm.weight", "H"),
    "ffn_gate_inp.weight": ("mlp.gate.weight", "EH"),
    "ffn_gate.weight": ("mlp.gate_proj.weight", "FH"),
    "ffn_up.weight": ("mlp.up_proj.weight", "FH"),
    "ffn_down.weight": ("mlp.down_proj.weight", "HF"),
    "ffn_gate_shexp.weight": ("mlp.shared_experts.gate_proj.weight", "SH"),
    "ffn_up_shexp.weight": ("mlp.shared_experts.up_proj.weight", "SH"),
    "ffn_down_shexp.weight": ("mlp.shared_experts.down_proj.weight", "HS"),
    "exp_probs_b.bias": ("mlp.gate.e_score_correction_bias", "E"),
}
ATTENTION = ("attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight")
QK_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")
QKV_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
DENSE_FFN = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
SHARED_EXPERT = ("ffn_gate_shexp.weight", "ffn_up_shexp.weight", "ffn_down_shexp.weight")


@dataclass(frozen=True)
class Made:
    """A parameter made of tensors of a layer: ``(leaf, symbols)`` each, by an operation of Recipe."""

    name: str
    symbols: str
    operation: str
    parts: tuple[tuple[str, str], ...]
    sizes: tuple[int, ...] = ()


def _no_sizes(config: Config) -> dict[str, int]:
    return {}


def _same_in_every_layer(config: Config, layer_idx: int) -> dict[str, int]:
    return {}


def _nothing_made(config: Config, layer_idx: int, is_moe: bool) -> Sequence[Made]:
    return ()


def llama_leaves(config: Config, layer_idx: int, is_moe: bool) -> list[str]:
    """The tensors of a layer of the usual kind: attention, one norm before each half, router or dense."""
    leaves = [*ATTENTION, "ffn_norm.weight"]
    if config.get("attention_bias"):
        leaves += (*QKV_BIASES, "attn_output.bias")
    return [*leaves, "ffn_gate_inp.weight"] if is_moe else [*leaves, *DENSE_FFN]


@dataclass(frozen=True)
class Architecture:
    """One ``general.architecture``.

    Attributes:
        config: metadata to the values of a config.json.
        leaves: the tensors of a layer that are a parameter each, without ``blk.N.`` (config, layer
            index, whether it has experts).
        names: transformers' names and shapes where they differ from ``LAYER_NAMES``, ``MODEL_NAMES``.
        sizes: symbols beyond the common ones.
        layer_sizes: symbols that differ from layer to layer.
        made: parameters that are no tensor as it stands; where one is also among the leaves, the file
            decides which of the two it has.
        model_leaves: tensors outside the layers, beside the output projection.
        model_made: parameters outside the layers that are made of other tensors.
        not_loaded: tensors outside the layers that the config holds, or nobody needs.
    """

    config: Callable[[MetadataView], dict[str, Any]]
    leaves: Callable[[Config, int, bool], Sequence[str]] = llama_leaves
    names: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    sizes: Callable[[Config], dict[str, int]] = _no_sizes
    layer_sizes: Callable[[Config, int], dict[str, int]] = _same_in_every_layer
    made: Callable[[Config, int, bool], Sequence[Made]] = _nothing_made
    model_leaves: Callable[[Config], Sequence[str]] = lambda config: (
        "token_embd.weight",
        "output_norm.weight",
    )
    model_made: tuple[Made, ...] = ()
    not_loaded: frozenset[str] = frozenset()

    def name_of(self, leaf: str) -> tuple[str, str]:
        """Return (transformers name, symbols) of a tensor."""
        return self.names.get(leaf) or LAYER_NAMES.get(leaf) or MODEL_NAMES[leaf]
