"""Every block format in every shape of the grid: as accurate as PyTorch, experts to the oracle's bits."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from op_cases import FORMAT_EXPERT_CASES, GRID_TOKENS, ExpertCase, activations, grid_shapes, packed_weight
from op_helpers import assert_as_accurate_as, assert_same_bits, restore_isa_and_threads  # noqa: F401
from test_expert_ops import Layer
from torch.nn import functional

from moe_offload import _native, ops
from moe_offload.storage.expert_format import FLOAT_TYPES, GgmlType

pytestmark = pytest.mark.usefixtures("restore_isa_and_threads")


@pytest.mark.parametrize("ggml_type", GgmlType, ids=lambda t: t.name)
def test_linear_is_as_accurate_as_pytorch_in_every_shape(ggml_type: GgmlType) -> None:
    """On the same numbers: for quantized weights, activations as quantized to int8.

    Not in rows of a single block: there the difference of two sums (codes, mins) may lose more digits than a
    sum of 32 products has. The oracle's bits are held there, too.
    """
    for rows, cols in grid_shapes(ggml_type)[1:]:
        packed = packed_weight(ggml_type, rows, cols, seed=cols)
        weight = torch.from_numpy(reference.dequantize(packed, ggml_type.name))
        actual, plain, exact = [], [], []
        for tokens in GRID_TOKENS:
            x = activations(tokens, cols, seed=tokens)
            actual.append(ops.linear(x, torch.from_numpy(packed), ggml_type, rows, cols))
            if ggml_type not in FLOAT_TYPES:
                q, d = reference.quantize_activations(x.numpy())
                x = torch.from_numpy(q).double() * torch.from_numpy(d).double().repeat_interleave(32, dim=1)
            plain.append(functional.linear(x.float(), weight))
            exact.append(functional.linear(x.double(), weight.double()))
        assert_as_accurate_as(torch.cat(actual), torch.cat(plain), torch.cat(exact))


@pytest.mark.parametrize("ggml_type", GgmlType, ids=lambda t: t.name)
def test_linear_has_the_bits_of_the_oracle_in_every_shape(ggml_type: GgmlType) -> None:
    for rows, cols in grid_shapes(ggml_type):
        packed = packed_weight(ggml_type, rows, cols, seed=cols)
        x = activations(max(GRID_TOKENS), cols, seed=rows)
        expected = torch.from_numpy(reference.linear(x.numpy(), packed, ggml_type.name))
        for isa in _native.available_isas():
            _native.force_isa(isa)
            for tokens in GRID_TOKENS:
                actual = ops.linear(x[:tokens], torch.from_numpy(packed), ggml_type, rows, cols)
                assert_same_bits(actual, expected[:tokens])


@pytest.mark.parametrize("case", FORMAT_EXPERT_CASES, ids=lambda case: case.name)
def test_an_expert_of_every_format_has_the_bits_of_the_oracle(case: ExpertCase) -> None:
    layer = Layer(case)
    for tokens_of in ({1: [0]}, {2: [1, 3], 0: [0, 1, 2]}):
        hidden = activations(1 + max(max(tokens) for tokens in tokens_of.values()), case.hidden_size, seed=20)
        expected = np.concatenate([layer.oracle(hidden[tokens], e) for e, tokens in tokens_of.items()])
        for isa in _native.available_isas():
            _native.force_isa(isa)
            assert_same_bits(layer.rows(hidden, tokens_of), expected)
