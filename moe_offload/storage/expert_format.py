"""What an expert's bytes are: ggml block formats, matrices, layouts, spans in files.

Owns the table of ggml types and the arithmetic from shapes to bytes. Imports neither torch nor
gguf, so that `moe-offload inspect` answers at once. The type numbers are ggml's (ggml.h); a test
holds this table equal to gguf-py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple

from moe_offload.errors import CheckpointError

DIRECT_IO_ALIGNMENT_BYTES = 4096


class GgmlType(IntEnum):
    """ggml's numbers for the types that hold weights; safetensors dtypes map to F32, F16, BF16."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40


class OwnType(IntEnum):
    """Types that ggml does not have, numbered beyond its own (csrc/cpu/kernels.h)."""

    F8_E4M3 = 63  # a float32 scale and 128 codes


class IntegerType(IntEnum):
    """Of tables that routers look tokens up in; no kernel multiplies them. ggml's numbers."""

    I32 = 26
    I64 = 27


WeightType = GgmlType | OwnType | IntegerType


class Relayout(IntEnum):
    """How codes and scales that lie apart in a file are put together (csrc/io/relayout.h)."""

    MXFP4 = 1
    FP8_F32 = 2
    FP8_BF16 = 3


FP8_BLOCK = 128  # columns, and rows, that share a scale


class BlockSize(NamedTuple):
    """``elements`` consecutive weights of a row are stored in ``num_bytes`` bytes."""

    elements: int
    num_bytes: int


BLOCK_SIZES: dict[GgmlType, BlockSize] = {
    GgmlType.F32: BlockSize(1, 4),
    GgmlType.F16: BlockSize(1, 2),
    GgmlType.BF16: BlockSize(1, 2),
    GgmlType.Q4_0: BlockSize(32, 18),
    GgmlType.Q4_1: BlockSize(32, 20),
    GgmlType.Q5_0: BlockSize(32, 22),
    GgmlType.Q5_1: BlockSize(32, 24),
    GgmlType.Q8_0: BlockSize(32, 34),
    GgmlType.Q2_K: BlockSize(256, 84),
    GgmlType.Q3_K: BlockSize(256, 110),
    GgmlType.Q4_K: BlockSize(256, 144),
    GgmlType.Q5_K: BlockSize(256, 176),
    GgmlType.Q6_K: BlockSize(256, 210),
    GgmlType.IQ2_XXS: BlockSize(256, 66),
    GgmlType.IQ2_XS: BlockSize(256, 74),
    GgmlType.IQ3_XXS: BlockSize(256, 98),
    GgmlType.IQ1_S: BlockSize(256, 50),
    GgmlType.IQ4_NL: BlockSize(32, 18),
    GgmlType.IQ3_S: BlockSize(256, 110),
    GgmlType.IQ2_S: BlockSize(256, 82),
    GgmlType.IQ4_XS: BlockSize(256, 136),
    GgmlType.IQ1_M: BlockSize(256, 56),
    GgmlType.TQ1_0: BlockSize(256, 54),
    GgmlType.TQ2_0: BlockSize(256, 66),
    GgmlType.MXFP4: BlockSize(32, 17),
    GgmlType.NVFP4: BlockSize(64, 36),
}

OWN_BLOCK_SIZES: dict[WeightType, BlockSize] = {
    OwnType.F8_E4M3: BlockSize(FP8_BLOCK, 4 + FP8_BLOCK),
    IntegerType.I32: BlockSize(1, 4),
    IntegerType.I64: BlockSize(1, 8),
}

FLOAT_TYPES = frozenset({GgmlType.F32, GgmlType.F16, GgmlType.BF16})
# Multiplied by kernels of their own on every instruction set but the baseline (csrc/cpu/kernels.inc); the
# others are unpacked first: right, and slower.
FAST_TYPES = FLOAT_TYPES | {
    GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1, GgmlType.Q8_0, GgmlType.Q2_K, GgmlType.Q3_K,
    GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K, GgmlType.IQ4_NL, GgmlType.IQ4_XS, GgmlType.MXFP4,
}  # fmt: skip


def row_bytes(ggml_type: WeightType, cols: int) -> int:
    """Return the bytes of one row of ``cols`` weights.

    Raises:
        CheckpointError: ``cols`` is not a whole number of the type's blocks.
    """
    block = BLOCK_SIZES[ggml_type] if isinstance(ggml_type, GgmlType) else OWN_BLOCK_SIZES[ggml_type]
    if cols % block.elements:
        raise CheckpointError(
            f"{ggml_type.name} stores blocks of {block.elements} weights, but a row has {cols}"
        )
    return cols // block.elements * block.num_bytes


