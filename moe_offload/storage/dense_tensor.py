"""A dense tensor of a checkpoint: where its bytes are, and how a parameter is made of them.

Most parameters are one tensor as it stands. Converters of GGUF also permute, split, join or shift
some; a ``Recipe`` names what undoes that, and ``runtime/dense_tensors.py`` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from moe_offload.storage.expert_format import BLOCK_SIZES, GgmlType, Span, WeightType
from moe_offload.storage.safetensors import Scales

# Operations that move whole rows, and so work on packed rows as they do on numbers.
ROW_OPERATIONS = frozenset({"unpermute", "concat_rows", "join_qkvz", "group_value_heads"})
# Those that move equal pieces of columns, and so work on packed rows whose pieces are whole blocks.
COLUMN_OPERATIONS = frozenset({"group_value_columns"})


@dataclass(frozen=True, slots=True)
class Recipe:
    """``operation`` on ``parts``; ``sizes`` are its arguments."""

    operation: str
    parts: tuple[TensorInfo, ...]
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One dense tensor. ``name`` is the transformers parameter (GGUF) or the file's key (safetensors).

    With a recipe, ``ggml_type`` and ``shape`` are those of what is made, and of ``span`` only the
    number of bytes means anything: those of all parts.
    """

    name: str
    ggml_type: WeightType
    shape: tuple[int, ...]  # torch order: (rows, cols)
    span: Span
    packed: bool = False  # quantized by storage/quantize.py: the model keeps its blocks as they are
    recipe: Recipe | None = None
    scales: Scales | None = None  # that lie apart in a safetensors file

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def made_tensor(
    name: str,
    shape: tuple[int, ...],
    operation: str,
    parts: Sequence[TensorInfo],
    sizes: tuple[int, ...] = (),
) -> TensorInfo:
    """Return the tensor that ``operation`` makes of ``parts``: packed as they are where only rows move."""
    types = {part.ggml_type for part in parts}
    stays_packed = operation in ROW_OPERATIONS and len(types) == 1
    if operation in COLUMN_OPERATIONS:
        ggml_type = parts[0].ggml_type
        assert isinstance(ggml_type, GgmlType), "only a GGUF's tensors are put in another order"
        stays_packed = shape[-1] // prod(sizes) % BLOCK_SIZES[ggml_type].elements == 0
    first = parts[0].span
    return TensorInfo(
        name,
        types.pop() if stays_packed else GgmlType.F32,
        shape,
        Span(first.file_id, first.offset, sum(part.span.num_bytes for part in parts)),
        recipe=Recipe(operation, tuple(parts), sizes),
    )
