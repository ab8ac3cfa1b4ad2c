"""Find nvcc and build csrc/cuda into moe_offload/_cuda.so; setup.py, tests and bench/gpu.py ask here.

A library of its own, opened by the native extension at run time: without a driver, or with one that is too
old, the package still imports. Beside it lies ``_cuda_build.json``: how it was built, or why it was not.

Environment: ``MOE_OFFLOAD_CUDA`` = auto (build where nvcc is found) | on (fail where it is not) | off;
``MOE_OFFLOAD_CUDA_ARCHS`` = "90" | "86,89" | "all" | "native" (the cards of this machine).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parents[1]
LIBRARY, RECORD = "_cuda.so", "_cuda_build.json"
ARCHITECTURES = (75, 80, 86, 87, 89, 90, 120)
BEFORE_THE_GAP = 90
OLDEST_NVCC = (12, 8)  # the first to know sm_120
# The flags that keep the bits: no contraction, subnormals, IEEE division.
EXACT = ["--fmad=false", "-ftz=false", "-prec-div=true", "-Xcompiler", "-ffp-contract=off"]
FLAGS = [
    "-std=c++20",
    "-O3",
    *EXACT,
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden,-Wall,-pthread",
    "-Xptxas",
    "-v",
]


class NoNvcc(Exception):
    """nvcc is missing or too old; the text says where it was looked for."""


@dataclass(frozen=True)
class Nvcc:
    """A compiler that can be used."""

    path: Path
    version: tuple[int, int]

    def library_folders(self) -> list[str]:
        """Return where libcudart_static.a may be: nvcc of NVIDIA's wheels does not search their lib."""
        root = self.path.resolve().parent.parent
        return [f"-L{root / name}" for name in ("lib", "lib64") if (root / name).is_dir()]


def find_nvcc() -> Nvcc:
    """Return nvcc from CUDA_HOME, PATH or NVIDIA's wheels (extra ``cuda-build``); raises NoNvcc."""
    tried = []
    for path in _candidates():
        done = subprocess.run([path, "--version"], capture_output=True, text=True)
        found = re.search(r"release (\d+)\.(\d+)", done.stdout)
        version = (int(found[1]), int(found[2])) if found else (0, 0)
        if version >= OLDEST_NVCC:
            return Nvcc(path, version)
        tried.append(f"{path} is release {version[0]}.{version[1]}")
    wanted = f"nvcc {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or later"
    places = "; ".join(tried) or "looked in CUDA_HOME, on PATH and in the packages of moe_offload[cuda-build]"
    raise NoNvcc(f"found no {wanted} ({places})")


def _candidates() -> Iterator[Path]:
    if os.environ.get("CUDA_HOME"):
        path = Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"
        if path.exists():
            yield path
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path)
    folders = {sysconfig.get_path("purelib"), *sys.path}  # a build in isolation sees only its own packages
    for folder in sorted(folder for folder in folders if folder):
        yield from sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"))


def architectures(default: str = "all") -> tuple[list[int], int]:
    """Return the compute capabilities to compile for, and that of the PTX for cards to come.

    ``native`` without a card gives no machine code, only PTX that every card's driver can finish.
    """
    asked = os.environ.get("MOE_OFFLOAD_CUDA_ARCHS") or default
    if asked == "all":
        return list(ARCHITECTURES), max(ARCHITECTURES)
    numbers = _cards() if asked == "native" else [int(part) for part in re.findall(r"\d+", asked)]
    return numbers, max(numbers) if numbers else min(ARCHITECTURES)


