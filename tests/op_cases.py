"""The one list of cases of the native ops: inputs made from a seed, packed weights of every type."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from reference import SCALE_PLACES
from torch import Tensor

from moe_offload.expert_ops import ActivationKind
from moe_offload.storage.expert_format import (
    BLOCK_SIZES,
    FLOAT_TYPES,
    GgmlType,
    OwnType,
    RowOrder,
    WeightType,
    row_bytes,
)

FLOAT_COLS = 1031  # no multiple of anything


def cols_of(ggml_type: WeightType) -> int:
    """Return an odd number of blocks: superblocks of 8 are left incomplete."""
    if isinstance(ggml_type, OwnType):
        return 3 * 128
    return (
        FLOAT_COLS
        if ggml_type in FLOAT_TYPES
        else 11 * 32
        if BLOCK_SIZES[ggml_type].elements == 32
        else 3 * 256
    )


@dataclass(frozen=True)
class LinearCase:
    """``rows`` by ``cols`` weights of a type, ``tokens`` activations."""

    ggml_type: GgmlType
    tokens: int
    rows: int
    cols: int

    @property
    def id(self) -> str:
        return f"{self.ggml_type.name}-{self.tokens}x{self.rows}x{self.cols}"

    def weight(self) -> NDArray[np.uint8]:
        """(rows, row bytes)"""
        return packed_weight(self.ggml_type, self.rows, self.cols, seed=self.rows)

    def x(self) -> Tensor:
        """(tokens, cols), with outliers in some blocks"""
        return activations(self.tokens, self.cols, seed=self.tokens)


LINEAR_CASES = [LinearCase(ggml_type, 3, 7, cols_of(ggml_type)) for ggml_type in GgmlType] + [
    LinearCase(GgmlType.Q4_0, 2, 33, 32),
    LinearCase(GgmlType.Q8_0, 1, 65, 256),
    LinearCase(GgmlType.Q5_1, 35, 5, 288),
    LinearCase(GgmlType.NVFP4, 2, 5, 64),
    LinearCase(GgmlType.Q6_K, 35, 1, 256),
    LinearCase(GgmlType.F32, 2, 34, 1),
    LinearCase(GgmlType.F16, 34, 3, 7),
    LinearCase(GgmlType.BF16, 1, 1, 8),
]


# Every type in every shape for every number of tokens: rows and tokens that fill no tile, one block a row
# and incomplete groups of blocks.
GRID_TOKENS = (1, 2, 7, 20, 33)


def grid_shapes(ggml_type: GgmlType) -> tuple[tuple[int, int], ...]:
    """Return (rows, cols) of the grid: a single block, an odd number of blocks, and more rows than a tile."""
    block = BLOCK_SIZES[ggml_type].elements
    return ((3, max(block, 1)), (5, cols_of(ggml_type)), (37, 5 * block if block > 1 else 129))


@dataclass(frozen=True)
class ExpertCase:
    """An expert layout and how it is used; ``types`` are in slot order."""

    name: str
    row_order: RowOrder
    types: tuple[GgmlType, ...]
    kind: ActivationKind
    hidden_size: int
    intermediate_size: int
    bias: bool = False
    transposed: bool = False


EXPERT_CASES = [
    ExpertCase("split_q4_0", RowOrder.SPLIT, (GgmlType.Q4_0,) * 3, ActivationKind.SILU, 64, 96),
    ExpertCase(
        "mixed", RowOrder.SPLIT, (GgmlType.Q4_K, GgmlType.Q8_0, GgmlType.Q6_K), ActivationKind.SILU, 256, 256
    ),
    ExpertCase(
        "float_and_quantized",
        RowOrder.SPLIT,
        (GgmlType.F16, GgmlType.Q4_0, GgmlType.BF16),
        ActivationKind.GELU_TANH,
        64,
        17,
    ),
    ExpertCase("gate_up_bf16", RowOrder.GATE_UP, (GgmlType.BF16,) * 2, ActivationKind.GELU_ERF, 35, 19),
    ExpertCase("gate_up_relu", RowOrder.GATE_UP, (GgmlType.Q5_0, GgmlType.F32), ActivationKind.RELU, 64, 33),
    ExpertCase(
        "gpt_oss_mxfp4",
        RowOrder.INTERLEAVED,
        (GgmlType.MXFP4,) * 2,
        ActivationKind.GPT_OSS_SWIGLU,
        96,
        64,
        bias=True,
    ),
    ExpertCase(
        "gpt_oss_transposed",
        RowOrder.INTERLEAVED,
        (GgmlType.BF16,) * 2,
        ActivationKind.GPT_OSS_SWIGLU,
        45,
        39,
        bias=True,
        transposed=True,
    ),
]


# One expert of every type, gate, up and down alike.
FORMAT_EXPERT_CASES = [
    ExpertCase(
        f"all_{ggml_type.name}",
        RowOrder.SPLIT,
        (ggml_type,) * 3,
        ActivationKind.SILU,
        hidden_size=max(BLOCK_SIZES[ggml_type].elements, 64),
        intermediate_size=3 * max(BLOCK_SIZES[ggml_type].elements, 11),
    )
    for ggml_type in GgmlType
]


def activations(tokens: int, cols: int, seed: int) -> Tensor:
    """Return (tokens, cols) float32, normal, a few values 30 times larger."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, cols)).astype(np.float32)
    x[rng.random(x.shape) < 0.01] *= 30
    return torch.from_numpy(x)


