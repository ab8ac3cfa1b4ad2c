"""The expert op: the oracle's bits for each layout, biases, activations; rows do not depend on company."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from make_golden_ops import GOLDEN
from op_cases import EXPERT_CASES, ExpertCase, activations, misaligned, packed_weight
from op_helpers import assert_as_accurate_as, assert_same_bits, restore_isa_and_threads  # noqa: F401
from torch import Tensor
from torch.nn import functional

from moe_offload import _native, expert_ops, ops
from moe_offload.errors import ConfigError
from moe_offload.expert_ops import Activation, ActivationKind, ExpertKernel
from moe_offload.storage.expert_format import FLOAT_TYPES, ExpertLayout, GgmlType, MatrixFormat, RowOrder

ISAS = _native.available_isas()
FLOAT_EXPERTS = [case for case in EXPERT_CASES if set(case.types) <= FLOAT_TYPES]

pytestmark = pytest.mark.usefixtures("restore_isa_and_threads")


class Layer:
    """The packed experts of a case in unaligned memory, with biases."""

    num_experts = 3

    def __init__(self, case: ExpertCase) -> None:
        hidden_size, units = case.hidden_size, case.intermediate_size
        self.case = case
        split = case.row_order is RowOrder.SPLIT
        shapes = [(units if split else 2 * units, hidden_size)] * (2 if split else 1) + [(hidden_size, units)]
        self.matrices = tuple(
            MatrixFormat(ggml_type, rows, cols, case.transposed)
            for ggml_type, (rows, cols) in zip(case.types, shapes, strict=True)
        )
        self.layout = ExpertLayout(0, self.num_experts, case.row_order, self.matrices)
        self.packed = [
            [packed_weight(m.ggml_type, m.rows, m.cols, seed=10 * e + i) for i, m in enumerate(self.matrices)]
            for e in range(self.num_experts)
        ]
        self.memory = [
            [misaligned(self._stored(packed, m), 1 + 3 * i) for i, (packed, m) in enumerate(self._pairs(e))]
            for e in range(self.num_experts)
        ]
        self.gate_up_bias = activations(self.num_experts, 2 * units, seed=50) if case.bias else None
        self.down_bias = activations(self.num_experts, hidden_size, seed=51) if case.bias else None
        self.activation = Activation(case.kind)

    def _pairs(self, expert_id: int) -> list[tuple[np.ndarray, MatrixFormat]]:
        return list(zip(self.packed[expert_id], self.matrices, strict=True))

    @staticmethod
    def _stored(packed: np.ndarray, matrix: MatrixFormat) -> np.ndarray:
        if not matrix.transposed:
            return packed
        element = packed.view(f"u{packed.shape[1] // matrix.cols}")
        return np.ascontiguousarray(element.T).view(np.uint8)

    def kernel(self) -> ExpertKernel:
        return ExpertKernel(self.layout, self.activation, self.gate_up_bias, self.down_bias)

    def addresses(self, expert_ids: list[int]) -> np.ndarray:
        return np.array([[m.ctypes.data for m in self.memory[e]] for e in expert_ids], np.uint64)

    def oracle(self, x: Tensor, expert_id: int) -> np.ndarray:
        named = [(packed, m.ggml_type.name) for packed, m in self._pairs(expert_id)]
        return reference.expert(
            x.numpy(),
            named[:-1],
            named[-1],
            self.case.kind.name,
            interleaved=self.case.row_order is RowOrder.INTERLEAVED,
            gate_up_bias=None if self.gate_up_bias is None else self.gate_up_bias[expert_id].numpy(),
            down_bias=None if self.down_bias is None else self.down_bias[expert_id].numpy(),
        )

    def step(self, hidden: Tensor, tokens_of: dict[int, list[int]]) -> tuple[Tensor, *tuple[np.ndarray, ...]]:
        counts = [len(tokens) for tokens in tokens_of.values()]
        return (
            hidden,
            np.array(list(tokens_of), np.int32),
            self.addresses(list(tokens_of)),
            np.cumsum([0, *counts]).astype(np.int32),
            np.array([t for tokens in tokens_of.values() for t in tokens], np.int32),
        )

    def rows(self, hidden: Tensor, tokens_of: dict[int, list[int]]) -> Tensor:
        return self.kernel().rows(*self.step(hidden, tokens_of))


@pytest.mark.parametrize("case", EXPERT_CASES, ids=lambda case: case.name)
def test_expert_rows_have_the_bits_of_the_oracle(case: ExpertCase) -> None:
    layer = Layer(case)
    hidden = activations(4, case.hidden_size, seed=20)
    tokens_of = {2: [1, 3], 0: [0, 1, 2]}
    expected = np.concatenate([layer.oracle(hidden[tokens], e) for e, tokens in tokens_of.items()])
    for isa in ISAS:
        _native.force_isa(isa)
        assert_same_bits(layer.rows(hidden, tokens_of), expected)


def test_few_of_many_tokens_get_the_rows_that_they_get_alone() -> None:
    """Only their activations are quantized, in a buffer where others' were before."""
    layer = Layer(next(case for case in EXPERT_CASES if not set(case.types) & FLOAT_TYPES))
    other, hidden = (activations(90, layer.case.hidden_size, seed=seed) for seed in (23, 24))
    tokens_of = {0: [7, 80, 31], 1: [80, 2], 2: [31]}
    expected = torch.cat(
        [layer.rows(hidden[tokens], {e: [*range(len(tokens))]}) for e, tokens in tokens_of.items()]
    )
    layer.rows(other, {0: list(range(90))})
    assert_same_bits(layer.rows(hidden, tokens_of), expected)


