"""The typed door to arithmetic v1: torch CPU tensors in, checked, native kernels, tensors out.

The experts' part is expert_ops.py; what both check is op_arguments.py.

Arithmetic v1 gives the same bits on every instruction set, for every number of threads and for
every number of tokens in a call; docs/ARITHMETIC.md says exactly what they are. Each op has a
reference beside it, in float64 on weights that gguf-py dequantized: the numbers that the op
approximates, not its bits (tests/reference.py has an oracle of the bits).

A wrong argument is a ConfigError that names op, argument, wanted and got. Ops release the GIL, run
one at a time and stop for Ctrl-C.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_offload import _native
from moe_offload.op_arguments import address, check_bias, check_tensor
from moe_offload.storage.expert_format import (
    FP8_BLOCK,
    GgmlType,
    MatrixFormat,
    OwnType,
    WeightType,
)

# The codebooks of these types come from gguf-py when one is first used.
CODEBOOK_TYPES = frozenset(
    {
        GgmlType.IQ1_S,
        GgmlType.IQ1_M,
        GgmlType.IQ2_XXS,
        GgmlType.IQ2_XS,
        GgmlType.IQ2_S,
        GgmlType.IQ3_XXS,
        GgmlType.IQ3_S,
    }
)
_codebooks_set: set[WeightType] = set()


def set_num_threads(num_threads: int) -> None:
    """Use ``num_threads`` threads, the calling one included; the bits do not change."""
    _native.set_num_threads(num_threads)


def num_threads() -> int:
    """Threads in use: by default what affinity, cgroup quota and physical cores allow."""
    return _native.num_threads()


def usable_cores() -> int:
    """Return how many threads are worth having: affinity, cgroup quota and physical cores."""
    cores: int = _native.usable_cores("/")
    return cores


def read_bandwidth(data: Tensor) -> float:
    """Return bytes per second at which the pool's threads read ``data`` (uint8, at least 1 MiB) together."""
    bytes_per_s: float = _native.read_bandwidth(data.data_ptr(), data.numel())
    return bytes_per_s


def isa() -> str:
    """The instruction set in use: the best that the CPU offers, or what MOE_OFFLOAD_ISA names."""
    return _native.isa()


def amx_state() -> str:
    """How AMX's kernels fared on this machine against AVX-512's, or why they do not run."""
    return _native.amx_state()


def has_fast_kernel(ggml_type: WeightType) -> bool:
    """Whether the instruction set in use has a kernel for this type; otherwise it is correct and slow."""
    return _native.has_fast_kernel(ggml_type)


def linear(
    x: Tensor,
    weight: Tensor,
    ggml_type: WeightType,
    rows: int,
    cols: int,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Return ``x @ weight.T + bias``, (T, rows) float32.

    Args:
        x: (T, cols) float32.
        weight: uint8, the packed rows one after the other; any shape, aligned to nothing.
        bias: (rows,) float32.
        transposed: float weights stored (cols, rows); the bits are those of the other order.
    """
    check_tensor("linear", "x", x, torch.float32, (None, cols))
    check_tensor("linear", "weight", weight, torch.uint8)
    check_bias("linear", "bias", bias, (rows,))
    set_codebook(ggml_type)
    out = torch.empty(len(x), rows)
    _native.linear(
        x.data_ptr(),
        len(x),
        weight.data_ptr(),
        weight.numel(),
        ggml_type,
        rows,
        cols,
        transposed,
        address(bias),
        out.data_ptr(),
    )
    return out


def embedding_rows(ids: Tensor, weight: Tensor, ggml_type: WeightType, rows: int, cols: int) -> Tensor:
    """Return rows ``ids`` of ``weight``, (T, cols) float32, to the bit as gguf-py dequantizes them.

    Args:
        ids: (T,) int64, each in [0, rows).
        weight: uint8, the packed rows.
    """
    ids = ids.contiguous()
    check_tensor("embedding_rows", "ids", ids, torch.int64, (None,))
    check_tensor("embedding_rows", "weight", weight, torch.uint8)
    set_codebook(ggml_type)
    out = torch.empty(len(ids), cols)
    _native.embedding_rows(
        ids.data_ptr(), len(ids), weight.data_ptr(), weight.numel(), ggml_type, rows, cols, out.data_ptr()
    )
    return out


def dequantize(weight: Tensor, matrix: MatrixFormat) -> Tensor:
    """Return the (rows, cols) float64 weights that gguf-py reads in the packed bytes."""
    import gguf

    stored = (matrix.cols, matrix.rows) if matrix.transposed else (matrix.rows, matrix.cols)
    packed = weight.detach().reshape(stored[0], -1)
    if matrix.ggml_type is OwnType.F8_E4M3:
        return _dequantize_f8(packed).reshape(stored)
    values = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType(int(matrix.ggml_type)))
    result = torch.from_numpy(values.astype(np.float64)).reshape(stored)
    return result.T if matrix.transposed else result


def set_codebook(ggml_type: WeightType) -> None:
    """Hand a type's codebook to the kernels, once; before an address of such weights goes to native code."""
    if ggml_type not in CODEBOOK_TYPES or ggml_type in _codebooks_set:
        return
    from gguf import quants

    traits = getattr(quants, ggml_type.name)
    traits.init_grid()
    grid = np.ascontiguousarray(traits.grid.reshape(traits.grid_shape), dtype=np.int8)
    _native.set_grid(ggml_type, grid)
    _codebooks_set.add(ggml_type)


def _dequantize_f8(packed: Tensor) -> Tensor:
    """(rows, row bytes) -> (rows, blocks, 128) float64; each weight is rounded to float32 once."""
    blocks = packed.reshape(len(packed), -1, 4 + FP8_BLOCK)
    scales = blocks[..., :4].contiguous().view(torch.float32)
    codes = blocks[..., 4:].contiguous().view(torch.float8_e4m3fn)
    return (codes.float() * scales).double()
