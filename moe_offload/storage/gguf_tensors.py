"""GGUF tensors → transformers parameters and the expert index, each shape checked.

Files store the experts of a layer as one tensor per matrix (``ffn_up_exps``), some with gate and up
fused (``ffn_gate_up_exps``), those of 2023 as one tensor per expert (``ffn_up.7``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from moe_offload.config import ModelSpec
from moe_offload.errors import CheckpointError
from moe_offload.storage.dense_tensor import TensorInfo, made_tensor
from moe_offload.storage.expert_format import (
    ExpertIndex,
    ExpertKey,
    ExpertLayout,
    MatrixFormat,
    RowOrder,
    Span,
)
from moe_offload.storage.gguf import GgufHeader, GgufTensor

# GGUF name → (transformers name, shape). Shapes: V vocabulary, H hidden_size, Q and K rows of the
# query and key projections, D head_dim, E num_experts, F width of a dense feed-forward.
_MODEL_NAMES = {
    "token_embd.weight": ("model.embed_tokens.weight", "VH"),
    "output_norm.weight": ("model.norm.weight", "H"),
    "output.weight": ("lm_head.weight", "VH"),
}
_LAYER_NAMES = {
    "attn_norm.weight": ("input_layernorm.weight", "H"),
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
    "ffn_gate_inp.weight": ("mlp.gate.weight", "EH"),
    "ffn_gate.weight": ("mlp.gate_proj.weight", "FH"),
    "ffn_up.weight": ("mlp.up_proj.weight", "FH"),
    "ffn_down.weight": ("mlp.down_proj.weight", "HF"),
}
_IN_EVERY_LAYER = (
    "attn_norm.weight",
    "attn_q.weight",
    "attn_k.weight",
    "attn_v.weight",
    "attn_output.weight",
    "ffn_norm.weight",
)
_QK_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")
_QKV_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
_DENSE_FFN = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
# llama.cpp computes these from the metadata; rope_freqs goes into the config.
_NOT_LOADED = frozenset({"rope_freqs.weight", "attn_rot_embd.weight"})
_PERMUTED_QK = frozenset({"llama"})  # architectures whose Q and K rows are in llama.cpp's rotary order


def has_experts(header: GgufHeader, layer_idx: int) -> bool:
    """Say whether a layer's feed-forward is made of experts."""
    names = (f"blk.{layer_idx}.ffn_down_exps.weight", f"blk.{layer_idx}.ffn_down.0.weight")
    return any(name in header.tensors for name in names)


def map_tensors(
    header: GgufHeader, spec: ModelSpec, config: Mapping[str, Any]
) -> tuple[tuple[TensorInfo, ...], ExpertIndex]:
    """Find every tensor that the model needs.

    Raises:
        CheckpointError: one is missing, has another shape than the metadata says, or is unknown.
    """
    finder = _Finder(header, spec, config)
    for name in ("token_embd.weight", "output_norm.weight"):
        finder.take_dense(name, *_MODEL_NAMES[name])
    if not config["tie_word_embeddings"]:
        finder.take_dense("output.weight", *_MODEL_NAMES["output.weight"])
    layouts: dict[int, ExpertLayout] = {}
    for layer_idx in range(spec.num_hidden_layers):
        for leaf in finder.layer_leaves(layer_idx):
            name, shape = _LAYER_NAMES[leaf]
            finder.take_dense(f"blk.{layer_idx}.{leaf}", f"model.layers.{layer_idx}.{name}", shape)
        if layer_idx in finder.moe_layers:
            layouts[layer_idx] = finder.take_experts(layer_idx)
    finder.refuse_what_is_left()
    return tuple(finder.dense), ExpertIndex(layouts, finder.spans)


