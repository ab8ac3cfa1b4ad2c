"""Is there a GPU, and if not, why not: what was built, what the driver is, what cards it shows.

``moe_offload/_cuda.so`` is a library of its own with a static CUDA runtime: this module opens it by ctypes to
ask, the native extension opens it to compute. Nothing here raises; what is missing becomes a reason.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).parent / "_cuda.so"
RECORD = Path(__file__).parent / "_cuda_build.json"
OLDEST_DRIVERS = {12: 525, 13: 580}  # the first driver of a CUDA release's minor versions
REMEDY = "install nvcc (a CUDA toolkit, or moe_offload[cuda-build]) and build again with MOE_OFFLOAD_CUDA=on"

BUILD_FOR_IT = (
    "sm_75 is the oldest there are kernels for; MOE_OFFLOAD_CUDA_ARCHS=native builds for this machine"
)
PINNED = "host memory is pinned at load as far as the system grants; the rest is copied through 1 MiB buffers"
PINNED_WSL2 = "; WSL2 often pins half of the memory or less"


def describe(library: Path | None = None, record: Path | None = None) -> dict[str, Any]:
    """Return ``on``, the ``reason`` where it is off, and what was found; sizes in bytes.

    Versions are CUDA's ("13.0"); a driver is named by the newest CUDA that it runs.
    """
    library, built = library or LIBRARY, _built(record or RECORD)
    report: dict[str, Any] = {"on": False, "reason": "", "built_with": built.get("cuda"), "devices": []}
    report["architectures"] = built.get("sm", [])
    report["pinned"] = PINNED + (PINNED_WSL2 if is_wsl2() else "")
    if not library.exists():
        why = built.get("reason") or "this installation came without CUDA kernels"
        return report | {"reason": f"not built: {why}; {REMEDY}"}
    try:
        found = _ask(ctypes.CDLL(str(library)))
    except OSError as error:
        return report | {"reason": f"built, but does not load: {error}"}
    runtime, driver = found["runtime"], found["driver"]
    for card in found["devices"]:
        card["unusable"] = _why_unusable(card, built)
    report |= {
        "built_with": _dotted(runtime),
        "required_driver": _required(runtime),
        "driver": _dotted(driver) if driver else None,
        "devices": found["devices"],
    }
    report["reason"] = _reason(runtime, driver, found)
    report["on"] = not report["reason"]
    return report


def _reason(runtime: int, driver: int, found: dict[str, Any]) -> str:
    """Return why the GPU is off, or nothing."""
    needs = f"built with CUDA {_dotted(runtime)}, which needs {_required(runtime)}"
    if driver == 0:
        return f"no NVIDIA driver was found; {needs}{_wsl_hint()}"
    if driver // 1000 < runtime // 1000:
        return f"the driver is too old: it runs CUDA up to {_dotted(driver)}; {needs}"
    if found["error"]:
        return f"the driver answers: {found['error']}; {needs}"
    if not found["devices"]:
        return "the driver shows no GPU (is CUDA_VISIBLE_DEVICES empty?)"
    reasons = [card["unusable"] for card in found["devices"]]
    return "; ".join(dict.fromkeys(reasons)) if all(reasons) else ""


def reason_for(index: int, report: dict[str, Any]) -> str:
    """Return why one card cannot be used, or nothing; ``report``: what ``describe`` said."""
    if report["reason"]:
        return str(report["reason"])
    cards = report["devices"]
    if index >= len(cards):
        return f"there is no GPU {index}: the driver shows {len(cards)}, counted from 0"
    return str(cards[index]["unusable"])


def _why_unusable(card: dict[str, Any], built: dict[str, Any]) -> str:
    """Return why a card runs none of the kernels that were built, or nothing.

    Machine code runs on cards of its own generation, its own number and later, PTX on every card that is no
    older.
    """
    if "error" in card:
        return f"a GPU does not say what it is: {card['error']}"
    if not built.get("ptx"):
        return ""  # nobody knows
    machine, sm = set(built.get("sm", [])), card["sm"]
    ptx = {built["ptx"]} | (machine & {90})  # csrc/cuda/nvcc.py: codes
    if any(number // 10 == sm // 10 and number <= sm for number in machine) or min(ptx) <= sm:
        return ""
    served = ", ".join(f"sm_{number}" for number in sorted(machine | ptx))
    return f"{card['name']} is sm_{sm}, and kernels were built for {served}; {BUILD_FOR_IT}"


def _built(record: Path) -> dict[str, Any]:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _ask(library: ctypes.CDLL) -> dict[str, Any]:
    buffer = ctypes.create_string_buffer(1 << 16)
    length = library.moe_offload_cuda_info(buffer, len(buffer))
    found: dict[str, Any] = json.loads(buffer.raw[:length].decode("utf-8", "replace"))
    return found


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _required(runtime: int) -> str:
    oldest = OLDEST_DRIVERS.get(runtime // 1000)
    return f"driver {oldest} or later" if oldest else f"a driver of CUDA {runtime // 1000}"


def _wsl_hint() -> str:
    return "; under WSL2 the driver is installed in Windows, not here" if is_wsl2() else ""


def is_wsl2() -> bool:
    """Return whether this Linux runs inside Windows."""
    release = Path("/proc/sys/kernel/osrelease")
    return sys.platform == "linux" and release.exists() and "microsoft" in release.read_text().lower()