@pytest.mark.parametrize("case", EXPERT_CASES, ids=lambda case: case.name)
def test_an_experts_row_does_not_depend_on_its_company(case: ExpertCase) -> None:
    layer = Layer(case)
    hidden = activations(70, case.hidden_size, seed=21)
    together = layer.rows(hidden, {0: list(range(70)), 1: [5], 2: list(range(0, 70, 2))})
    ops.set_num_threads(1)
    alone = [layer.rows(hidden[t : t + 1], {0: [0]}) for t in range(70)]
    assert_same_bits(together[:70], torch.cat(alone))
    assert_same_bits(together[70:71], layer.rows(hidden[5:6], {1: [0]}))


@pytest.mark.parametrize("row_order", RowOrder)
def test_many_pairs_have_the_bits_of_few(row_order: RowOrder) -> None:
    """Beyond 2^20 gate and up numbers an activation no longer waits for all rows of its expert."""
    types = (GgmlType.Q8_0,) * (3 if row_order is RowOrder.SPLIT else 2)
    layer = Layer(ExpertCase("many", row_order, types, ActivationKind.SILU, 64, 256, bias=True))
    hidden = activations(701, 64, seed=28)
    many = layer.rows(hidden, {e: list(range(701)) for e in range(3)})
    for e in range(3):
        few = layer.rows(hidden, {e: list(range(701))})
        assert_same_bits(many[701 * e : 701 * (e + 1)], few)


