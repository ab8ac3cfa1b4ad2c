"""The CUDA kernels' arithmetic, compiled for the CPU: the golden vectors' bits; and that nvcc takes it."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from op_cases import activations, packed_weight

from moe_offload import ops
from moe_offload.expert_ops import Activation, ActivationKind
from moe_offload.storage.expert_format import GgmlType

ROOT = Path(__file__).parents[1]
GOLDEN = np.load(ROOT / "tests" / "golden" / "ops.npz")
QUANTIZED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
)
ARCHITECTURES = (75, 80, 120)  # without int8 tensor cores, with, and the newest; a wheel has all
# The flags that keep the bits: no contraction, subnormals, IEEE division.
NVCC_FLAGS = ["-std=c++20", "-O3", "--fmad=false", "-ftz=false", "-prec-div=true"]


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("cuda") / "cuda_arithmetic.so"
    fma = ["-mfma"] if platform.machine() == "x86_64" else []
    command = ["g++", "-std=c++20", "-O2", "-ffp-contract=off", *fma, "-fPIC", "-shared"]
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    source = ROOT / "tests" / "native" / "cuda_arithmetic.cpp"
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def linear(
    library: ctypes.CDLL, name: str, packed: NDArray[np.uint8], x: NDArray[np.float32], rows: int
) -> NDArray[np.float32]:
    out = np.empty((len(x), rows), np.float32)
    shape = (ctypes.c_int64(len(x)), ctypes.c_int64(rows), ctypes.c_int64(x.shape[1]))
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (packed, x, out)]
    assert library.cuda_linear(int(GgmlType[name]), *pointers[:2], *shape, pointers[2]) == 0
    return out


@pytest.mark.parametrize("name", QUANTIZED)
def test_golden_vectors(on_host: ctypes.CDLL, name: str) -> None:
    packed, x, y = (np.ascontiguousarray(GOLDEN[f"{name}/{part}"]) for part in ("packed", "x", "y"))
    assert linear(on_host, name, packed, x, y.shape[1]).tobytes() == y.astype(np.float32).tobytes()


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_bits_are_the_cpus(on_host: ctypes.CDLL, name: str) -> None:
    import torch

    rows, cols = 5, 768
    packed = packed_weight(GgmlType[name], rows, cols, seed=3)
    x = activations(3, cols, seed=4)
    ours = ops.linear(x, torch.from_numpy(packed), GgmlType[name], rows, cols)
    assert linear(on_host, name, packed, x.numpy(), rows).tobytes() == ours.numpy().tobytes()


@pytest.mark.parametrize("kind", list(ActivationKind))
def test_gates(on_host: ctypes.CDLL, kind: ActivationKind) -> None:
    gate, up = (np.ascontiguousarray(GOLDEN[f"activation/{part}"]) for part in ("gate", "up"))
    out = np.empty_like(gate)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (gate, up, out)]
    defaults = Activation(kind)
    on_host.cuda_activate(
        int(kind),
        ctypes.c_float(defaults.alpha),
        ctypes.c_float(defaults.limit),
        *pointers[:2],
        ctypes.c_int64(len(gate)),
        pointers[2],
    )
    assert (out + 0).tobytes() == GOLDEN[f"activation/{kind.name}"].tobytes()


@pytest.mark.slow
def test_nvcc_compiles_for_old_and_new_architectures(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    ptx = f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}"
    sources = [ROOT / "csrc" / "cuda" / f"{name}_kernels.cu" for name in ("block", "superblock", "float")]
    # The assembler's optimizer takes most of the time and finds no errors.
    command = ["nvcc", *NVCC_FLAGS, "-Xptxas", "-O0", "--threads", "2", "-Werror", "all-warnings"]
    command += [f"-I{ROOT / 'csrc'}", *codes, ptx, "-c", *map(str, sources)]
    subprocess.run(command, check=True, cwd=tmp_path)
