"""What ``quant=`` would make of a checkpoint: which matrices change, and the checkpoint afterwards.

Only the bytes of matrices change. Spec, configuration, tokenizer, norms, routers and whatever cannot
be quantized stay what the folder has, so every family that loads from safetensors loads quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from moe_offload.errors import ConfigError
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.expert_format import (
    FLOAT_TYPES,
    ExpertIndex,
    ExpertKey,
    ExpertLayout,
    GgmlType,
    MatrixFormat,
    RowOrder,
    Span,
    row_bytes,
)
from moe_offload.storage.quantize_rules import matrix_type

_MATRIX_NAMES = {RowOrder.SPLIT: ("gate", "up", "down")}
_FUSED_NAMES = ("gate_up", "down")


@dataclass(frozen=True, slots=True)
class SourceMatrix:
    """A float matrix in the checkpoint's files."""

    span: Span
    form: MatrixFormat


@dataclass(frozen=True, slots=True)
class QuantTensor:
    """A tensor of the quantized file: the matrices of ``sources``, one after the other."""

    name: str
    ggml_type: GgmlType
    shape: tuple[int, ...]  # (rows, cols), or (num_experts, rows, cols)
    sources: tuple[SourceMatrix, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape[:-1]) * row_bytes(self.ggml_type, self.shape[-1])


@dataclass(frozen=True)
class QuantPlan:
    """The tensors that the quantized file will hold, for one checkpoint and rule."""

    source: Checkpoint
    quant: str
    tensors: tuple[QuantTensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def source_bytes(self) -> int:
        """What the same matrices take in the folder."""
        return sum(source.span.num_bytes for tensor in self.tensors for source in tensor.sources)


def plan_quantization(checkpoint: Checkpoint, quant: str, outputs: Mapping[str, bool]) -> QuantPlan:
    """Choose a block format for every matrix that can have one.

    Args:
        checkpoint: a safetensors folder.
        quant: a name in QUANT_RULES.
        outputs: the dense tensors that may be packed, each with whether it is the model's head.

    Raises:
        ConfigError: nothing would change.
    """
    if checkpoint.source != "safetensors":
        raise ConfigError(
            f"{checkpoint.path} is a GGUF and holds the types that its maker chose; leave quant out"
        )
    tensors = [*_dense_tensors(checkpoint, quant, outputs)]
    for layout in checkpoint.experts.layouts.values():
        tensors += _expert_tensors(checkpoint.experts, layout, quant)
    if not tensors:
        raise ConfigError(
            f"quant={quant} changes nothing in {checkpoint.path}: no matrix there is F32, F16 or BF16 with "
            "rows of whole blocks; leave quant out"
        )
    return QuantPlan(checkpoint, quant, tuple(tensors))


def quantized_checkpoint(plan: QuantPlan, spans: Mapping[str, Span] | None = None) -> Checkpoint:
    """Return the checkpoint with every quantized matrix where ``spans`` says (by tensor name).

    Their file follows the checkpoint's own in ``files``; the caller adds its path. Without spans the
    sizes are right and the offsets are not: good for planning a budget.
    """
    source = plan.source
    file_id = len(source.files)
    dense, layouts, expert_spans = (
        dict(source.dense),
        dict(source.experts.layouts),
        dict(source.experts.spans),
    )
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    for name, info in source.dense.items():
        if name in by_name:
            tensor = by_name[name]
            span = spans[name] if spans else Span(file_id, 0, tensor.num_bytes)
            dense[name] = replace(info, ggml_type=tensor.ggml_type, span=span, packed=True)
    for layer_idx, layout in source.experts.layouts.items():
        matrices = list(layout.matrices)
        for position, name in enumerate(_tensor_names(layout)):
            if name not in by_name:
                continue
            tensor = by_name[name]
            matrices[position] = replace(matrices[position], ggml_type=tensor.ggml_type, transposed=False)
            stack = spans[name] if spans else Span(file_id, 0, tensor.num_bytes)
            num_bytes = stack.num_bytes // layout.num_experts
            for expert_id in range(layout.num_experts):
                key = ExpertKey(layer_idx, expert_id)
                found = list(expert_spans[key])
                found[position] = Span(stack.file_id, stack.offset + expert_id * num_bytes, num_bytes)
                expert_spans[key] = tuple(found)
        layouts[layer_idx] = replace(layout, matrices=tuple(matrices))
    return replace(source, dense=dense, experts=replace(source.experts, layouts=layouts, spans=expert_spans))


def _dense_tensors(checkpoint: Checkpoint, quant: str, outputs: Mapping[str, bool]) -> list[QuantTensor]:
    tensors = []
    for name, is_output in outputs.items():
        info = checkpoint.dense[name]
        ggml_type = matrix_type(quant, info.shape[-1], is_output=is_output)
        is_plain = info.ggml_type in FLOAT_TYPES and info.recipe is None and len(info.shape) == 2
        if ggml_type is not None and is_plain:
            rows, cols = info.shape
            source = SourceMatrix(info.span, MatrixFormat(info.ggml_type, rows, cols))
            tensors.append(QuantTensor(name, ggml_type, info.shape, (source,)))
    return tensors


def _expert_tensors(index: ExpertIndex, layout: ExpertLayout, quant: str) -> list[QuantTensor]:
    tensors = []
    for position, (name, form) in enumerate(zip(_tensor_names(layout), layout.matrices, strict=True)):
        ggml_type = matrix_type(quant, form.cols)
        if ggml_type is None or form.ggml_type not in FLOAT_TYPES:
            continue
        sources = tuple(
            SourceMatrix(index.spans[ExpertKey(layout.layer_idx, expert_id)][position], form)
            for expert_id in range(layout.num_experts)
        )
        tensors.append(QuantTensor(name, ggml_type, (layout.num_experts, form.rows, form.cols), sources))
    return tensors


def _tensor_names(layout: ExpertLayout) -> tuple[str, ...]:
    """Names of the stacked experts of a layer in the quantized file, in the order of the matrices."""
    names = _MATRIX_NAMES.get(layout.row_order, _FUSED_NAMES)
    return tuple(f"layers.{layout.layer_idx}.experts.{name}" for name in names)