@pytest.mark.parametrize("num_tokens", [1, 40, 300])
def test_sum_has_the_bits_of_rows_and_weighted_sum(num_tokens: int) -> None:
    """With 300 tokens a group of experts ends between two experts, with 40 the columns are shared out.

    One expert has tokens that repeat and come in no order: what is added to one goes before what follows.
    """
    layer = Layer(EXPERT_CASES[1])
    hidden = activations(num_tokens, 256, seed=25)
    repeated = np.random.default_rng(29).integers(0, num_tokens, 2 * num_tokens).tolist()
    tokens_of = {0: list(range(num_tokens)), 1: repeated, 2: list(range(0, num_tokens, 2))}
    arguments = layer.step(hidden, tokens_of)
    weights = torch.from_numpy(np.random.default_rng(26).uniform(0, 1, len(arguments[-1])).astype(np.float32))
    expected = activations(num_tokens, 256, seed=27)
    out = expected.clone()
    expert_ops.weighted_sum(expected, layer.kernel().rows(*arguments), arguments[-1], weights)
    for isa in ISAS:
        _native.force_isa(isa)
        actual = out.clone()
        layer.kernel().sum(*arguments, weights, actual)
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("case", FLOAT_EXPERTS, ids=lambda case: case.name)
def test_a_float_expert_is_as_accurate_as_pytorch(case: ExpertCase) -> None:
    layer = Layer(case)
    hidden = activations(6, case.hidden_size, seed=22)
    weights = [torch.from_numpy(m) for m in layer.memory[1]]
    biases = [None if b is None else b[1] for b in (layer.gate_up_bias, layer.down_bias)]
    exact = expert_ops.expert_reference(hidden, weights, layer.layout, layer.activation, *biases)
    *gate_up, down = [ops.dequantize(w, m).float() for w, m in zip(weights, layer.matrices, strict=True)]
    both = functional.linear(hidden, torch.cat(gate_up), biases[0])
    gate, up = (both[:, ::2], both[:, 1::2]) if case.row_order is RowOrder.INTERLEAVED else both.chunk(2, -1)
    plain = functional.linear(expert_ops.activate_reference(layer.activation, gate, up), down, biases[1])
    assert_as_accurate_as(layer.rows(hidden, {1: list(range(6))}), plain, exact)


def test_a_layer_of_experts_is_close_to_a_naive_float64_one() -> None:
    case = ExpertCase("f32", RowOrder.GATE_UP, (GgmlType.F32,) * 2, ActivationKind.SILU, 24, 40)
    layer = Layer(case)
    hidden = activations(5, 24, seed=23)
    top_k_index = np.array([[2, 0], [1, 2], [0, 1], [2, 1], [0, 2]])
    top_k_weights = np.random.default_rng(24).uniform(0.1, 0.9, (5, 2)).astype(np.float32)
    gate_up, down = (
        np.stack([m[i].view(np.float32) for m in layer.packed]).astype(np.float64) for i in range(2)
    )
    exact = reference.moe_ffn(
        hidden.double().numpy(),
        top_k_index,
        top_k_weights.astype(np.float64),
        gate_up,
        down,
        lambda gate, up: gate / (1 + np.exp(-gate)) * up,
    )
    tokens_of = {e: [t for t in range(5) if e in top_k_index[t]] for e in range(3)}
    pairs = [(t, e) for e, tokens in tokens_of.items() for t in tokens]
    weights = torch.tensor([float(top_k_weights[t, list(top_k_index[t]).index(e)]) for t, e in pairs])
    out = torch.zeros(5, 24)
    expert_ops.weighted_sum(
        out, layer.rows(hidden, tokens_of), np.array([t for t, _ in pairs], np.int32), weights
    )
    np.testing.assert_allclose(out.numpy(), exact, rtol=0, atol=2e-6 * np.abs(exact).max())


@pytest.mark.parametrize("kind", ActivationKind, ids=lambda kind: kind.name)
def test_an_activation_is_as_accurate_as_pytorchs(kind: ActivationKind) -> None:
    """An identity expert: one column, weights 1, so that what comes out is the activation."""
    gate = torch.linspace(-30, 30, 4001)
    up = torch.linspace(-1, 3, 4001)
    expected = expert_ops.activate_reference(Activation(kind), gate.double(), up.double())
    plain = expert_ops.activate_reference(Activation(kind), gate, up)
    actual = activate(kind, gate, up)
    assert_same_bits(actual, oracle_of_activate(kind, gate, up))
    near = gate.abs() < 3
    assert_as_accurate_as(actual[near], plain[near], expected[near])
    assert_as_accurate_as(actual, plain, expected)


