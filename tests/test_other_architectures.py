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
        x, y = (np.tile(array, (17 // len(x) + 1, 1)) for array in (x, y))  # few tokens have another path
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


def build(compiler: str, folder: Path, *, replaced: dict[str, Path] | None = None) -> Path:
    """Compile the checking program; ``replaced`` gives other files for some of csrc/cpu, one for several."""
    sources = [path for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if not path.name.startswith("bindings")]
    sources = list(dict.fromkeys((replaced or {}).get(path.name, path) for path in sources))
    program = folder / "check_golden_ops"
    sources.append(ROOT / "tests" / "native" / "check_golden_ops.cpp")
    run_compiler([compiler, *FLAGS, f"-I{ROOT / 'csrc'}", *sources, "-o", program])
    return program


def run_compiler(command: list[str | Path]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def check(command: list[str | Path], data: Path, isas: str) -> None:
    """Run the program on the golden vectors: all right, and not all right with one wrong bit."""
    num_cases = write_cases(data)
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.stdout == f"{num_cases} cases on {isas}: 0 differ\n" and result.returncode == 0, result
    write_cases(data, spoiled=True)
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert f"on {isas.split()[-1]}: 2 differ" in result.stdout and result.returncode == 1, result


@pytest.mark.slow
def test_aarch64_gives_the_golden_bits(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (apt: g++-aarch64-linux-gnu, qemu-user)")
    data = tmp_path / "cases.bin"
    check([emulator, build(compiler, tmp_path), data], data, "baseline dotprod")


@pytest.mark.slow
def test_avxvnni_gives_the_golden_bits_in_avx512s_encoding(tmp_path: Path) -> None:
    """Few machines have AVX-VNNI: the same instructions run in AVX-512's encoding."""
    compiler = shutil.which("g++")
    if compiler is None or " avx512_vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs g++ and a CPU with AVX-512 VNNI")
    assembly = tmp_path / "kernels_avxvnni.s"
    isa_flags = ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mavxvnni"]
    # It takes the place of the table for AVX-512, the one that this CPU is known to offer.
    rename = "-Dkernels_avxvnni=kernels_avx512vnni"
    source = ROOT / "csrc" / "cpu" / "kernels_avxvnni.cpp"
    flags = [flag for flag in FLAGS if flag != "-static"]
    run_compiler([compiler, *flags, *isa_flags, rename, f"-I{ROOT / 'csrc'}", "-S", source, "-o", assembly])
    code = assembly.read_text()
    assert code.count("{vex} vpdpbusd") > 100
    assembly.write_text(code.replace("{vex} vpdpbusd", "vpdpbusd"))
    data = tmp_path / "cases.bin"
    others = ["avx2", "avxvnni", "amx"]
    tables = "".join(f"const Kernels kernels_{isa} = kernels_baseline;\n" for isa in others)
    without = tmp_path / "without_others.cpp"
    without.write_text(f'#include "cpu/kernels.h"\nnamespace moe {{\n{tables}}}\n')
    replaced = {"kernels_avx512vnni.cpp": assembly, **{f"kernels_{isa}.cpp": without for isa in others}}
    check([build(compiler, tmp_path, replaced=replaced), data], data, "baseline baseline avxvnni")