class _Finder:
    def __init__(self, header: GgufHeader, spec: ModelSpec, config: Mapping[str, Any]) -> None:
        self.header, self.spec, self.config = header, spec, config
        self.moe_layers = frozenset(spec.moe_layers)
        self.left = dict(header.tensors)
        self.dense: list[TensorInfo] = []
        self.spans: dict[ExpertKey, tuple[Span, ...]] = {}
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config["head_dim"]
        self.sizes = {
            "V": spec.vocab_size,
            "H": spec.hidden_size,
            "Q": self.heads * head_dim,
            "K": self.kv_heads * head_dim,
            "D": head_dim,
            "E": spec.num_experts,
            "F": config["intermediate_size"],
        }

    def layer_leaves(self, layer_idx: int) -> list[str]:
        """The dense tensors that this layer must have."""
        model_type = self.spec.model_type
        leaves = list(_IN_EVERY_LAYER)
        if model_type in ("qwen3", "qwen3_moe"):
            leaves += _QK_NORMS
        if model_type == "qwen2":
            leaves += _QKV_BIASES
        if self.config.get("attention_bias"):
            leaves += (*_QKV_BIASES, "attn_output.bias")
        return [*leaves, "ffn_gate_inp.weight"] if layer_idx in self.moe_layers else [*leaves, *_DENSE_FFN]

    def take(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise CheckpointError(
                f"{self.header.path}: tensor {name!r} is missing; a {self.spec.model_type} model needs it: "
                "the file is incomplete, fetch or convert it again"
            )
        if tensor.shape != shape:
            self.fail(tensor, f"has shape {tensor.shape}, by the metadata it must have {shape}")
        return tensor

    def take_dense(self, gguf_name: str, name: str, symbols: str) -> None:
        tensor = self.take(gguf_name, tuple(self.sizes[symbol] for symbol in symbols))
        heads = None
        if self.header.metadata["general.architecture"] in _PERMUTED_QK:
            heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(
                name.rpartition(".")[0].rpartition(".")[2]
            )
        info = TensorInfo(name, tensor.ggml_type, tensor.shape, tensor.span)
        self.dense.append(
            info if heads is None else made_tensor(name, tensor.shape, "unpermute", [info], (heads,))
        )

    def take_experts(self, layer_idx: int) -> ExpertLayout:
        """Take a layer's experts in whichever of the three ways the file stores them."""
        rows, cols, blk = self.spec.moe_intermediate_size, self.spec.hidden_size, f"blk.{layer_idx}"
        split = {"gate": (rows, cols), "up": (rows, cols), "down": (cols, rows)}
        if f"{blk}.ffn_down.0.weight" in self.left:
            return self.layout(layer_idx, RowOrder.SPLIT, split, self.single_experts(blk, split))
        fused = {"gate_up": (2 * rows, cols), "down": (cols, rows)}
        is_fused = f"{blk}.ffn_gate_up_exps.weight" in self.left
        order, shapes = (RowOrder.GATE_UP, fused) if is_fused else (RowOrder.SPLIT, split)
        return self.layout(layer_idx, order, shapes, self.merged_experts(blk, shapes))

    def single_experts(self, blk: str, shapes: Mapping[str, tuple[int, int]]) -> list[list[GgufTensor]]:
        return [
            [self.take(f"{blk}.ffn_{matrix}.{expert_id}.weight", shape) for matrix, shape in shapes.items()]
            for expert_id in range(self.spec.num_experts)
        ]

    def merged_experts(self, blk: str, shapes: Mapping[str, tuple[int, int]]) -> list[list[GgufTensor]]:
        num_experts = self.spec.num_experts
        stacks = [
            self.take(f"{blk}.ffn_{matrix}_exps.weight", (num_experts, *shape))
            for matrix, shape in shapes.items()
        ]
        return [[_slice(stack, expert_id) for stack in stacks] for expert_id in range(num_experts)]

    def layout(
        self,
        layer_idx: int,
        order: RowOrder,
        shapes: Mapping[str, tuple[int, int]],
        experts: list[list[GgufTensor]],
    ) -> ExpertLayout:
        types = [tensor.ggml_type for tensor in experts[0]]
        for expert_id, tensors in enumerate(experts):
            for tensor, wanted in zip(tensors, types, strict=True):
                if tensor.ggml_type is not wanted:
                    self.fail(
                        tensor,
                        f"is {tensor.ggml_type.name}, but {wanted.name} for the layer's first expert; "
                        "quantize the model again with a current llama.cpp",
                    )
            self.spans[ExpertKey(layer_idx, expert_id)] = tuple(tensor.span for tensor in tensors)
        matrices = (MatrixFormat(kind, *shape) for kind, shape in zip(types, shapes.values(), strict=True))
        return ExpertLayout(layer_idx, self.spec.num_experts, order, tuple(matrices))

    def refuse_what_is_left(self) -> None:
        for name, tensor in self.left.items():
            if name.rpartition("blk.")[2].lstrip("0123456789.") not in _NOT_LOADED:
                self.fail(
                    tensor, f"is not a tensor of a {self.spec.model_type} model that this version can run"
                )

    def fail(self, tensor: GgufTensor, message: str) -> NoReturn:
        raise CheckpointError(f"{self.header.files[tensor.span.file_id]}: tensor {tensor.name!r} {message}")


def _slice(stack: GgufTensor, expert_id: int) -> GgufTensor:
    """The tensor of one expert out of the tensor of all."""
    num_bytes = stack.span.num_bytes // stack.shape[0]
    span = Span(stack.span.file_id, stack.span.offset + expert_id * num_bytes, num_bytes)
    return GgufTensor(stack.name, stack.ggml_type, stack.shape[1:], span)
