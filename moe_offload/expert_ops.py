"""The experts' part of the door to arithmetic v1 (ops.py): gate, up, activation, down, weighted sum."""

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
from moe_offload.op_arguments import address, check_array, check_bias, check_tensor
from moe_offload.ops import dequantize, set_codebook
from moe_offload.storage.expert_format import ExpertLayout, RowOrder

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
        check_bias(
            "ExpertKernel", "gate_up_bias", gate_up_bias, (num_experts, 2 * layout.moe_intermediate_size)
        )
        check_bias("ExpertKernel", "down_bias", down_bias, (num_experts, hidden_size))
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
            address(gate_up_bias),
            address(down_bias),
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
        check_tensor("ExpertKernel", "pair_weights", pair_weights, torch.float32, (len(pair_tokens),))
        check_tensor("ExpertKernel", "out", out, torch.float32, tuple(hidden.shape))
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
        check_tensor("ExpertKernel", "hidden", hidden, torch.float32, (None, self.layout.hidden_size))
        check_array("ExpertKernel", "expert_ids", expert_ids, np.int32)
        check_array("ExpertKernel", "addresses", addresses, np.uint64)
        check_array("ExpertKernel", "pair_offsets", pair_offsets, np.int32)
        check_array("ExpertKernel", "pair_tokens", pair_tokens, np.int32)


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
    check_tensor("weighted_sum", "out", out, torch.float32, (None, None))
    check_array("weighted_sum", "pair_tokens", pair_tokens, np.int32)
    check_tensor("weighted_sum", "rows", rows, torch.float32, (len(pair_tokens), out.shape[1]))
    check_tensor("weighted_sum", "pair_weights", pair_weights, torch.float32, (len(pair_tokens),))
    _native.weighted_sum(
        out.data_ptr(), len(out), out.shape[1], rows.data_ptr(), pair_tokens, pair_weights.detach().numpy()
    )


def weighted_sum_reference(
    out: Tensor, rows: Tensor, pair_tokens: NDArray[np.int32], pair_weights: Tensor
) -> None:
    """``weighted_sum`` one pair after the other; the same bits in float32, exact order in float64."""
    for pair, token in enumerate(pair_tokens.tolist()):
        out[token] += pair_weights[pair] * rows[pair]
