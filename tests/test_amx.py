"""AMX's kernels over a stand-in of the tiles' instructions: the bits of every other instruction set."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from op_cases import activations, cols_of, packed_weight

from moe_offload import _native, ops
from moe_offload.storage.expert_format import FLOAT_TYPES, GgmlType

ROOT = Path(__file__).parents[1]
TOKENS = (1, 17, 20, 33, 50)  # one from the file's bytes; groups of 9 and 8, of 10, of 11, of 13 and 11
SERVED = [
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
]


@pytest.fixture(scope="module")
def on_stand_in(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the kernels' own source over the stand-in; the rest of it needs AVX-512 VNNI."""
    if shutil.which("g++") is None or "avx512vnni" not in _native.available_isas():
        pytest.skip("needs g++ and a CPU with AVX-512 VNNI")
    library = tmp_path_factory.mktemp("amx") / "amx_stand_in.so"
    sets = ["avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"]
    flags = ["-std=c++20", "-O1", "-fno-math-errno", "-ffp-contract=off", "-Wno-psabi", "-fPIC", "-shared"]
    native = ROOT / "tests" / "native"
    sources = [str(native / "amx_stand_in.cpp"), str(ROOT / "csrc" / "cpu" / "scratch.cpp")]
    include = [f"-I{ROOT / 'csrc'}", f"-I{native}"]
    instructions = [f"-m{name}" for name in sets]
    subprocess.run(["g++", *flags, *instructions, *include, *sources, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def linear(
    library: ctypes.CDLL, name: str, packed: NDArray[np.uint8], x: NDArray[np.float32], spoiled_bit: int = -1
) -> NDArray[np.float32]:
    rows = len(packed)
    out = np.full((len(x), rows), np.nan, np.float32)
    shape = (ctypes.c_int64(len(x)), ctypes.c_int64(rows), ctypes.c_int64(x.shape[1]))
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (packed, x, out)]
    refused = library.amx_linear(int(GgmlType[name]), *pointers[:2], *shape, spoiled_bit, pointers[2])
    assert refused == 0
    return out


def both(library: ctypes.CDLL, name: str, tokens: int, spoiled_bit: int = -1) -> list[NDArray[np.float32]]:
    """Return the results of the stand-in and of the CPU, (tokens, 37) each."""
    cols = cols_of(GgmlType[name])
    packed = packed_weight(GgmlType[name], 37, cols, seed=tokens)
    x = activations(tokens, cols, seed=tokens)
    ours = ops.linear(x, torch.from_numpy(packed), GgmlType[name], 37, cols)
    return [linear(library, name, packed, x.numpy(), spoiled_bit), ours.numpy()]


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_the_bits_are_those_of_the_other_instruction_sets(on_stand_in: ctypes.CDLL, name: str) -> None:
    for tokens in TOKENS:
        stand_in, cpu = both(on_stand_in, name, tokens)
        np.testing.assert_array_equal(stand_in.view(np.uint32), cpu.view(np.uint32))


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_one_wrong_bit_of_a_product_is_seen(on_stand_in: ctypes.CDLL, name: str) -> None:
    stand_in, cpu = both(on_stand_in, name, 20, spoiled_bit=0)
    wrong = (stand_in != cpu).any(axis=0)
    assert wrong[[0, 16, 32]].all() and wrong.sum() == 3  # of each vector of rows, the first


@pytest.mark.slow
def test_every_fast_kernel_of_packed_weights_is_served() -> None:
    packed = [t.name for t in GgmlType if t not in FLOAT_TYPES and ops.has_fast_kernel(t)]
    assert sorted(packed) == sorted(SERVED)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86's")
def test_amx_is_offered_where_the_processor_has_it_or_there_is_a_reason() -> None:
    state = _native.amx_state()
    if "amx" in _native.available_isas():
        assert "times AVX-512's speed" in state
    else:
        assert any(word in state for word in ("no AMX", "no AVX-512", "system", "bits"))