def _cards() -> list[int]:
    """Return the compute capabilities of this machine's cards, as 10 x major + minor."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return sorted({int(major) * 10 + int(minor) for major, minor in re.findall(r"(\d+)\.(\d+)", done.stdout)})


def codes(numbers: Iterable[int], ptx: int) -> list[str]:
    """Return nvcc's arguments for machine code and PTX.

    The newest PTX runs on no card that is older than it, and between 90 and 120 there are families of cards
    (sm_100 to sm_110) that have no code of their own: theirs is the PTX of 90.
    """
    numbers = list(numbers)
    machine = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    finished_later = [ptx, *(number for number in numbers if number == BEFORE_THE_GAP and number != ptx)]
    return [*machine, *(f"-gencode=arch=compute_{number},code=compute_{number}" for number in finished_later)]


def sources() -> list[Path]:
    """Return the files that make the library."""
    return sorted((CSRC / "cuda").glob("*.cu"))


def build(folder: Path, work: Path, default: str = "all") -> bool:
    """Build the library into ``folder`` as MOE_OFFLOAD_CUDA says, objects in ``work``; write the record.

    Returns whether there is one. Raises RuntimeError where it was asked for and cannot be, and where it does
    not compile.
    """
    asked = os.environ.get("MOE_OFFLOAD_CUDA") or "auto"
    if asked not in ("auto", "on", "off"):
        raise RuntimeError(f"MOE_OFFLOAD_CUDA={asked} must be auto, on or off")
    library, record = folder / LIBRARY, folder / RECORD
    try:
        if asked == "off":
            raise NoNvcc("MOE_OFFLOAD_CUDA=off when it was built")
        nvcc = find_nvcc()
    except NoNvcc as reason:
        if asked == "on":
            raise RuntimeError(f"MOE_OFFLOAD_CUDA=on, but {reason}") from None
        library.unlink(missing_ok=True)
        record.write_text(json.dumps({"built": False, "reason": str(reason)}) + "\n")
        return False
    numbers, ptx = architectures(default)
    compile_library(nvcc, library, work, numbers, ptx)
    version = ".".join(str(part) for part in nvcc.version)
    record.write_text(json.dumps({"built": True, "cuda": version, "sm": numbers, "ptx": ptx}) + "\n")
    return True


def compile_library(nvcc: Nvcc, library: Path, work: Path, numbers: list[int], ptx: int) -> None:
    """Compile what has changed since the last time and link it; the driver's library is not linked.

    Beside each object lies what was said of it (.log): registers, stack and shared memory of its kernels.
    """
    work.mkdir(parents=True, exist_ok=True)
    common, objects = _common(nvcc, numbers, ptx), objects_of(nvcc, work, numbers, ptx)
    jobs = [
        [*common, "--threads", "0", "-c", str(path), "-o", str(to)]
        for path, to in zip(sources(), objects, strict=True)
        if not to.exists()
    ]
    with ThreadPoolExecutor(max(1, min(len(jobs), os.cpu_count() or 1))) as pool:
        list(pool.map(_run, jobs))
    # A file that another process has mapped is replaced, never written into.
    new = library.with_suffix(".new")
    link = [str(nvcc.path), "--shared", "--cudart=static", *nvcc.library_folders(), "-Xlinker", "-z,defs"]
    _run([*link, *map(str, objects), "-o", str(new)])
    new.replace(library)


def objects_of(nvcc: Nvcc, work: Path, numbers: list[int], ptx: int) -> list[Path]:
    """Return where the object of each source is, or will be."""
    made_by = [*_common(nvcc, numbers, ptx), str(nvcc.version)]  # a toolkit is replaced in its place
    return [work / f"{path.stem}-{_fingerprint(path, made_by)}.o" for path in sources()]


def _common(nvcc: Nvcc, numbers: list[int], ptx: int) -> list[str]:
    return [str(nvcc.path), *FLAGS, f"-I{CSRC}", *codes(numbers, ptx)]


def _run(command: list[str]) -> None:
    output = Path(command[-1])
    partial = output.with_suffix(".part" + output.suffix)
    done = subprocess.run([*command[:-1], str(partial)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(command)}\n{done.stdout}{done.stderr}\n"
            "csrc/cuda does not compile; MOE_OFFLOAD_CUDA=off builds without it"
        )
    if output.suffix == ".o":
        output.with_suffix(".log").write_text(done.stdout + done.stderr)
    partial.replace(output)


def _fingerprint(source: Path, command: list[str]) -> str:
    """Return a hash of the command, the file and what it includes of ours."""
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted(_included(source, set())):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _included(path: Path, seen: set[Path]) -> set[Path]:
    if path in seen or not path.exists():
        return seen
    seen.add(path)
    for name in re.findall(r'#include "([^"]+)"', path.read_text()):
        _included(CSRC / name, seen)
    return seen
