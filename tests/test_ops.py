"""Arithmetic v1: the bits of the oracle on every ISA, thread count and number of tokens."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from op_cases import (
    EXPERT_CASES,
    LINEAR_CASES,
    ExpertCase,
    LinearCase,
    activations,
    cols_of,
    misaligned,
    packed_weight,
)
from torch import Tensor
from torch.nn import functional

from moe_offload import _native, ops
from moe_offload.errors import ConfigError
from moe_offload.ops import Activation, ActivationKind, ExpertKernel
from moe_offload.storage.expert_format import (
    FLOAT_TYPES,
    ExpertLayout,
    GgmlType,
    MatrixFormat,
    RowOrder,
    row_bytes,
)

GOLDEN = Path(__file__).parent / "golden" / "ops.npz"
ISAS = _native.available_isas()
FLOATS = sorted(FLOAT_TYPES)


@pytest.fixture(autouse=True)
def restore_isa_and_threads() -> Iterator[None]:
    num_threads = ops.num_threads()
    yield
    _native.force_isa("")
    ops.set_num_threads(num_threads)


def linear(case: LinearCase) -> Tensor:
    return ops.linear(case.x(), torch.from_numpy(case.weight()), case.ggml_type, case.rows, case.cols)


def assert_same_bits(actual: Tensor, expected: Tensor | np.ndarray) -> None:
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == torch.float32
    different = actual.view(torch.int32) != expected.view(torch.int32)
    if different.any():
        first = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(different.sum())} of {different.numel()} differ, first at {first}: "
            f"{actual[first]!r} != {expected[first]!r}"
        )


def assert_as_accurate_as(actual: Tensor, baseline: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """``actual`` may miss ``exact`` (float64) by ``factor`` times what plain PyTorch (``baseline``) does."""
    allowed = factor * (baseline.double() - exact).abs().max()
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"max error {error:.3e}, allowed {allowed:.3e}"


# ---- the oracle itself


def test_the_oracles_fma_is_libms() -> None:
    libm = ctypes.CDLL("libm.so.6")
    libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4000)).astype(np.float32)
    scale = np.ldexp(np.float32(1), rng.integers(-30, 30, 4000))
    c = np.concatenate([-(a * b)[:2000], (a * b)[2000:] * scale[2000:]])  # cancellation, then far apart
    wanted = [libm.fmaf(*(float(v) for v in values)) for values in zip(a, b, c, strict=True)]
    assert_same_bits(torch.from_numpy(reference.fma(a, b, c)), np.array(wanted, np.float32))


# ---- linear


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.id)
def test_linear_has_the_bits_of_the_oracle(case: LinearCase, isa: str) -> None:
    _native.force_isa(isa)
    expected = reference.linear(case.x().numpy(), case.weight(), case.ggml_type.name)
    assert_same_bits(linear(case), expected)


@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.id)
def test_linear_is_as_accurate_as_pytorch_on_the_same_numbers(case: LinearCase) -> None:
    """The same numbers: for quantized weights, activations as quantized to int8."""
    weight = torch.from_numpy(reference.dequantize(case.weight(), case.ggml_type.name))
    x = case.x()
    if case.ggml_type not in FLOAT_TYPES:
        q, d = reference.quantize_activations(x.numpy())
        x = torch.from_numpy(q).double() * torch.from_numpy(d).double().repeat_interleave(32, dim=1)
    exact = functional.linear(x.double(), weight.double())
    assert_as_accurate_as(linear(case), functional.linear(x.float(), weight), exact)


@pytest.mark.parametrize("ggml_type", GgmlType, ids=lambda t: t.name)
def test_bits_do_not_depend_on_isa_threads_or_tokens(ggml_type: GgmlType) -> None:
    rows, cols = 70, cols_of(ggml_type)
    weight = torch.from_numpy(packed_weight(ggml_type, rows, cols, seed=3))
    x = activations(33, cols, seed=4)
    _native.force_isa(ISAS[0])
    ops.set_num_threads(1)
    expected = torch.cat([ops.linear(x[t : t + 1], weight, ggml_type, rows, cols) for t in range(33)])
    for isa in ISAS:
        _native.force_isa(isa)
        for num_threads in (1, 2):
            ops.set_num_threads(num_threads)
            for tokens in (1, 2, 5, 33):
                assert_same_bits(ops.linear(x[:tokens], weight, ggml_type, rows, cols), expected[:tokens])


@pytest.mark.parametrize("ggml_type", FLOATS, ids=lambda t: t.name)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (31, 45), (70, 33), (40, 64)])
def test_a_transposed_matrix_gives_the_bits_of_the_other_order(
    ggml_type: GgmlType, rows: int, cols: int
) -> None:
    packed = packed_weight(ggml_type, rows, cols, seed=1)
    element = packed.view(f"u{packed.shape[1] // cols}")
    stored = torch.from_numpy(np.ascontiguousarray(element.T).view(np.uint8))
    x, bias = activations(34, cols, seed=2), activations(1, rows, seed=3)[0]
    expected = ops.linear(x, torch.from_numpy(packed), ggml_type, rows, cols, bias)
    for isa in ISAS:
        _native.force_isa(isa)
        assert_same_bits(ops.linear(x, stored, ggml_type, rows, cols, bias, transposed=True), expected)


def test_a_bias_is_added_last() -> None:
    case = LINEAR_CASES[2]
    bias = activations(1, case.rows, seed=9)[0]
    weight = torch.from_numpy(case.weight())
    with_bias = ops.linear(case.x(), weight, case.ggml_type, case.rows, case.cols, bias)
    assert_same_bits(with_bias, linear(case) + bias)


@pytest.mark.parametrize("ggml_type", GgmlType, ids=lambda t: t.name)
def test_weights_may_start_at_any_address(ggml_type: GgmlType) -> None:
    rows, cols = 5, cols_of(ggml_type)
    packed, x = packed_weight(ggml_type, rows, cols, seed=5), activations(2, cols, seed=6)
    expected = ops.linear(x, torch.from_numpy(packed), ggml_type, rows, cols)
    for offset in (1, 2, 3, 7, 16, 31):
        shifted = torch.from_numpy(misaligned(packed, offset))
        assert_same_bits(ops.linear(x, shifted, ggml_type, rows, cols), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_non_finite_activations_are_cut_and_nan_is_zero(isa: str) -> None:
    _native.force_isa(isa)
    x = activations(4, 64, seed=7)
    x[0, 3], x[0, 40], x[1, 5], x[2, 32:] = torch.inf, -torch.inf, torch.nan, torch.inf
    x[3] *= 1e-38 / x[3].abs().max()  # 127 / amax overflows
    packed = packed_weight(GgmlType.Q8_0, 3, 64, seed=8)
    actual = ops.linear(x, torch.from_numpy(packed), GgmlType.Q8_0, 3, 64)
    assert_same_bits(actual, reference.linear(x.numpy(), packed, "Q8_0"))
    assert actual.isfinite().all()


def test_flush_to_zero_of_the_caller_does_not_change_the_bits() -> None:
    x = activations(1, 32, seed=1) * 1e-40
    weight = torch.from_numpy(packed_weight(GgmlType.F32, 4, 32, seed=2))
    expected = ops.linear(x, weight, GgmlType.F32, 4, 32)
    assert (expected != 0).any()
    assert torch.set_flush_denormal(True)
    try:
        actual = ops.linear(x, weight, GgmlType.F32, 4, 32)
        assert float(torch.tensor([1e-40]) * 1.0) == 0.0, "the caller's mode must come back"
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(actual, expected)


# ---- embedding rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("ggml_type", GgmlType, ids=lambda t: t.name)
def test_embedding_rows_are_gguf_pys_to_the_bit(ggml_type: GgmlType, isa: str) -> None:
    _native.force_isa(isa)
    rows, cols = 9, cols_of(ggml_type)
    packed = packed_weight(ggml_type, rows, cols, seed=11)
    ids = torch.tensor([8, 0, 3, 3, 7])
    expected = reference.dequantize(packed, ggml_type.name)[ids.numpy()]
    assert_same_bits(ops.embedding_rows(ids, torch.from_numpy(packed), ggml_type, rows, cols), expected)


# ---- experts


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

    def rows(self, hidden: Tensor, tokens_of: dict[int, list[int]]) -> Tensor:
        counts = [len(tokens) for tokens in tokens_of.values()]
        return self.kernel().rows(
            hidden,
            np.array(list(tokens_of), np.int32),
            self.addresses(list(tokens_of)),
            np.cumsum([0, *counts]).astype(np.int32),
            np.array([t for tokens in tokens_of.values() for t in tokens], np.int32),
        )


@pytest.mark.parametrize("case", EXPERT_CASES, ids=lambda case: case.name)
def test_expert_rows_have_the_bits_of_the_oracle(case: ExpertCase) -> None:
    layer = Layer(case)
    hidden = activations(4, case.hidden_size, seed=20)
    tokens_of = {2: [1, 3], 0: [0, 1, 2]}
    expected = np.concatenate([layer.oracle(hidden[tokens], e) for e, tokens in tokens_of.items()])
    for isa in ISAS:
        _native.force_isa(isa)
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


@pytest.mark.parametrize("case", EXPERT_CASES, ids=lambda case: case.name)
def test_a_float_expert_is_as_accurate_as_pytorch(case: ExpertCase) -> None:
    layer = Layer(case)
    if not set(case.types) <= FLOAT_TYPES:
        pytest.skip("quantized activations: the oracle's bits are the test")
    hidden = activations(6, case.hidden_size, seed=22)
    weights = [torch.from_numpy(m) for m in layer.memory[1]]
    biases = [None if b is None else b[1] for b in (layer.gate_up_bias, layer.down_bias)]
    exact = ops.expert_reference(hidden, weights, layer.layout, layer.activation, *biases)
    *gate_up, down = [ops.dequantize(w, m).float() for w, m in zip(weights, layer.matrices, strict=True)]
    both = functional.linear(hidden, torch.cat(gate_up), biases[0])
    gate, up = (both[:, ::2], both[:, 1::2]) if case.row_order is RowOrder.INTERLEAVED else both.chunk(2, -1)
    plain = functional.linear(ops.activate_reference(layer.activation, gate, up), down, biases[1])
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
    ops.weighted_sum(out, layer.rows(hidden, tokens_of), np.array([t for t, _ in pairs], np.int32), weights)
    np.testing.assert_allclose(out.numpy(), exact, rtol=0, atol=2e-6 * np.abs(exact).max())


@pytest.mark.parametrize("kind", ActivationKind, ids=lambda kind: kind.name)
def test_an_activation_is_as_accurate_as_pytorchs(kind: ActivationKind) -> None:
    """An identity expert: one column, weights 1, so that what comes out is the activation."""
    gate = torch.linspace(-30, 30, 4001)
    up = torch.linspace(-1, 3, 4001)
    expected = ops.activate_reference(Activation(kind), gate.double(), up.double())
    plain = ops.activate_reference(Activation(kind), gate, up)
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


# ---- weighted sum


@pytest.mark.parametrize("pairs", [1, 7, 90])
def test_weighted_sum_adds_pairs_in_order_without_fma(pairs: int) -> None:
    rng = np.random.default_rng(pairs)
    rows, out = activations(pairs, 130, seed=1), activations(5, 130, seed=2)
    tokens = rng.integers(0, 5, pairs).astype(np.int32)
    weights = torch.from_numpy(rng.uniform(0, 1, pairs).astype(np.float32))
    expected = out.clone()
    ops.weighted_sum_reference(expected, rows, tokens, weights)
    for isa in ISAS:
        _native.force_isa(isa)
        actual = out.clone()
        ops.weighted_sum(actual, rows, tokens, weights)
        assert_same_bits(actual, expected)


# ---- goldens: arithmetic v1 does not drift


def test_golden_vectors() -> None:
    golden = np.load(GOLDEN)
    names = [key.removesuffix("/packed") for key in golden.files if key.endswith("/packed")]
    assert set(names) == {t.name for t in GgmlType}
    for name in names:
        packed, x = golden[f"{name}/packed"], golden[f"{name}/x"]
        for isa in ISAS:
            _native.force_isa(isa)
            actual = ops.linear(
                torch.from_numpy(x), torch.from_numpy(packed), GgmlType[name], len(packed), x.shape[1]
            )
            assert_same_bits(actual, golden[f"{name}/y"])


@pytest.mark.parametrize("kind", ActivationKind, ids=lambda kind: kind.name)
def test_golden_activations(kind: ActivationKind) -> None:
    golden = np.load(GOLDEN)
    gate, up = (torch.from_numpy(golden[f"activation/{name}"]) for name in ("gate", "up"))
    for isa in ISAS:
        _native.force_isa(isa)
        assert_same_bits(activate(kind, gate, up), golden[f"activation/{kind.name}"])


# ---- checks


def q4_0(rows: int = 4, cols: int = 64) -> Tensor:
    return torch.from_numpy(packed_weight(GgmlType.Q4_0, rows, cols, seed=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 64).bfloat16()}, r"x must have dtype torch.float32, got torch.bfloat16"),
        ({"x": torch.zeros(2, 32)}, r"linear: x must have shape \(any, 64\), got \(2, 32\)"),
        ({"x": torch.zeros(64, 2).T}, r"linear: x must be contiguous on the CPU, got not contiguous on cpu"),
        ({"rows": 5}, r"linear: bytes of weight must be 180, got 144"),
        ({"rows": 0}, r"linear: weight must have between 1 and 2\^31 rows and columns, got 0 x 64"),
        ({"cols": 48, "x": torch.zeros(2, 48)}, r"ggml type 2 must have columns in blocks of 32, got 48"),
        ({"ggml_type": 5}, r"linear: weight has ggml type 5, which has no kernel"),
        ({"transposed": True}, r"ggml type 2 cannot be transposed: only F32, F16 and BF16 can"),
        ({"bias": torch.zeros(3)}, r"linear: bias must have shape \(4\), got \(3,\)"),
    ],
)  # fmt: skip
def test_linear_names_what_is_wrong(arguments: dict[str, object], message: str) -> None:
    valid = {"x": torch.zeros(2, 64), "weight": q4_0(), "ggml_type": GgmlType.Q4_0, "rows": 4, "cols": 64}
    with pytest.raises(ConfigError, match=message):
        ops.linear(**{**valid, **arguments})


@pytest.mark.parametrize("bad_id", [-1, 4])
def test_an_embedding_id_out_of_range_is_named(bad_id: int) -> None:
    with pytest.raises(ConfigError, match=rf"embedding_rows: ids\[1\] must be in \[0, 4\), got {bad_id}"):
        ops.embedding_rows(torch.tensor([0, bad_id]), q4_0(), GgmlType.Q4_0, 4, 64)


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


def test_an_op_on_nothing_returns_nothing() -> None:
    assert ops.linear(torch.zeros(0, 64), q4_0(), GgmlType.Q4_0, 4, 64).shape == (0, 4)
    assert Layer(EXPERT_CASES[0]).rows(torch.zeros(0, 64), {}).shape == (0, 64)


# ---- threads, processes, signals


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_an_unknown_isa_is_refused_by_name() -> None:
    done = run_python("from moe_offload import _native; _native.isa()", MOE_OFFLOAD_ISA="mmx")
    assert "ConfigError: MOE_OFFLOAD_ISA=mmx is not one of the instruction sets" in done.stderr
    assert f"offers: {', '.join(ISAS)}" in done.stderr


def test_the_isa_named_in_the_environment_is_used() -> None:
    done = run_python("from moe_offload import _native; print(_native.isa())", MOE_OFFLOAD_ISA=ISAS[0])
    assert done.stdout.strip() == ISAS[0]


def test_a_forked_child_gets_an_error_and_exits() -> None:
    done = run_python("""
        import os, sys, torch
        from moe_offload import ops
        from moe_offload.errors import ConfigError
        from moe_offload.storage.expert_format import GgmlType
        def op():
            return ops.linear(torch.ones(1, 8), torch.zeros(32, dtype=torch.uint8), GgmlType.F32, 1, 8)
        ops.set_num_threads(2)
        op()
        if pid := os.fork():
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        try:
            op()
        except ConfigError as error:
            sys.exit(7 if "use the spawn start method" in str(error) else 1)
    """)
    assert done.returncode == 7, done.stderr


def test_ctrl_c_stops_a_long_op_within_a_second() -> None:
    x = torch.zeros(4096, 4096)
    weight = torch.zeros(4096 * row_bytes(GgmlType.IQ2_XS, 4096), dtype=torch.uint8)
    ops.set_num_threads(2)
    sent: list[float] = []

    def interrupt() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.2, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(100):
            ops.linear(x, weight, GgmlType.IQ2_XS, 4096, 4096)
    timer.join()
    assert time.monotonic() - sent[0] < 1.0
    assert_same_bits(linear(LINEAR_CASES[0]), linear(LINEAR_CASES[0]))  # the pool works on


def test_ops_of_several_threads_take_turns() -> None:
    case = LINEAR_CASES[3]
    expected, results = linear(case), [None] * 8

    def work(i: int) -> None:
        for _ in range(20):
            results[i] = linear(case)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_same_bits(result, expected)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "40000 100000"}, 1),
        (
            {
                "proc/self/cgroup": "3:cpuset:/x\n2:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "120000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            1,
        ),
    ],
)
def test_usable_cores_respect_cgroup_quotas(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _native.usable_cores(str(tmp_path)) == (expected or len(os.sched_getaffinity(0)))


def test_hardware_threads_of_one_core_count_once(tmp_path: Path) -> None:
    for cpu in os.sched_getaffinity(0):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text("0-255")
    assert _native.usable_cores(str(tmp_path)) == 1
