"""Oracles that import nothing from moe_offload.

- ``linear`` and ``expert``: arithmetic v1 to the bit, slowly and plainly in numpy. Integer codes are
  read off by setting a block's scale to 1 and letting gguf-py dequantize it, so that no unpacking is
  shared with the kernels; fmaf is float64 with rounding to odd, which is exact.
- ``moe_ffn``: a naive mixture-of-experts layer in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

FLOAT_TYPES = ("F32", "F16", "BF16")


class ScalePlace(NamedTuple):
    """Where a block keeps its fp16 scale d (and minimum), and the power of two beside d."""

    d: int
    minimum: int | None = None
    factor: float = 1.0


SCALE_PLACES = {
    "Q4_0": ScalePlace(0),
    "Q4_1": ScalePlace(0, 2),
    "Q5_0": ScalePlace(0),
    "Q5_1": ScalePlace(0, 2),
    "Q8_0": ScalePlace(0),
    "Q2_K": ScalePlace(80, 82),
    "Q3_K": ScalePlace(108),
    "Q4_K": ScalePlace(0, 2),
    "Q5_K": ScalePlace(0, 2),
    "Q6_K": ScalePlace(208),
    "IQ2_XXS": ScalePlace(0, factor=0.125),
    "IQ2_XS": ScalePlace(0, factor=0.125),
    "IQ2_S": ScalePlace(0, factor=0.125),
    "IQ3_XXS": ScalePlace(0, factor=0.25),
    "IQ3_S": ScalePlace(0),
    "IQ1_S": ScalePlace(0, factor=0.125),
    "IQ4_NL": ScalePlace(0),
    "IQ4_XS": ScalePlace(0),
    "TQ1_0": ScalePlace(52),
    "TQ2_0": ScalePlace(64),
}


def fma(a: NDArray[np.generic], b: NDArray[np.generic], c: NDArray[np.generic]) -> Floats:
    """float32 fused multiply-add: the float64 sum is rounded to odd, then once to float32."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)  # exact: 24 + 24 bits
    addend = np.asarray(c, np.float64)
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)  # exact (Knuth's two-sum)
    to_odd = (error != 0) & (total.view(np.int64) & 1 == 0)
    total = np.where(to_odd, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return total.astype(np.float32)


def quantize_activations(x: Floats) -> tuple[NDArray[np.int64], Floats]:
    """(T, cols) -> int8 values (T, cols) and d (T, cols / 32); non-finite x are cut to +-127, NaN is 0."""
    blocks = x.reshape(len(x), -1, 32)
    amax = np.where(np.isfinite(blocks), np.abs(blocks), np.float32(0)).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = np.where(amax > 0, blocks * (np.float32(127) / amax), np.float32(0))
    q = np.rint(np.clip(np.nan_to_num(scaled, nan=0.0, posinf=127.0, neginf=-127.0), -127, 127))
    return q.reshape(x.shape).astype(np.int64), (amax / np.float32(127))[..., 0]


def dequantize(packed: Bytes, ggml_type: str) -> Floats:
    """(rows, row bytes) -> (rows, cols) by gguf-py."""
    values: Floats = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[ggml_type])
    return values


def _with_scales(packed: Bytes, ggml_type: str, d: float, minimum: float = 0.0) -> Bytes:
    """Replace every block's scales; what is left in the dequantized numbers are integers."""
    block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[ggml_type]][1]
    blocks = packed.reshape(-1, block_bytes).copy()
    if ggml_type == "MXFP4":
        blocks[:, 0] = 128  # 2^(128 - 128)
    elif ggml_type == "NVFP4":
        blocks[:, :4] = 0x40  # 2.0, halved
    elif ggml_type == "IQ1_M":  # the four nibbles of d are the tops of four 16-bit words
        words = blocks[:, 48:56].copy().view(np.uint16)
        nibbles = np.float16(d).view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16) & np.uint16(15)
        blocks[:, 48:56] = ((words & 0x0FFF) | nibbles << np.uint16(12)).view(np.uint8)
    else:
        place = SCALE_PLACES[ggml_type]
        blocks[:, place.d : place.d + 2] = np.float16([d]).view(np.uint8)
        if place.minimum is not None:
            blocks[:, place.minimum : place.minimum + 2] = np.float16([minimum]).view(np.uint8)
    return blocks.reshape(packed.shape)


