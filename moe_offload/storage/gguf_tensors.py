"""GGUF tensors → transformers parameters and the expert index, each shape checked.

Files store the experts of a layer as one tensor per matrix (``ffn_up_exps``), some with gate and up
fused (``ffn_gate_up_exps``), those of 2023 as one tensor per expert (``ffn_up.7``).
"""

from __future__ import annotations

import re
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
from moe_offload.storage.gguf_architecture import Architecture, Made

# llama.cpp computes these from the metadata; rope_freqs goes into the config.
_COMPUTED = frozenset({"rope_freqs.weight", "attn_rot_embd.weight"})
_LAYER = re.compile(r"blk\.([0-9]{1,6})\.(.+)", re.DOTALL)


def map_tensors(
    header: GgufHeader, architecture: Architecture, spec: ModelSpec, config: Mapping[str, Any]
) -> tuple[tuple[TensorInfo, ...], ExpertIndex]:
    """Find every tensor that the model needs.

    Raises:
        CheckpointError: one is missing, has another shape than the metadata says, or is unknown.
    """
    finder = _Finder(header, architecture, spec, config)
    for leaf in architecture.model_leaves(config):
        finder.take_dense("", leaf, "")
    for made in architecture.model_made:
        finder.make(made, "", "")
    if not config["tie_word_embeddings"]:
        finder.take_dense("", "output.weight", "")
    layouts: dict[int, ExpertLayout] = {}
    for layer_idx in range(spec.num_hidden_layers):
        finder.take_layer(layer_idx)
        if layer_idx in finder.moe_layers:
            layouts[layer_idx] = finder.take_experts(layer_idx)
    finder.refuse_what_is_left()
    return tuple(finder.dense), ExpertIndex(layouts, finder.spans)


class _Finder:
    def __init__(
        self, header: GgufHeader, architecture: Architecture, spec: ModelSpec, config: Mapping[str, Any]
    ) -> None:
        self.header, self.architecture, self.spec, self.config = header, architecture, spec, config
        self.moe_layers = frozenset(spec.moe_layers)
        self.left = dict(header.tensors)
        self.dense: list[TensorInfo] = []
        self.spans: dict[ExpertKey, tuple[Span, ...]] = {}
        heads, head_dim = config["num_attention_heads"], config["head_dim"]
        self.sizes = {
            "1": 1,
            "V": spec.vocab_size,
            "H": spec.hidden_size,
            "Q": heads * head_dim,
            "K": config["num_key_value_heads"] * head_dim,
            "D": head_dim,
            "E": spec.num_experts,
            "I": spec.moe_intermediate_size,
            "F": config.get("intermediate_size") or 0,
        } | architecture.sizes(config)

    def shape(self, symbols: str, layer_idx: int | None = None) -> tuple[int, ...]:
        own = self.architecture.layer_sizes(self.config, layer_idx) if layer_idx is not None else {}
        return tuple(own.get(symbol, self.sizes[symbol]) for symbol in symbols)

    def take_layer(self, layer_idx: int) -> None:
        """Take the dense tensors of a layer; what can be made of others is, where the file has those."""
        is_moe = layer_idx in self.moe_layers
        blk, prefix = f"blk.{layer_idx}.", f"model.layers.{layer_idx}."
        leaves = list(self.architecture.leaves(self.config, layer_idx, is_moe))
        for made in self.architecture.made(self.config, layer_idx, is_moe):
            plain = [leaf for leaf in leaves if self.architecture.name_of(leaf)[0] == made.name]
            if plain and blk + made.parts[0][0] not in self.left:
                continue
            leaves = [leaf for leaf in leaves if leaf not in plain]
            self.make(made, blk, prefix, layer_idx)
        for leaf in leaves:
            self.take_dense(blk, leaf, prefix, layer_idx)

    def make(self, made: Made, blk: str, prefix: str, layer_idx: int | None = None) -> None:
        parts = [
            self.as_info(self.take(blk + leaf, self.shape(symbols, layer_idx)))
            for leaf, symbols in made.parts
        ]
        shape = self.shape(made.symbols, layer_idx)
        self.dense.append(made_tensor(prefix + made.name, shape, made.operation, parts, made.sizes))

    def take_dense(self, blk: str, leaf: str, prefix: str, layer_idx: int | None = None) -> None:
        name, symbols = self.architecture.name_of(leaf)
        tensor = self.take(blk + leaf, self.shape(symbols, layer_idx))
        self.dense.append(self.as_info(tensor, prefix + name))

    @staticmethod
    def as_info(tensor: GgufTensor, name: str | None = None) -> TensorInfo:
        return TensorInfo(name or tensor.name, tensor.ggml_type, tensor.shape, tensor.span)

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
        """Every tensor must be known: taken, computed by llama.cpp, or of a layer that is not run."""
        for name, tensor in self.left.items():
            layer = _LAYER.fullmatch(name)
            leaf = layer[2] if layer else name
            if leaf in _COMPUTED or leaf in self.architecture.not_loaded:
                continue
            if layer and self.spec.num_hidden_layers <= int(layer[1]) < self.blocks():
                continue  # predicts further tokens
            self.fail(tensor, f"is not a tensor of a {self.spec.model_type} model that this version can run")

    def blocks(self) -> int:
        """Return the layers that the file counts, those that predict further tokens too."""
        blocks = self.header.metadata[f"{self.header.metadata['general.architecture']}.block_count"]
        return int(blocks)

    def fail(self, tensor: GgufTensor, message: str) -> NoReturn:
        raise CheckpointError(f"{self.header.files[tensor.span.file_id]}: tensor {tensor.name!r} {message}")


def _slice(stack: GgufTensor, expert_id: int) -> GgufTensor:
    """The tensor of one expert out of the tensor of all."""
    num_bytes = stack.span.num_bytes // stack.shape[0]
    span = Span(stack.span.file_id, stack.span.offset + expert_id * num_bytes, num_bytes)
    return GgufTensor(stack.name, stack.ggml_type, stack.shape[1:], span)