class ExpertKey(NamedTuple):
    """Identity of an expert everywhere. ``layer_idx`` is the decoder layer's index."""

    layer_idx: int
    expert_id: int


@dataclass(frozen=True, slots=True)
class Span:
    """``num_bytes`` bytes at ``offset`` of ``Checkpoint.files[file_id]``; aligned to nothing."""

    file_id: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class MatrixFormat:
    """A matrix of ``rows`` output features by ``cols`` input features.

    ``transposed`` matrices (gpt-oss safetensors) are stored (cols, rows) and only in float types.
    """

    ggml_type: WeightType
    rows: int
    cols: int
    transposed: bool = False
    relayout: Relayout | None = None  # its codes and its scales are two spans of the file

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored matrix."""
        stored_rows, stored_cols = (self.cols, self.rows) if self.transposed else (self.rows, self.cols)
        return stored_rows * row_bytes(self.ggml_type, stored_cols)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes in the file: all of the matrix, but for scales that lie apart."""
        if self.relayout is None:
            return self.num_bytes
        return self.rows * self.cols // (2 if self.relayout is Relayout.MXFP4 else 1)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales that lie apart in the file."""
        match self.relayout:
            case None:
                return 0
            case Relayout.MXFP4:
                return self.rows * self.cols // 32
            case _:
                scales = -(-self.rows // FP8_BLOCK) * (self.cols // FP8_BLOCK)
                return scales * (4 if self.relayout is Relayout.FP8_F32 else 2)

    @property
    def codes_offset(self) -> int:
        """Where in the slot's region the codes are read to: scales come first, then so far back that the
        blocks, which are written from the region's start, never reach codes that are still to be moved.
        """
        if self.relayout is None:
            return 0
        page = DIRECT_IO_ALIGNMENT_BYTES
        return max(region_bytes(self.scale_bytes), -(-(self.num_bytes - self.code_bytes) // page) * page)

    @property
    def region_bytes(self) -> int:
        """Slot bytes that reading the matrix may touch."""
        return self.codes_offset + region_bytes(self.code_bytes)


class RowOrder(StrEnum):
    """How gate and up rows are stored."""

    GATE_UP = "gate_up"  # one matrix of 2I rows, gate rows first
    INTERLEAVED = "interleaved"  # one matrix of 2I rows: gate 0, up 0, gate 1, up 1 ... (gpt-oss)
    SPLIT = "split"  # two matrices of I rows


@dataclass(frozen=True)
class ExpertLayout:
    """The matrices of every expert of one layer, in slot order: gate_up | gate, up; then down."""

    layer_idx: int
    num_experts: int
    row_order: RowOrder
    matrices: tuple[MatrixFormat, ...]

    def __post_init__(self) -> None:
        wanted = 3 if self.row_order is RowOrder.SPLIT else 2
        assert len(self.matrices) == wanted, (
            f"{self.row_order} has {wanted} matrices, got {len(self.matrices)}"
        )

    @property
    def down(self) -> MatrixFormat:
        """The down projection, (hidden_size, moe_intermediate_size)."""
        return self.matrices[-1]

    @property
    def hidden_size(self) -> int:
        return self.down.rows

    @property
    def moe_intermediate_size(self) -> int:
        return self.down.cols

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the file."""
        return sum(matrix.num_bytes for matrix in self.matrices)

    @property
    def region_offsets(self) -> tuple[int, ...]:
        """Where each matrix's region starts in a slot; its bytes begin ``offset % 4096`` after that.

        A direct read covers whole 4096-byte pages around the span, so a region holds
        ceil4096(span) + 4096 bytes.
        """
        offsets, position = [], 0
        for matrix in self.matrices:
            offsets.append(position)
            position += matrix.region_bytes
        return tuple(offsets)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot that can hold any expert of this layer."""
        return sum(matrix.region_bytes for matrix in self.matrices)


def region_bytes(span_bytes: int) -> int:
    """Return the slot bytes that a direct read of an unaligned span may touch."""
    pages = -(-span_bytes // DIRECT_IO_ALIGNMENT_BYTES)
    return (pages + 1) * DIRECT_IO_ALIGNMENT_BYTES


@dataclass(frozen=True)
class ExpertIndex:
    """Where every expert of a checkpoint lies.

    ``spans[key]`` has one span per matrix of ``layouts[key.layer_idx]``, in the same order;
    ``scale_spans[key]`` too, where the layer's scales lie apart.
    """

    layouts: Mapping[int, ExpertLayout] = field(default_factory=dict)
    spans: Mapping[ExpertKey, tuple[Span, ...]] = field(default_factory=dict)
    scale_spans: Mapping[ExpertKey, tuple[Span, ...]] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all experts in the files."""
        return sum(layout.expert_bytes * layout.num_experts for layout in self.layouts.values())
