"""Run the native code under sanitizers: `make sanitize`. Exits 1 when one of them finds something.

    python tests/run_sanitizers.py [--only address|thread] [--build-dir build/sanitize]

- AddressSanitizer and UBSan: the extension is built with both, and the tests of ops, of the header
  parsers and of the reader run on that build, in this interpreter with the libraries preloaded.
- ThreadSanitizer: programs that hammer the thread pool, the reader and a device, and the tests of the cache,
  of the reader, of eviction, of prefetching and of a device's copies and launches on a build of the
  extension; torch, whose threads it does not know, gets none of its own.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "address": (
        "test_ops.py", "test_expert_ops.py", "test_thread_pool.py", "test_gguf.py", "test_safetensors.py",
        "test_arena.py", "test_direct_read.py", "test_expert_store.py", "test_horizon.py", "test_op_grid.py",
        "test_native_step.py", "test_native_prompt.py", "test_scheduler.py", "test_emulated_device.py",
        "test_device_launches.py", "test_packed_kv.py", "test_policies.py", "test_hybrid.py",
        "test_device_dense.py",
    ),
    "thread": (
        "test_expert_cache.py", "test_direct_read.py", "test_expert_store.py", "test_eviction.py",
        "test_emulated_device.py", "test_device_launches.py", "test_prefetch.py", "test_early_routers.py",
        "test_early_reads.py::test_native_look_aheads_change_neither_tokens_nor_residents_nor_any_sum[96]",
    ),
}  # fmt: skip
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",  # the interpreter frees little at its end
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # At once: what a worker of pytest's exits with at its end nobody asks, only whether it died in a test.
    "TSAN_OPTIONS": "halt_on_error=1",
}
# Models read with the reader's threads, not with the ring, which has none to race with.
IN_THREADS = {"MOE_OFFLOAD_ISA": "baseline", "MOE_OFFLOAD_IO": "threads", "OMP_NUM_THREADS": "1"}
STRESS = {
    "stress_thread_pool": (["cpu/thread_pool.cpp", "cpu/usable_cores.cpp"], ["40"]),
    "stress_direct_read": (["io/*.cpp"], ["{folder}/data.bin", "100"]),
    "stress_device": (
        [
            "device/copy_queue.cpp",
            "device/emulated_stream.cpp",
            "device/launch_queue.cpp",
            "device/link.cpp",
            "cpu/thread_pool.cpp",
            "cpu/usable_cores.cpp",
        ],
        ["100"],
    ),
}
KERNELS = ("baseline", "avx2", "avxvnni", "avx512", "avx512vnni", "amx", "dotprod")
CLOCKLOCK = ROOT / "tests" / "native" / "tsan_clocklock.h"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SANITIZERS)
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "sanitize")
    args = parser.parse_args()
    failed = []
    for name in [args.only] if args.only else SANITIZERS:
        folder = args.build_dir.resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each is one call of the compiler
            list(pool.map(lambda program: build_stress(program, name, folder), STRESS))  # noqa: B023
        for program in STRESS:
            title = f"{program} under {name}"
            failed += [title] * report(title, lambda: stress(program, folder))  # noqa: B023
        title = f"tests under {name}"
        failed += [title] * report(title, lambda: run_tests(name, folder))  # noqa: B023
    print(f"failed: {', '.join(failed)}" if failed else "no sanitizer found anything")
    return bool(failed)


def report(title: str, run: object) -> bool:
    """Run a part, say how it went and how long it took; True when it failed."""
    started = time.perf_counter()
    assert callable(run)
    returncode = run()
    print(f"{title}: {'ok' if returncode == 0 else f'exit status {returncode}'}, ", end="")
    print(f"{time.perf_counter() - started:.0f} s", flush=True)
    return returncode != 0


def flags(name: str) -> list[str]:
    shared = [f"-fsanitize={SANITIZERS[name]}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    return [*shared, "-include", str(CLOCKLOCK)] if name == "thread" else shared


def compiler() -> list[str]:
    """Return the C++ compiler; through ccache where that is, since nothing here changes from run to run."""
    return shlex.split(os.environ.get("CXX") or ("ccache g++" if shutil.which("ccache") else "g++"))


def build_stress(program: str, name: str, folder: Path) -> None:
    """Build one of the native programs."""
    patterns, _ = STRESS[program]
    sources = [path for pattern in patterns for path in sorted((ROOT / "csrc").glob(pattern))]
    sources = [path for path in sources if not path.name.startswith("bindings")]
    common = ["-std=c++20", "-O1", "-g", "-pthread", f"-I{ROOT / 'csrc'}"]
    main_file = ROOT / "tests" / "native" / f"{program}.cpp"
    subprocess.run(
        [*compiler(), *common, *flags(name), *sources, main_file, "-o", folder / program], check=True
    )


def stress(program: str, folder: Path) -> int:
    """Run one of the native programs."""
    command = [folder / program, *(argument.format(folder=folder) for argument in STRESS[program][1])]
    return subprocess.run(command, env={**os.environ, **OPTIONS}, timeout=900).returncode


def run_tests(name: str, folder: Path) -> int:
    """Build the extension with the sanitizer and run the tests that fit it."""
    command = "build", "--build-base", str(folder)
    wrapped = str(write_compiler(name, folder))
    # No test here opens the CUDA library, and nvcc would compile it for every card.
    environment = {**os.environ, "CC": wrapped, "CXX": wrapped, "MOE_OFFLOAD_CUDA": "off"}
    subprocess.run([sys.executable, "setup.py", "-q", *command], cwd=ROOT, env=environment, check=True)
    (library,) = folder.glob("lib*/moe_offload/_native*.so")
    reports = folder / "report"  # what a worker of pytest's wrote to stderr dies with it
    environment = {
        **os.environ, **{key: f"{value}:log_path={reports}" for key, value in OPTIONS.items()},
        "LD_PRELOAD": preloads(name), "PYTHONPATH": str(library.parents[1]),
        # The package in the working directory, which was not built for this, stays out of the way.
        "PYTHONSAFEPATH": "1",
        **(IN_THREADS if name == "thread" else {}),
    }  # fmt: skip
    asked = [sys.executable, "-c", "import moe_offload._native as native; print(native.__file__)"]
    loaded = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True)
    if loaded.stdout.strip() != str(library):
        print(f"{library} was built, but {loaded.stdout.strip() or loaded.stderr} is what is loaded")
        return 1
    tests = [str(ROOT / "tests" / test) for test in TESTS[name]]
    workers = ["--numprocesses=logical", "--maxprocesses=4", "--dist=loadfile", "--max-worker-restart=0"]
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        *workers,
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
    ]
    returncode = subprocess.run([*pytest, *tests], cwd=ROOT, env=environment).returncode
    for report in folder.glob(f"{reports.name}.*"):
        print(report.read_text())
        report.unlink()
    return returncode


def write_compiler(name: str, folder: Path) -> Path:
    """Write a compiler that adds the sanitizer and, since that is slow enough, optimizes less.

    The kernels of an instruction set that no test runs are the largest files, and are compiled as for an
    install: where one was made, setup.py takes its objects. Bindings are templates that are called a few
    times: they are not optimized at all.
    """
    path = folder / "c++"
    plain = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++"  # as setuptools has it
    sanitizing = shlex.join([*compiler(), *flags(name), "-g1"])
    others = "|".join(f"*kernels_{isa}.cpp" for isa in KERNELS if isa not in sanitized_isas(name))
    path.write_text(
        f"""#!/usr/bin/env bash
optimize=-O1
for argument in "$@"; do
    case $argument in
    {others or "-"}) exec {plain} "$@" ;;
    */bindings*.cpp) optimize=-O0 ;;
    esac
done
exec {sanitizing} "${{@/#-O3/$optimize}}"
"""
    )
    path.chmod(0o755)
    return path


def sanitized_isas(name: str) -> list[str]:
    """Return the instruction sets whose kernels run: all of this CPU, or with ThreadSanitizer the first."""
    from moe_offload import _native

    if name == "thread":
        return ["baseline"]
    isas = _native.available_isas()
    # What a token does beside its products has one file for all that AVX-512 brings.
    return [*isas, "avx512"] if "avx512vnni" in isas else isas


def preloads(name: str) -> str:
    """Return the libraries that must be there before the interpreter's; libstdc++ for its exceptions."""
    names = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}[name]
    paths = []
    for library in [*names, "libstdc++.so"]:
        command = [*compiler(), f"-print-file-name={library}"]
        paths.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return ":".join(paths)


if __name__ == "__main__":
    sys.exit(main())
