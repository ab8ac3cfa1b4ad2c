"""The kernels give the golden bits on other architectures: cross-compiled, run under qemu's user mode."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
from make_golden_ops import GOLDEN

from moe_offload.storage.expert_format import GgmlType

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++20", "-O2", "-fno-math-errno", "-ffp-contract=off", "-Wno-psabi", "-pthread", "-static"]


def write_cases(path: Path, *, spoiled: bool = False) -> int:
    """Write what tests/native/check_golden_ops.cpp reads; return the number of cases."""
    golden = np.load(GOLDEN)
    names = [key.removesuffix("/packed") for key in golden.files if key.endswith("/packed")]
    parts = [np.int32([len(names)]).tobytes()]
    for name in names:
        packed, x, y = (golden[f"{name}/{array}"] for array in ("packed", "x", "y"))
        grid = codebook(GgmlType[name])
        parts.append(np.int32([GgmlType[name], len(packed), x.shape[1], len(x), grid.size]).tobytes())
        parts += [array.tobytes() for array in (grid, packed, x, y)]
    data = bytearray(b"".join(parts))
    if spoiled:
        data[-1] ^= 0x80  # the sign of the last result
    path.write_bytes(data)
    return len(names)


def codebook(ggml_type: GgmlType) -> np.ndarray:
    """Return the codebook of an IQ type, empty for all others."""
    traits = getattr(gguf.quants, ggml_type.name, None)
    if getattr(traits, "grid_hex", None) is None:
        return np.zeros(0, np.int8)
    traits.init_grid()
    return np.ascontiguousarray(traits.grid, dtype=np.int8)


def build(compiler: str, folder: Path) -> Path:
    sources = [path for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if not path.name.startswith("bindings")]
    program = folder / "check_golden_ops"
    sources.append(ROOT / "tests" / "native" / "check_golden_ops.cpp")
    command = [compiler, *FLAGS, f"-I{ROOT / 'csrc'}", *sources, "-o", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return program


@pytest.mark.slow
def test_aarch64_gives_the_golden_bits(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (apt: g++-aarch64-linux-gnu, qemu-user)")
    program, data = build(compiler, tmp_path), tmp_path / "cases.bin"
    command = [emulator, program, data]
    num_cases = write_cases(data)
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        result.stdout.startswith(f"{num_cases} cases on baseline dotprod:") and ": 0 differ" in result.stdout
    )

    write_cases(data, spoiled=True)
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 1 and "on dotprod: 2 differ" in result.stdout, "a wrong bit must be found"
