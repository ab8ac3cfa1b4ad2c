"""The typed door to arithmetic v1: torch CPU tensors in, checked, native kernels, tensors out.

Arithmetic v1 gives the same bits on every instruction set, for every number of threads and for
every number of tokens in a call; docs/ARITHMETIC.md says exactly what they are. Each op has a
reference beside it, in float64 on weights that gguf-py dequantized: the numbers that the op
approximates, not its bits (tests/reference.py has an oracle of the bits).

A wrong argument is a ConfigError that names op, argument, wanted and got. Ops release the GIL, run
one at a time and stop for Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moe_offload import _native
from moe_offload.errors import ConfigError
from moe_offload.storage.expert_format import (
    FP8_BLOCK,
    ExpertLayout,
    GgmlType,
    MatrixFormat,
    OwnType,
    RowOrder,
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
_ROW_ORDERS = (RowOrder.GATE_UP, RowOrder.INTERLEAVED, RowOrder.SPLIT)  # csrc/cpu/ops.h


class ActivationKind(IntEnum):
    """What an expert does with gate and up; the numbers are csrc/cpu/kernels.h's."""

    SILU = 0
    GELU_TANH = 1
    GELU_ERF = 2
    RELU = 3
    GPT_OSS_SWIGLU = 4  # gate <= limit, |up| <= limit, gate * sigmoid(alpha * gate) * (up + 1)


@dataclass(frozen=True)
class Activation:
    """``alpha`` and ``limit`` belong to GPT_OSS_SWIGLU."""

    kind: ActivationKind = ActivationKind.SILU
    alpha: float = 1.702
    limit: float = 7.0


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
    _check_tensor("linear", "x", x, torch.float32, (None, cols))
    _check_tensor("linear", "weight", weight, torch.uint8)
    _check_bias("linear", "bias", bias, (rows,))
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
        _address(bias),
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
    _check_tensor("embedding_rows", "ids", ids, torch.int64, (None,))
    _check_tensor("embedding_rows", "weight", weight, torch.uint8)
    set_codebook(ggml_type)
    out = torch.empty(len(ids), cols)
    _native.embedding_rows(
        ids.data_ptr(), len(ids), weight.data_ptr(), weight.numel(), ggml_type, rows, cols, out.data_ptr()
    )
    return out


class ExpertKernel:
    """Gate, up, activation and down of one layer's experts, as unweighted rows or summed.

    Args:
        layout: formats and row order; gate, up and down may differ in type.
        gate_up_bias: (E, 2I) float32 in the order in which the rows are stored.
        down_bias: (E, H) float32.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        activation: Activation,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        num_experts, hidden_size = layout.num_experts, layout.hidden_size
        _check_bias(
            "ExpertKernel", "gate_up_bias", gate_up_bias, (num_experts, 2 * layout.moe_intermediate_size)
        )
        _check_bias("ExpertKernel", "down_bias", down_bias, (num_experts, hidden_size))
        for matrix in layout.matrices:
            set_codebook(matrix.ggml_type)
        self.layout, self.activation = layout, activation
        self.gate_up_bias, self.down_bias = gate_up_bias, down_bias  # native keeps their addresses
        self._native = _native.ExpertKernel(
            [(int(m.ggml_type), m.rows, m.cols, m.transposed) for m in layout.matrices],
            _ROW_ORDERS.index(layout.row_order),
            num_experts,
            activation.kind,
            activation.alpha,
            activation.limit,
            _address(gate_up_bias),
            _address(down_bias),
        )

    @property
    def native(self) -> _native.ExpertKernel:
        """What other native code calls."""
        return self._native

    def rows(
        self,
        hidden: Tensor,
        expert_ids: NDArray[np.int32],
        addresses: NDArray[np.uint64],
        pair_offsets: NDArray[np.int32],
        pair_tokens: NDArray[np.int32],
    ) -> Tensor:
        """Return one row per (token, expert) pair, (P, H) float32.

        Args:
            hidden: (T, H) float32.
            expert_ids: (n,) which biases an expert has.
            addresses: (n, number of matrices) first byte of each matrix, aligned to nothing; the
                bytes stay in place until the call returns.
            pair_offsets: (n + 1,) pairs [pair_offsets[i], pair_offsets[i + 1]) are expert i's.
            pair_tokens: (P,) row of ``hidden`` of each pair.
        """
        self._check_step(hidden, expert_ids, addresses, pair_offsets, pair_tokens)
        out = torch.empty(len(pair_tokens), self.layout.hidden_size)
        self._native.rows(
            hidden.data_ptr(), len(hidden), expert_ids, addresses, pair_offsets, pair_tokens, out.data_ptr()
        )
        return out

    def sum(
        self,
        hidden: Tensor,
        expert_ids: NDArray[np.int32],
        addresses: NDArray[np.uint64],
        pair_offsets: NDArray[np.int32],
        pair_tokens: NDArray[np.int32],
        pair_weights: Tensor,
        out: Tensor,
    ) -> None:
        """Add ``pair_weights[p]`` times row p of ``rows`` to ``out[pair_tokens[p]]``, in place.

        The bits are those of ``rows`` and ``weighted_sum``: the caller orders experts by id.

        Args:
            pair_weights: (P,) float32.
            out: (T, H) float32.
        """
        self._check_step(hidden, expert_ids, addresses, pair_offsets, pair_tokens)
        _check_tensor("ExpertKernel", "pair_weights", pair_weights, torch.float32, (len(pair_tokens),))
        _check_tensor("ExpertKernel", "out", out, torch.float32, tuple(hidden.shape))
        self._native.sum(
            hidden.data_ptr(),
            len(hidden),
            expert_ids,
            addresses,
            pair_offsets,
            pair_tokens,
            pair_weights.detach().numpy(),
            out.data_ptr(),
        )

    def _check_step(
        self,
        hidden: Tensor,
        expert_ids: NDArray[np.int32],
        addresses: NDArray[np.uint64],
        pair_offsets: NDArray[np.int32],
        pair_tokens: NDArray[np.int32],
    ) -> None:
        _check_tensor("ExpertKernel", "hidden", hidden, torch.float32, (None, self.layout.hidden_size))
        _check_array("ExpertKernel", "expert_ids", expert_ids, np.int32)
        _check_array("ExpertKernel", "addresses", addresses, np.uint64)
        _check_array("ExpertKernel", "pair_offsets", pair_offsets, np.int32)
        _check_array("ExpertKernel", "pair_tokens", pair_tokens, np.int32)


def expert_reference(
    hidden: Tensor,
    matrices: Sequence[Tensor],
    layout: ExpertLayout,
    activation: Activation,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """One expert on every token in float64: (T, H), the packed matrices, (2I,), (H,) -> (T, H)."""
    *gate_up, down = [dequantize(b, f) for b, f in zip(matrices, layout.matrices, strict=True)]
    both = hidden.double() @ torch.cat(gate_up).T
    if gate_up_bias is not None:
        both = both + gate_up_bias.double()
    if layout.row_order is RowOrder.INTERLEAVED:
        gate, up = both[:, ::2], both[:, 1::2]
    else:
        gate, up = both.chunk(2, dim=-1)
    out = activate_reference(activation, gate, up) @ down.T
    return out if down_bias is None else out + down_bias.double()


def activate_reference(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """The activation by PyTorch's own functions, in the dtype of its inputs."""
    match activation.kind:
        case ActivationKind.SILU:
            return functional.silu(gate) * up
        case ActivationKind.GELU_TANH:
            return functional.gelu(gate, approximate="tanh") * up
        case ActivationKind.GELU_ERF:
            return functional.gelu(gate) * up
        case ActivationKind.RELU:
            return functional.relu(gate) * up
        case ActivationKind.GPT_OSS_SWIGLU:
            gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
            return (up + 1) * (gate * torch.sigmoid(gate * activation.alpha))


