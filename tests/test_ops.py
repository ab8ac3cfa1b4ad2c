"""Linear, embedding rows and weighted sum: the oracle's bits on every ISA, for any threads and tokens."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import reference
import torch
from make_golden_ops import GOLDEN
from op_cases import LINEAR_CASES, LinearCase, activations, cols_of, misaligned, packed_weight
from op_helpers import assert_as_accurate_as, assert_same_bits, restore_isa_and_threads  # noqa: F401
from torch import Tensor
from torch.nn import functional

from moe_offload import _native, expert_ops, ops
from moe_offload.errors import ConfigError
from moe_offload.storage.expert_format import BLOCK_SIZES, FLOAT_TYPES, GgmlType

ISAS = _native.available_isas()
FLOATS = sorted(FLOAT_TYPES)

pytestmark = pytest.mark.usefixtures("restore_isa_and_threads")


def linear(case: LinearCase) -> Tensor:
    return ops.linear(case.x(), torch.from_numpy(case.weight()), case.ggml_type, case.rows, case.cols)


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
            for tokens in (1, 2, 5, 16, 17, 23, 33):
                assert_same_bits(ops.linear(x[:tokens], weight, ggml_type, rows, cols), expected[:tokens])


@pytest.mark.parametrize("ggml_type", [t for t in GgmlType if t not in FLOAT_TYPES], ids=lambda t: t.name)
def test_the_largest_codes_and_activations_do_not_wrap(ggml_type: GgmlType) -> None:
    """Every byte of the codes 255 or 0, every activation +127 or -127: the largest sums on the way."""
    rows, cols = 5, cols_of(ggml_type)
    x = torch.full((2, cols), 127.0)
    x[1] = -127.0
    for byte in (0, 255):
        packed = packed_weight(ggml_type, rows, cols, seed=12)
        blocks = packed.reshape(-1, BLOCK_SIZES[ggml_type].num_bytes)
        filled = np.full_like(blocks, byte)
        scales = slice(0, 0) if ggml_type.name not in reference.SCALE_PLACES else None
        if scales is None:
            place = reference.SCALE_PLACES[ggml_type.name]
            for start in (place.d, place.minimum):
                if start is not None:
                    filled[:, start : start + 2] = np.float16([0.5]).view(np.uint8)
        elif byte == 255:
            filled = np.where(blocks == 255, blocks, 126).astype(np.uint8)  # scales stay finite
        packed = filled.reshape(packed.shape)
        expected = reference.linear(x.numpy(), packed, ggml_type.name)
        for isa in ISAS:
            _native.force_isa(isa)
            for t in (slice(0, 2), slice(0, 1), slice(1, 2)):  # the tiles of tokens, and of one token
                actual = ops.linear(x[t], torch.from_numpy(packed), ggml_type, rows, cols)
                assert_same_bits(actual, expected[t])


def test_fast_kernels_are_told_from_the_generic_path() -> None:
    _native.force_isa(ISAS[0])
    assert ops.has_fast_kernel(GgmlType.F16)
    assert not ops.has_fast_kernel(GgmlType.TQ1_0)
    if len(ISAS) > 1:
        assert not ops.has_fast_kernel(GgmlType.Q4_1)
        _native.force_isa(ISAS[-1])
        assert ops.has_fast_kernel(GgmlType.Q4_1)
        assert not ops.has_fast_kernel(GgmlType.IQ2_XS)


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


@pytest.mark.parametrize(
    ("ggml_type", "sub_scales", "sub_scale_byte", "largest"),
    [
        (GgmlType.Q6_K, slice(192, 208), 0x80, 32 * 32 * 128 * 127),  # codes and scales: all bits zero, -128
        (GgmlType.IQ4_XS, slice(2, 8), 0, 32 * 127 * 32 * 127),
    ],
)
def test_the_largest_sums_of_a_block_are_exact(
    ggml_type: GgmlType, sub_scales: slice, sub_scale_byte: int, largest: int
) -> None:
    packed = np.zeros((1, BLOCK_SIZES[ggml_type].num_bytes), np.uint8)
    packed[:, sub_scales] = sub_scale_byte
    scale = reference.SCALE_PLACES[ggml_type.name].d
    packed[:, scale : scale + 2] = np.float16([1]).view(np.uint8)
    x = torch.zeros(1, 256)
    x[:, 32:64] = 127.0  # d is 1 and every code 127
    for isa in ISAS:
        _native.force_isa(isa)
        assert ops.linear(x, torch.from_numpy(packed), ggml_type, 1, 256).item() == largest


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
@pytest.mark.parametrize("cols", [64, 544])  # superblocks without such values are quantized by another path
def test_non_finite_activations_are_cut_and_nan_is_zero(isa: str, cols: int) -> None:
    _native.force_isa(isa)
    x = activations(4, cols, seed=7)
    x[0, 3], x[0, 40], x[1, 5], x[2, 32:] = torch.inf, -torch.inf, torch.nan, torch.inf
    x[3, :64] *= 1e-38 / x[3].abs().max()  # 127 / amax overflows
    packed = packed_weight(GgmlType.Q8_0, 3, cols, seed=8)
    actual = ops.linear(x, torch.from_numpy(packed), GgmlType.Q8_0, 3, cols)
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


# ---- weighted sum


@pytest.mark.parametrize("pairs", [1, 7, 90])
def test_weighted_sum_adds_pairs_in_order_without_fma(pairs: int) -> None:
    rng = np.random.default_rng(pairs)
    rows, out = activations(pairs, 130, seed=1), activations(5, 130, seed=2)
    tokens = rng.integers(0, 5, pairs).astype(np.int32)
    weights = torch.from_numpy(rng.uniform(0, 1, pairs).astype(np.float32))
    expected = out.clone()
    expert_ops.weighted_sum_reference(expected, rows, tokens, weights)
    for isa in ISAS:
        _native.force_isa(isa)
        actual = out.clone()
        expert_ops.weighted_sum(actual, rows, tokens, weights)
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


def test_a_linear_on_no_tokens_returns_no_rows() -> None:
    assert ops.linear(torch.zeros(0, 64), q4_0(), GgmlType.Q4_0, 4, 64).shape == (0, 4)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_read_bandwidth_reads_whole_mebibytes(num_threads: int) -> None:
    ops.set_num_threads(num_threads)
    data = np.ones((5 << 20) // 2, np.uint8)
    assert 0 < _native.read_bandwidth(data.ctypes.data, data.size) < np.inf
    with pytest.raises(ConfigError, match="read_bandwidth: needs at least 1 MiB to read"):
        _native.read_bandwidth(data.ctypes.data, (1 << 20) - 1)