def integer_codes(packed: Bytes, ggml_type: str) -> NDArray[np.int64]:
    """Return code times sub-scale of every weight, (rows, cols)."""
    factor = 0.125 if ggml_type == "IQ1_M" else SCALE_PLACES.get(ggml_type, ScalePlace(0)).factor
    values = dequantize(_with_scales(packed, ggml_type, 1 / factor), ggml_type)
    assert np.array_equal(values, np.rint(values)), f"{ggml_type}: codes are not integers"
    return values.astype(np.int64)


def block_scales(packed: Bytes, ggml_type: str, cols: int) -> Floats:
    """Return the scale of every 16 weights, (rows, cols / 16)."""
    elements, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[ggml_type]]
    blocks = packed.reshape(-1, block_bytes)
    if ggml_type == "MXFP4":
        d = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    elif ggml_type == "NVFP4":
        d = gguf.quants.NVFP4.ue4m3_to_fp32(blocks[:, :4])
    elif ggml_type == "IQ1_M":
        words = blocks[:, 48:56].copy().view(np.uint16) >> np.uint16(12)
        joined = (words << np.array([0, 4, 8, 12], np.uint16)).sum(axis=1, dtype=np.uint16)
        d = joined.view(np.float16).astype(np.float32)[:, None] * np.float32(0.125)
    else:
        place = SCALE_PLACES[ggml_type]
        halves = blocks[:, place.d : place.d + 2].copy().view(np.float16)
        d = halves.astype(np.float32) * np.float32(place.factor)
    return np.repeat(d, elements // 16 // d.shape[1], axis=1).reshape(len(packed), cols // 16)


def minimums(packed: Bytes, ggml_type: str, cols: int) -> tuple[NDArray[np.int64], Floats] | None:
    """Return the integer minimum of every weight and dmin of every 32; None without minimums."""
    place = SCALE_PLACES.get(ggml_type, ScalePlace(0))
    if place.minimum is None:
        return None
    elements, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[ggml_type]]
    halves = packed.reshape(-1, block_bytes)[:, place.minimum : place.minimum + 2].copy().view(np.float16)
    dmin = np.repeat(halves.astype(np.float32), elements // 32, axis=1).reshape(len(packed), cols // 32)
    codes = -dequantize(_with_scales(packed, ggml_type, 0.0, 1.0), ggml_type).astype(np.int64)
    return codes, dmin


def tree(chains: Floats) -> Floats:
    """(..., 8) -> (...): the one order of the final sum."""
    c = np.moveaxis(chains, -1, 0)
    total: Floats = ((c[0] + c[4]) + (c[2] + c[6])) + ((c[1] + c[5]) + (c[3] + c[7]))
    return total


def linear(x: Floats, packed: Bytes, ggml_type: str) -> Floats:
    """(T, cols), (rows, row bytes) -> (T, rows) in arithmetic v1."""
    with np.errstate(all="ignore"):
        if ggml_type in FLOAT_TYPES:
            return linear_float(x, dequantize(packed, ggml_type))
        return _linear_quantized(x, packed, ggml_type)


def linear_float(x: Floats, weight: Floats) -> Floats:
    """(T, cols), (rows, cols) -> (T, rows): element i in chain i mod 8."""
    chains = np.zeros((len(x), len(weight), 8), np.float32)
    for i in range(x.shape[1]):
        chains[..., i % 8] = fma(x[:, None, i], weight[None, :, i], chains[..., i % 8])
    return tree(chains)


def _linear_quantized(x: Floats, packed: Bytes, ggml_type: str) -> Floats:
    q, d_a = quantize_activations(x)
    codes = integer_codes(packed, ggml_type)
    d_w = block_scales(packed, ggml_type, x.shape[1])
    width = 16 if ggml_type == "NVFP4" else 32  # weights that share a scale
    chains = np.zeros((len(x), len(packed), 8), np.float32)
    for begin in range(0, x.shape[1], width):
        part = slice(begin, begin + width)
        isum = q[:, part] @ codes[:, part].T
        assert np.abs(isum).max() < 2**24, f"{ggml_type}: a block's sum is not exact in float32"
        scale = d_w[None, :, begin // 16] * d_a[:, None, begin // 32]
        chain = chains[..., begin // 32 % 8]
        chain[...] = fma(isum, scale, chain)
    y = tree(chains)
    mins = minimums(packed, ggml_type, x.shape[1])
    return y if mins is None else y - _sum_of_minimums(q, d_a, *mins)


def _sum_of_minimums(q: NDArray[np.int64], d_a: Floats, codes: NDArray[np.int64], dmin: Floats) -> Floats:
    chains = np.zeros((len(q), len(codes), 8), np.float32)
    for b in range(d_a.shape[1]):
        part = slice(32 * b, 32 * b + 32)
        scale = dmin[None, :, b] * d_a[:, None, b]
        chains[..., b % 8] = fma(q[:, part] @ codes[:, part].T, scale, chains[..., b % 8])
    return tree(chains)


def exp(x: Floats) -> Floats:
    """Taylor to r^7 after x = n ln2 + r; the shared polynomial of arithmetic v1."""
    f = np.float32
    x = np.minimum(np.maximum(x, f(-104)), f(89))
    n = fma(x, f(float.fromhex("0x1.715476p+0")), f(12582912)) - f(12582912)
    r = fma(n, f(float.fromhex("-0x1.62e400p-1")), x)
    r = fma(n, f(float.fromhex("-0x1.7f7d1cp-20")), r)
    p = np.full_like(x, f(1) / f(5040))
    for divisor in (720, 120, 24, 6, 2, 1, 1):
        p = fma(p, r, f(1) / f(divisor))
    half = np.floor(n / 2).astype(np.int32)
    scaled = p * np.ldexp(f(1), half)
    return scaled * np.ldexp(f(1), n.astype(np.int32) - half)


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + e^-x) in float32."""
    with np.errstate(over="ignore"):
        return np.float32(1) / (np.float32(1) + exp(-x))


ERFC_COEFFICIENTS = (
    "0.2820895314216614 0.28222835063934326 0.24542570114135742 0.18416385352611542 0.06009631231427193 "
    "0.022883804515004158 -0.0018787282751873136 -0.31090450286865234 0.39578524231910706 "
    "-0.1966012865304947 0.03671173006296158"
)


def _gelu_erf(x: Floats) -> Floats:
    f = np.float32
    t = f(1) / fma(f(0.5), np.abs(x) * f(0.70710678118654752), f(1))
    coefficients = [f(c) for c in ERFC_COEFFICIENTS.split()]
    p = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        p = fma(p, t, coefficient)
    tail = f(0.5) * (exp(-((f(0.5) * x) * x)) * (t * p))
    return x * np.where(x < 0, tail, f(1) - tail)


def activate(kind: str, gate: Floats, up: Floats, alpha: float = 1.702, limit: float = 7.0) -> Floats:
    """Arithmetic v1 of an activation; ``kind`` is the name of the enum's member."""
    f = np.float32
    if kind == "SILU":
        return gate * sigmoid(gate) * up
    if kind == "GELU_TANH":
        return gate * sigmoid(f(1.5957691216057308) * fma(f(0.044715) * gate * gate, gate, gate)) * up
    if kind == "GELU_ERF":
        return _gelu_erf(gate) * up
    if kind == "RELU":
        return np.maximum(gate, f(0)) * up
    gate, up = np.minimum(gate, f(limit)), np.clip(up, f(-limit), f(limit))
    with np.errstate(over="ignore"):
        return (up + f(1)) * (gate * sigmoid(f(alpha) * gate))


def expert(
    x: Floats,
    gate_up: list[tuple[Bytes, str]],
    down: tuple[Bytes, str],
    kind: str,
    *,
    interleaved: bool = False,
    gate_up_bias: Floats | None = None,
    down_bias: Floats | None = None,
) -> Floats:
    """One expert on every token, arithmetic v1: (T, H), packed matrices, (2I,), (H,) -> (T, H)."""
    both = np.concatenate([linear(x, packed, ggml_type) for packed, ggml_type in gate_up], axis=1)
    if gate_up_bias is not None:
        both = both + gate_up_bias
    gate, up = (both[:, ::2], both[:, 1::2]) if interleaved else np.split(both, 2, axis=1)
    y = linear(activate(kind, gate, up), *down)
    return y if down_bias is None else y + down_bias


def moe_ffn(
    hidden: NDArray[np.float64],
    top_k_index: NDArray[np.int64],
    top_k_weights: NDArray[np.float64],
    gate_up: NDArray[np.float64],
    down: NDArray[np.float64],
    act: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
    gate_up_bias: NDArray[np.float64] | None = None,
    down_bias: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Naive float64 MoE layer: (T, H), (T, K), (T, K), (E, 2I, H) gate rows first, (E, H, I) -> (T, H)."""
    out = np.zeros_like(hidden)
    for t, experts in enumerate(top_k_index):
        for expert_id, weight in zip(experts, top_k_weights[t], strict=True):
            both = gate_up[expert_id] @ hidden[t]
            if gate_up_bias is not None:
                both = both + gate_up_bias[expert_id]
            y = down[expert_id] @ act(*np.split(both, 2))
            out[t] += weight * (y if down_bias is None else y + down_bias[expert_id])
    return out
