"""Build csrc/cuda without CUDA: its sources over stand-ins for the runtime and the grid (tests/native)."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build_stand_in(library: Path) -> None:
    """Compile tests/native/cuda_stand_in.cpp as `library`; skips without g++."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    native = ROOT / "tests" / "native"
    fma = ["-mfma"] if platform.machine() == "x86_64" else []
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", *fma, "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    # A card faults where a CPU reads what is not aligned: the process ends there.
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    # A library that a process may hold together with the real one: its inline variables are its own.
    flags += ["-fvisibility=hidden", "-fno-gnu-unique", "-U_FORTIFY_SOURCE"]  # it jumps between stacks
    include = [f"-I{ROOT / 'csrc'}", f"-I{native}"]
    command = ["g++", *flags, *include, "-x", "c++", str(native / "cuda_stand_in.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
