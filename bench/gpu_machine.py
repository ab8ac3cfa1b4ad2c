"""The steps of gpu.py that ask about the machine: build, tests, bits, ceilings, link, kernels, their code."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_card
from gpu_card import device_text
from gpu_report import NotRun, Report

ROOT = Path(__file__).parents[1]
# In this order: what a run needs first.
CARD_TESTS = ("test_cuda_runtime.py", "test_cuda_dense.py", "test_dense_prompt.py", "test_cuda_device.py")
PROCESS_LIMIT_S = 90.0
SANITIZED = "split_q4_0 or mixed or routing"  # of two files: all of them would take many minutes


def build() -> Iterator[dict[str, Any]]:
    """Compile what has changed for this machine and its cards; install in place, if nothing is installed."""
    sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
    import nvcc

    os.environ.setdefault("MOE_OFFLOAD_CUDA", "on")
    started, kept = time.monotonic(), ROOT / "build" / "cuda"
    with ThreadPoolExecutor(1) as pool:  # nvcc beside the other compiler
        (kept / "first").mkdir(parents=True, exist_ok=True)
        cuda = pool.submit(nvcc.build, kept / "first", kept, "native")
        _build_extension()
        cuda.result()
    nvcc.build(ROOT / "moe_offload", kept, "native")  # of the same objects
    for folder in (sysconfig.get_path("purelib"), site.getusersitepackages()):
        site.addsitedir(folder)  # what was installed after this process began
    importlib.invalidate_caches()
    record = json.loads((ROOT / "moe_offload" / nvcc.RECORD).read_text())
    yield {**record, "seconds": round(time.monotonic() - started, 1)}


def _build_extension() -> None:
    command = ["setup.py", "-q", "build_ext", "--inplace"]
    if not (_finds("moe_offload") and _finds("moe_offload.predictors")):
        command = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", "."]
    environment = {**os.environ, "MOE_OFFLOAD_CUDA": "off"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {(done.stdout + done.stderr)[-3000:]}")


def _finds(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def card_report() -> dict[str, Any]:
    from moe_offload import cuda

    return cuda.describe()


def machine(report: Report) -> Iterator[dict[str, Any]]:
    yield card_report()
    if any(card["name"] == "stand-in" for card in card_report()["devices"]):
        report.content["label"] = "stand-in"  # tests/native: a CPU that plays a card
    if report.content["label"] == "measured" and card_report()["on"]:
        from moe_offload.cuda_memory import card_memory

        memory = card_memory(0)
        report.context_bytes = memory.context_bytes
        yield dataclasses.asdict(memory)
    command = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.used,pcie.link.gen.current",
        "--format=csv",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        yield {"nvidia_smi": done.stdout.splitlines()}
    except (OSError, subprocess.TimeoutExpired) as error:
        yield {"nvidia_smi": f"not run: {error}"}


def code(is_card: bool) -> Iterator[dict[str, Any]]:
    """Yield what the compiler made of each kernel: registers, bytes on the stack, shared memory."""
    tool = shutil.which("cuobjdump")
    if not is_card or tool is None:
        raise NotRun("no card" if not is_card else "no cuobjdump")
    library = str(ROOT / "moe_offload" / "_cuda.so")
    done = subprocess.run([tool, "-res-usage", library], capture_output=True, text=True, timeout=60)
    kernels = resources(done.stdout + done.stderr)
    for what in ("registers", "stack_bytes", "shared_bytes"):
        most = max(kernels, key=lambda kernel: kernels[kernel][what])
        yield {"what": f"most {what}", "kernel": most, **kernels[most]}
    sass = subprocess.run([tool, "-sass", library], capture_output=True, text=True, timeout=120).stdout
    tiles = [part for part in sass.split("Function : ") if "tile_rows_kernel" in part.split("\n", 1)[0]]
    with_tensor_cores = sum("IMMA" in part for part in tiles)
    yield {"what": "tile kernels", "kernels": len(tiles), "with_imma": with_tensor_cores}


def resources(listing: str) -> dict[str, dict[str, int]]:
    """Read ``cuobjdump -res-usage``."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    names = ("registers", "stack_bytes", "shared_bytes")
    return {m[0]: dict(zip(names, map(int, m[1:]), strict=True)) for m in re.findall(pattern, listing)}


def tests(device: str, report: Report, limit_s: float) -> Iterator[dict[str, Any]]:
    """Run ``pytest -m cuda``; yield how many tests passed, and which did not."""
    if not device.startswith("cuda"):
        raise NotRun("no card")
    files = [str(ROOT / "tests" / name) for name in CARD_TESTS]
    at_once = ["-n", "4"] if _finds("xdist") and (os.cpu_count() or 1) >= 8 else []
    yield run_tests([], [*at_once, "-m", "cuda", *files], report.path.with_suffix(".tests.log"), limit_s)


