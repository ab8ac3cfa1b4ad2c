"""The CUDA kernels' own source over a stand-in for a grid: every format and tile gives the CPU's bits.

What stays for a card: that nvcc's code does what the source says, memory, and races.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from op_cases import activations, cols_of, misaligned, packed_weight
from op_helpers import assert_same_bits
from reference import activate

from moe_offload import ops
from moe_offload.expert_ops import Activation, ActivationKind
from moe_offload.storage.expert_format import FAST_TYPES, FLOAT_TYPES, GgmlType, OwnType, RowOrder, WeightType

PACKED = sorted(FAST_TYPES - FLOAT_TYPES)
FLOATS = [*sorted(FLOAT_TYPES), OwnType.F8_E4M3]
NO_ACTIVATION = Activation(ActivationKind.SILU)


@pytest.fixture(scope="module")
def kernels(stand_in: str) -> ctypes.CDLL:
    return ctypes.CDLL(stand_in)


def pointer(array: NDArray[np.generic] | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def rows_of(
    kernels: ctypes.CDLL,
    ggml_type: WeightType,
    weights: NDArray[np.uint8],
    x: NDArray[np.float32],
    rows: int,
    *,
    up: NDArray[np.uint8] | None = None,
    bias: NDArray[np.float32] | None = None,
    up_bias: NDArray[np.float32] | None = None,
    input_rows: NDArray[np.int32] | None = None,
    row_order: RowOrder | None = None,
    activation: Activation = NO_ACTIVATION,
    transposed: bool = False,
    tensor_cores: bool = True,
) -> torch.Tensor:
    """(pairs, rows); ``row_order`` makes it gate and up."""
    num_pairs = len(x) if input_rows is None else len(input_rows)
    out = np.full((num_pairs, rows), np.nan, np.float32)
    error = kernels.cuda_rows(
        int(ggml_type),
        int(transposed),
        *map(pointer, (weights, up, bias, up_bias, x)),
        ctypes.c_int64(len(x)),
        pointer(input_rows),
        num_pairs,
        ctypes.c_int64(rows),
        ctypes.c_int64(x.shape[1]),
        int(row_order is not None),
        0 if row_order is None else list(RowOrder).index(row_order),
        int(activation.kind),
        ctypes.c_float(activation.alpha),
        ctypes.c_float(activation.limit),
        int(tensor_cores),
        pointer(out),
    )
    assert error == 0
    return torch.from_numpy(out)


def or_slow(ggml_type: WeightType) -> object:
    """The formats that differ most in how they are unpacked always, the others in the slow tier."""
    always = {GgmlType.Q4_0, GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.MXFP4, GgmlType.BF16}
    return pytest.param(ggml_type, marks=[] if ggml_type in always else pytest.mark.slow)


@pytest.mark.parametrize("tokens", [1, 3, 11], ids=lambda n: f"{n}tokens")
@pytest.mark.parametrize("ggml_type", list(map(or_slow, [*PACKED, *FLOATS])), ids=lambda t: t.name)
def test_a_matrix_times_tokens(kernels: ctypes.CDLL, ggml_type: WeightType, tokens: int) -> None:
    """An odd number of rows, blocks that fill no superblock, bytes that are aligned to nothing."""
    rows, cols = 5, cols_of(ggml_type)
    weights = misaligned(packed_weight(ggml_type, rows, cols, seed=3), 7)
    x, bias = activations(tokens, cols, seed=4), activations(1, rows, seed=5)[0]
    expected = ops.linear(x, torch.from_numpy(weights.reshape(rows, -1)), ggml_type, rows, cols, bias)
    for tensor_cores in (True, False) if ggml_type in PACKED and tokens > 1 else (True,):
        ours = rows_of(
            kernels, ggml_type, weights, x.numpy(), rows, bias=bias.numpy(), tensor_cores=tensor_cores
        )
        assert_same_bits(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("ggml_type", [GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.Q8_0], ids=lambda t: t.name)
def test_more_rows_and_tokens_than_a_tile(kernels: ctypes.CDLL, ggml_type: WeightType) -> None:
    rows, cols, tokens = 33, 768, 35
    weights, x = packed_weight(ggml_type, rows, cols, seed=6), activations(tokens, cols, seed=7)
    expected = ops.linear(x, torch.from_numpy(weights), ggml_type, rows, cols)
    assert_same_bits(rows_of(kernels, ggml_type, weights, x.numpy(), rows), expected)


@pytest.mark.parametrize("row_order", list(RowOrder), ids=lambda order: order.name)
@pytest.mark.parametrize(
    ("ggml_type", "pairs", "transposed"),
    [
        (GgmlType.Q5_1, 1, False),
        (GgmlType.Q5_1, 10, False),
        (GgmlType.BF16, 1, False),
        (GgmlType.BF16, 9, False),
        (GgmlType.BF16, 2, True),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_gate_and_up(
    kernels: ctypes.CDLL, row_order: RowOrder, ggml_type: WeightType, pairs: int, transposed: bool
) -> None:
    """Rows of the inputs in any order, biases, activation: what ExpertKernel makes of the two matrices."""
    units, cols = 19, 96
    both = packed_weight(ggml_type, 2 * units, cols, seed=8)
    bias = activations(1, 2 * units, seed=9)[0].numpy()
    x = activations(4, cols, seed=10)
    input_rows = np.random.default_rng(11).integers(0, 4, pairs).astype(np.int32)
    activation = Activation(ActivationKind.GPT_OSS_SWIGLU)
    y = ops.linear(x, torch.from_numpy(both), ggml_type, 2 * units, cols, torch.from_numpy(bias))
    y = y[torch.from_numpy(input_rows).long()]
    if row_order == RowOrder.INTERLEAVED:
        gate, up = y[:, ::2].contiguous(), y[:, 1::2].contiguous()
    else:
        gate, up = y[:, :units].contiguous(), y[:, units:].contiguous()
    expected = torch.from_numpy(activate(activation.kind.name, gate.numpy(), up.numpy()))
    split = row_order == RowOrder.SPLIT
    parts = [both[:units], both[units:]] if split else [both]
    if transposed:
        parts = [np.ascontiguousarray(part.view(np.uint16).T).view(np.uint8) for part in parts]
    parts = [np.ascontiguousarray(part) for part in parts]
    ours = rows_of(
        kernels,
        ggml_type,
        parts[0],
        x.numpy(),
        units,
        up=parts[1] if split else None,
        bias=bias[:units] if split else bias,
        up_bias=np.ascontiguousarray(bias[units:]) if split else None,
        input_rows=input_rows,
        row_order=row_order,
        activation=activation,
        transposed=transposed,
    )
    assert_same_bits(ours, expected)
