"""Which block format a matrix gets, and its blocks: the rules of ``quant=``.

Q4_0, Q5_0 and Q8_0 are gguf-py's, bit for bit. Q4_K and Q6_K come from ggml itself, through the
library that llama-cpp-python carries. A row that is no whole number of blocks takes the format that
llama.cpp falls back to, or stays as it is.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_offload.errors import ConfigError
from moe_offload.storage.expert_format import BLOCK_SIZES, GgmlType, WeightType, row_bytes

_K_QUANTS = frozenset({GgmlType.Q4_K, GgmlType.Q6_K})
_FALLBACK = {GgmlType.Q4_K: GgmlType.Q5_0, GgmlType.Q6_K: GgmlType.Q8_0}


@dataclass(frozen=True)
class QuantRule:
    """``matrices`` is for experts, linear layers and the embedding, ``output`` for the head.

    The head decides between tokens, so it keeps more bits, as in llama.cpp (Q6_K there; where ggml's
    quantizer is not at hand, Q8_0). An embedding that is also the head counts as the head.
    """

    matrices: GgmlType
    output: GgmlType


QUANT_RULES = {
    "q8_0": QuantRule(GgmlType.Q8_0, GgmlType.Q8_0),
    "q4_0": QuantRule(GgmlType.Q4_0, GgmlType.Q8_0),
    "q4_k": QuantRule(GgmlType.Q4_K, GgmlType.Q6_K),
}


def check_quant(quant: str) -> str:
    """Return the name of a rule in lower case.

    Raises:
        ConfigError: no such rule, or its quantizer is not installed.
    """
    name = quant.lower() if isinstance(quant, str) else quant
    if name not in QUANT_RULES:
        raise ConfigError(f"quant={quant!r} is unknown; known are {', '.join(QUANT_RULES)}")
    if QUANT_RULES[name].matrices in _K_QUANTS:
        _ggml()
    return name


def matrix_type(quant: str, cols: int, *, is_output: bool = False) -> GgmlType | None:
    """Return the block format of a matrix with ``cols`` input features; None keeps it as it is."""
    rule = QUANT_RULES[quant]
    wanted: GgmlType | None = rule.output if is_output else rule.matrices
    while wanted is not None and cols % BLOCK_SIZES[wanted].elements:
        wanted = _FALLBACK.get(wanted)
    return wanted


def float_values(raw: npt.NDArray[np.uint8], ggml_type: WeightType) -> npt.NDArray[np.float32]:
    """Return the float32 values of F32, F16 or BF16 bytes, flat."""
    if ggml_type is GgmlType.BF16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.float16 if ggml_type is GgmlType.F16 else np.float32).astype(np.float32)


def quantize_rows(values: npt.NDArray[np.float32], ggml_type: GgmlType) -> npt.NDArray[np.uint8]:
    """Return the blocks of finite ``values`` (rows, cols): uint8 (rows, row bytes)."""
    if ggml_type in _K_QUANTS:
        return _quantize_with_ggml(values, ggml_type)
    from gguf import GGMLQuantizationType, quants

    blocks: npt.NDArray[np.uint8] = quants.quantize(values, GGMLQuantizationType(int(ggml_type)))
    return blocks


def _quantize_with_ggml(values: npt.NDArray[np.float32], ggml_type: GgmlType) -> npt.NDArray[np.uint8]:
    values = np.ascontiguousarray(values)
    rows, cols = values.shape
    blocks = np.empty((rows, row_bytes(ggml_type, cols)), dtype=np.uint8)
    written = _ggml()(int(ggml_type), values.ctypes.data, blocks.ctypes.data, 0, rows, cols, None)
    assert written == blocks.nbytes, f"ggml wrote {written} of {blocks.nbytes} bytes"
    return blocks


@functools.cache
def _ggml() -> Any:
    """Return ``ggml_quantize_chunk`` of llama-cpp-python's ggml, without importing that package."""
    spec = find_spec("llama_cpp")
    folders = spec.submodule_search_locations if spec is not None else None
    found = [path for folder in folders or () for path in sorted(Path(folder).glob("lib/libggml-base.*"))]
    if not found:
        raise ConfigError(
            "q4_k is quantized by ggml, which comes with llama-cpp-python, and that is not installed; "
            "pip install 'moe_offload[llama]', or take q4_0 or q8_0"
        )
    try:
        function = ctypes.CDLL(str(found[0])).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise ConfigError(f"ggml's quantizer cannot be used ({error}); take q4_0 or q8_0") from error
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return function