def sanitizer(device: str, report: Report) -> Iterator[dict[str, Any]]:
    """Run some of the tests under compute-sanitizer, as far as there is time."""
    tool = shutil.which("compute-sanitizer")
    if not device.startswith("cuda") or tool is None:
        raise NotRun("no card" if not device.startswith("cuda") else "no compute-sanitizer")
    for name in ("memcheck", "racecheck"):
        limit_s = min(120.0, report.left_s() - 5)
        if limit_s < 30:
            yield {"tool": name, "status": "not run: no time left"}
            continue
        under = [tool, "--tool", name, "--target-processes", "all", "--error-exitcode", "9"]
        files = [str(ROOT / "tests" / name) for name in ("test_cuda_device.py", "test_cuda_dense.py")]
        which = ["-m", "cuda", *files, "-k", f"card and ({SANITIZED})"]
        yield {"tool": name, **run_tests(under, which, report.path.with_suffix(f".{name}.log"), limit_s)}


def run_tests(under: list[str], which: list[str], log: Path, limit_s: float) -> dict[str, Any]:
    """Run pytest, its output in a file; return how many tests ended how, and the exit status."""
    command = [*under, sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *which]
    with log.open("w") as to:
        process = subprocess.Popen(command, cwd=ROOT, stdout=to, stderr=subprocess.STDOUT)
        try:
            status = f"exit {process.wait(timeout=limit_s)}"
        except subprocess.TimeoutExpired:
            status = f"cut off after {limit_s:.0f} s"
        finally:
            process.kill()
            process.wait()
    return {"status": status, **outcomes(log.read_text(errors="replace"))}


def outcomes(log: str) -> dict[str, Any]:
    """Read the lines of ``pytest -v``, of one process or several: one for each test that has ended."""
    words = "PASSED|FAILED|ERROR|SKIPPED"
    alone = re.findall(rf"^(?:\S*/)?(test_\S+::.+?) ({words})\b", log, re.MULTILINE)
    in_turn = re.findall(rf"^\[gw\d+\] \[ *\d+%\] ({words}) (?:\S*/)?(test_.+?) *$", log, re.MULTILINE)
    ended = [*alone, *((name, outcome) for outcome, name in in_turn)]
    failed = sorted({name for name, outcome in ended if outcome in ("FAILED", "ERROR")})
    counts = {word.lower(): sum(outcome == word for _, outcome in ended) for word in ("PASSED", "SKIPPED")}
    return {**counts, "failed": len(failed), "failures": failed[:20]}


def bits(name: str) -> Iterator[dict[str, Any]]:
    yield from of_formats("bits", {"device": name, "tokens": [1, 5, 50]})


def ceilings(is_card: bool) -> Iterator[dict[str, Any]]:
    if not is_card:
        raise NotRun("no card")
    yield from in_a_process("ceilings", {})


def ceiling(report: Report, what: str) -> float | None:
    for row in report.content["steps"].get("ceilings", {}).get("rows", []):
        if row["what"].startswith(what):
            return float(row["bytes_per_s"])
    return None


def link(name: str, report: Report) -> Iterator[dict[str, Any]]:
    peak = ceiling(report, "link") or asked_link(name)
    yield from in_a_process("link", {"device": name, "peak_bytes_per_s": peak})


def asked_link(name: str) -> float | None:
    """Return the bandwidth that an emulated link was told to have."""
    from moe_offload.config import parse_device

    choice = None if name.startswith("cuda") else parse_device(device_text(name, 1 << 20), None)
    return choice.link_bytes_per_s if choice else None


def kernels(is_card: bool, report: Report) -> Iterator[dict[str, Any]]:
    if not is_card:
        raise NotRun("no card; the emulated device computes with the CPU's kernels")
    l2_bytes = int(card_report()["devices"][0]["l2_bytes"])
    peak = ceiling(report, "memory") or 0.0
    yield from of_formats("kernels", {"memory_bytes_per_s": peak, "l2_bytes": l2_bytes})


class Died(Exception):
    """A step's process ended with an error."""


def of_formats(step: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a step's rows of all formats; one that ends its process, as a fault does, costs no other."""
    todo = list(gpu_card.FORMATS)
    while todo:
        try:
            for row in in_a_process(step, {**arguments, "formats": todo}):
                if "begins" in row:
                    todo = todo[todo.index(row["begins"]) :]
                else:
                    yield row
            return
        except Died as error:
            yield {"format": todo[0], "status": f"failed: {error}"}
            todo = todo[1:]


def in_a_process(step: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a step of gpu_card.py: after a fault a process may get nothing more from its card."""
    command = [sys.executable, str(ROOT / "bench" / "gpu_card.py"), step, json.dumps(arguments)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        watch = threading.Timer(PROCESS_LIMIT_S, process.kill)  # a kernel may never end
        watch.start()
        try:
            yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
            code = process.wait()
        finally:
            watch.cancel()
            process.kill()
        errors.seek(0)
        said = errors.read().strip().splitlines()[-1:]
    if code != 0:
        raise Died(f"exit {code} {''.join(said)}"[:500])