def activate(kind: ActivationKind, gate: Tensor, up: Tensor) -> Tensor:
    """Run an activation alone: two inputs go through unit weights, h comes back through another."""
    ones = [np.array(row, np.float32).view(np.uint8) for row in ([1, 0], [0, 1], [1, 0])]
    layout = ExpertLayout(
        0,
        1,
        RowOrder.SPLIT,
        (
            MatrixFormat(GgmlType.F32, 1, 2),
            MatrixFormat(GgmlType.F32, 1, 2),
            MatrixFormat(GgmlType.F32, 2, 1),
        ),
    )
    addresses = np.array([[m.ctypes.data for m in ones]], np.uint64)
    count = len(gate)
    rows = ExpertKernel(layout, Activation(kind)).rows(
        torch.stack([gate, up], dim=1).contiguous(),
        np.zeros(1, np.int32),
        addresses,
        np.array([0, count], np.int32),
        np.arange(count, dtype=np.int32),
    )
    return rows[:, 0].contiguous()


def oracle_of_activate(kind: ActivationKind, gate: Tensor, up: Tensor) -> np.ndarray:
    """The tree of the last projection turns -0 into +0; adding +0 does the same."""
    return reference.activate(kind.name, gate.numpy(), up.numpy()) + np.float32(0)


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_activations_have_the_bits_of_the_oracle(isa: str) -> None:
    _native.force_isa(isa)
    gate = torch.tensor([0.0, 1e-40, 88.5, 90.0, -86.0, -88.0, -100.0, -103.5, -200.0, 3e38, -3e38])
    up = torch.ones_like(gate)
    for kind in (ActivationKind.SILU, ActivationKind.RELU, ActivationKind.GPT_OSS_SWIGLU):
        assert_same_bits(activate(kind, gate, up), oracle_of_activate(kind, gate, up))


@pytest.mark.parametrize("kind", ActivationKind, ids=lambda kind: kind.name)
def test_golden_activations(kind: ActivationKind) -> None:
    golden = np.load(GOLDEN)
    gate, up = (torch.from_numpy(golden[f"activation/{name}"]) for name in ("gate", "up"))
    for isa in ISAS:
        _native.force_isa(isa)
        assert_same_bits(activate(kind, gate, up), golden[f"activation/{kind.name}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_ids": np.array([3], np.int32)}, r"expert_ids\[0\] must be in \[0, 3\), got 3"),
        ({"pair_tokens": np.array([9], np.int32)}, r"pair_tokens\[0\] must be in \[0, 2\), got 9"),
        ({"pair_offsets": np.array([0, 2], np.int32)}, r"last of pair_offsets must be 1, got 2"),
        ({"pair_offsets": np.array([0], np.int32)}, r"length of pair_offsets must be 2, got 1"),
        ({"addresses": np.zeros((1, 3), np.uint64)}, r"addresses\[0, 0\] is null"),
        ({"expert_ids": np.array([0])}, r"expert_ids must be a contiguous int32 array, got contiguous int64"),
    ],
)
def test_the_expert_op_names_what_is_wrong(change: dict[str, np.ndarray], message: str) -> None:
    layer = Layer(EXPERT_CASES[0])
    valid = {
        "expert_ids": np.array([0], np.int32),
        "addresses": layer.addresses([0]),
        "pair_offsets": np.array([0, 1], np.int32),
        "pair_tokens": np.array([0], np.int32),
    }
    with pytest.raises(ConfigError, match=message):
        layer.kernel().rows(activations(2, 64, seed=1), **{**valid, **change})


def test_matrices_that_do_not_fit_together_are_named() -> None:
    down = MatrixFormat(GgmlType.Q4_0, 64, 96)
    layout = ExpertLayout(0, 2, RowOrder.GATE_UP, (MatrixFormat(GgmlType.Q4_0, 100, 64), down))
    with pytest.raises(ConfigError, match="ExpertKernel: rows of gate_up must be 192, got 100"):
        ExpertKernel(layout, Activation())
    with pytest.raises(ConfigError, match=r"down_bias must have shape \(2, 64\), got \(64,\)"):
        ExpertKernel(layout, Activation(), down_bias=torch.zeros(64))


def test_no_pairs_give_no_rows() -> None:
    assert Layer(EXPERT_CASES[0]).rows(torch.zeros(0, 64), {}).shape == (0, 64)