def weighted_sum(out: Tensor, rows: Tensor, pair_tokens: NDArray[np.int32], pair_weights: Tensor) -> None:
    """Add ``pair_weights[p] * rows[p]`` to ``out[pair_tokens[p]]``, p ascending, in place.

    Two roundings a pair (no fma). The caller orders pairs by expert id.

    Args:
        out: (T, H) float32.
        rows: (P, H) float32.
        pair_tokens: (P,) int32.
        pair_weights: (P,) float32.
    """
    _check_tensor("weighted_sum", "out", out, torch.float32, (None, None))
    _check_array("weighted_sum", "pair_tokens", pair_tokens, np.int32)
    _check_tensor("weighted_sum", "rows", rows, torch.float32, (len(pair_tokens), out.shape[1]))
    _check_tensor("weighted_sum", "pair_weights", pair_weights, torch.float32, (len(pair_tokens),))
    _native.weighted_sum(
        out.data_ptr(), len(out), out.shape[1], rows.data_ptr(), pair_tokens, pair_weights.detach().numpy()
    )


def weighted_sum_reference(
    out: Tensor, rows: Tensor, pair_tokens: NDArray[np.int32], pair_weights: Tensor
) -> None:
    """``weighted_sum`` one pair after the other; the same bits in float32, exact order in float64."""
    for pair, token in enumerate(pair_tokens.tolist()):
        out[token] += pair_weights[pair] * rows[pair]


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


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_bias(op: str, argument: str, bias: Tensor | None, shape: tuple[int, ...]) -> None:
    if bias is not None:
        _check_tensor(op, argument, bias, torch.float32, shape)


def _check_tensor(
    op: str, argument: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...] | None = None
) -> None:
    """Raise ConfigError unless ``tensor`` is contiguous, on the CPU, of ``dtype`` and ``shape``."""
    if tensor.dtype != dtype:
        raise ConfigError(f"{op}: {argument} must have dtype {dtype}, got {tensor.dtype}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        kind = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise ConfigError(f"{op}: {argument} must be contiguous on the CPU, got {kind} on {tensor.device}")
    if shape is None:
        return
    matches = len(shape) == tensor.ndim and all(
        wanted in (None, got) for wanted, got in zip(shape, tensor.shape, strict=True)
    )
    if not matches:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ConfigError(f"{op}: {argument} must have shape ({wanted}), got {tuple(tensor.shape)}")


def _check_array(op: str, argument: str, array: NDArray[np.generic], dtype: type[np.generic]) -> None:
    if array.dtype != dtype or not array.flags.c_contiguous:
        kind = "contiguous" if array.flags.c_contiguous else "not contiguous"
        raise ConfigError(
            f"{op}: {argument} must be a contiguous {dtype.__name__} array, got {kind} {array.dtype}"
        )