def packed_weight(ggml_type: WeightType, rows: int, cols: int, seed: int) -> NDArray[np.uint8]:
    """Return (rows, row bytes): quantized by gguf-py where it can, else random blocks of finite scales."""
    rng = np.random.default_rng(seed)
    if isinstance(ggml_type, OwnType):
        return random_f8(rows, cols, rng)
    values = rng.standard_normal((rows, cols)).astype(np.float32)
    try:
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType(int(ggml_type)))
        return np.ascontiguousarray(packed).view(np.uint8)
    except NotImplementedError:
        return random_blocks(ggml_type, rows, cols, rng)


def random_blocks(ggml_type: GgmlType, rows: int, cols: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return random bytes with small finite scales in their places."""
    block_bytes = BLOCK_SIZES[ggml_type].num_bytes
    blocks = rng.integers(0, 256, (rows * row_bytes(ggml_type, cols) // block_bytes, block_bytes), np.uint8)
    scales = rng.uniform(-0.02, 0.02, (len(blocks), 2)).astype(np.float16)
    if ggml_type == GgmlType.NVFP4:
        blocks[:, :4] = rng.integers(0, 0x7F, (len(blocks), 4))
    elif ggml_type == GgmlType.IQ1_M:
        blocks[:, 55] &= 0xBF  # the top exponent bit of d: d stays below 2
    else:
        place = SCALE_PLACES[ggml_type.name]
        blocks[:, place.d : place.d + 2] = scales[:, :1].copy().view(np.uint8)
        if place.minimum is not None:
            blocks[:, place.minimum : place.minimum + 2] = scales[:, 1:].copy().view(np.uint8)
    return blocks.reshape(rows, -1)


def random_f8(rows: int, cols: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return blocks of a float32 scale and 128 codes, none of them NaN."""
    blocks = rng.integers(0, 0x7F, (rows * cols // 128, 132), np.uint8)
    blocks[:, 4:] |= rng.integers(0, 2, (len(blocks), 128), np.uint8) << 7
    blocks[:, :4] = rng.uniform(0.001, 0.02, (len(blocks), 1)).astype(np.float32).view(np.uint8)
    return blocks.reshape(rows, -1)


def misaligned(data: NDArray[np.uint8], offset: int) -> NDArray[np.uint8]:
    """Return a copy of ``data`` that starts ``offset`` bytes after a 64-byte boundary."""
    room = np.empty(data.size + 128, np.uint8)
    start = -room.ctypes.data % 64 + offset
    copy = room[start : start + data.size]
    copy[:] = data.reshape(-1)
    return copy
