"""`moe-offload info`: the machine, what the project makes of it, and why what is off is off.

One screen that a bug report can paste; nothing of it is guessed, and a part that fails says how.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import moe_offload
from moe_offload import cuda
from moe_offload.config import gib
from moe_offload.residency.memory import auto_ram_bytes, available_bytes, total_bytes

SUPPORTED_MACHINES = ("x86_64", "aarch64")
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "numpy",
    "psutil",
    "llama-cpp-python",
    "onnxruntime",
    "matplotlib",
)
ENVIRONMENT = (
    "MOE_OFFLOAD_ISA",
    "MOE_OFFLOAD_IO",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "HF_HOME",
)


def run(args: argparse.Namespace) -> int:
    """Print the screen, or the JSON object."""
    report = describe()
    print(json.dumps(report) if args.json else as_text(report))
    return 0


def describe() -> dict[str, Any]:
    """Return everything that ``info`` shows; sizes in bytes."""
    return {
        "version": moe_offload.__version__,
        "python": platform.python_version(),
        "platform": _platform(),
        "cpu": _try(_cpu),
        "memory": _try(_memory),
        "io": _try(_io),
        "cuda": _try(cuda.describe),
        "profile": _try(_profile),
        "state": _try(_state),
        "packages": {name: _version(name) for name in PACKAGES},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def _try(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a part of the report, or what kept it from being made: a report must not fail."""
    try:
        return part()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _platform() -> dict[str, Any]:
    release = platform.release()
    supported = sys.platform == "linux" and platform.machine() in SUPPORTED_MACHINES
    return {
        "system": f"{platform.system()} {release}",
        "machine": platform.machine(),
        "wsl2": "microsoft" in release.lower(),
        "supported": supported,
        "reason": "" if supported else "needs Linux (or WSL2) on x86-64 or aarch64",
    }


def _cpu() -> dict[str, Any]:
    from moe_offload import ops  # imports torch: that it can be imported is part of the report

    return {
        "name": _cpu_name(),
        "logical_cores": os.cpu_count(),
        "threads": ops.num_threads(),
        "isa": ops.isa(),
        "amx": ops.amx_state(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _memory() -> dict[str, Any]:
    return {
        "total_bytes": total_bytes(),
        "available_bytes": available_bytes(),
        "ram_auto_bytes": auto_ram_bytes(),
    }


def _state() -> dict[str, Any]:
    """Return what limits the machine now: power, heat, cgroup; what it does not say is left out."""
    from moe_offload.profile_store import state_notes
    from moe_offload.residency.machine_state import machine_state

    limit = machine_state().cgroup_limit_bytes
    return {**state_notes(), **({} if limit is None else {"cgroup_limit_bytes": limit})}


def _tiers_line(report: dict[str, Any]) -> str:
    """Return the memories that experts may be in, fastest first, and how fast each is read."""
    figures = report["profile"].get("figures", {})
    rates = {name: f" at {value / 1e9:.2f} GB/s" for name, value in figures.items() if value}
    devices = report["cuda"].get("devices", [])
    cards = [f"VRAM {gib(card['memory_bytes'])}" for card in devices if not card.get("unusable")]
    ram = report["memory"].get("total_bytes")
    parts = cards if report["cuda"].get("on") else ["no VRAM"]
    parts.append(f"RAM {gib(ram) if ram else 'unknown'}{rates.get('ram_bytes_per_s', '')}")
    return ", ".join([*parts, f"disk{rates.get('disk_bytes_per_s', ', not measured yet')}"])


def _io() -> dict[str, Any]:
    from moe_offload.config import DEMO_MODEL
    from moe_offload.residency.huge_pages import try_huge_page
    from moe_offload.storage.io import add_file, io_mode_from_env, open_reader

    reader = open_reader()
    try:
        mode, reason = reader.file_mode(add_file(reader, DEMO_MODEL))
        why_threads = reader.why_no_ring()
    finally:
        reader.close()
    by = f"threads ({why_threads})" if why_threads else "io_uring"
    pages = (
        f"small pages ({why_small})" if (why_small := try_huge_page()) else "huge pages, made while decoding"
    )
    return {"asked": io_mode_from_env(), "bundled_model": mode, "reason": reason, "by": by, "into": pages}


def _cuda_line(report: dict[str, Any]) -> str:
    """Return what runs on which cards, or why nothing does."""
    if "error" in report:
        return f"not available: {report['error']}"
    if not report["on"]:
        return f"off: {report['reason']}"
    cards = ", ".join(
        f"not usable: {card['unusable']}"
        if card.get("unusable")
        else f"{card['name']} ({gib(card['memory_bytes'])}, sm_{card['sm']})"
        for card in report["devices"]
    )
    versions = f"built with CUDA {report['built_with']}, driver runs {report['driver']}"
    return f"on: {cards}; {versions}; {report['pinned']}"


def _profile() -> dict[str, Any]:
    """Return the profile that a load of the demo model would find, and for how many models there is one."""
    from moe_offload.config import DEMO_MODEL
    from moe_offload.profile_store import stored_path, stored_profile
    from moe_offload.storage.checkpoint import open_checkpoint
    from moe_offload.storage.checkpoint_key import checkpoint_key

    own = stored_path()
    kept = [path.stem.partition("@") for path in own.parent.glob(f"{own.stem}*.toml")]
    tuned = len({model for model, _, _ in kept if model != own.stem})
    devices = sorted({device for _, _, device in kept if device})
    found = stored_profile(checkpoint_key(open_checkpoint(DEMO_MODEL))) if tuned else stored_profile(None)
    if found is None:
        reason = "nothing was measured yet: the first load will, `moe-offload tune` does it thoroughly"
        return {"in_use": None, "reason": reason, "tuned_models": tuned, "tuned_devices": devices}
    return {
        "in_use": found.describe(),
        "reason": "",
        "tuned_models": tuned,
        "tuned_devices": devices,
        "figures": {
            name: found.profile.get(*figure)
            for name, figure in (
                ("ram_bytes_per_s", ("ram", "kernel_bandwidth", "read_bandwidth")),
                ("disk_bytes_per_s", ("disk", "read_bandwidth")),
            )
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def as_text(report: dict[str, Any]) -> str:
    """Return the report for people."""
    machine = report["platform"]
    lines = {
        "moe_offload": f"{report['version']} on Python {report['python']}",
        "system": f"{machine['system']} {machine['machine']}"
        + (" (WSL2)" if machine["wsl2"] else "")
        + ("" if machine["supported"] else f"; unsupported: {machine['reason']}"),
        "processor": _line(report["cpu"], "{name}, {logical_cores} logical cores"),
        "threads": _line(report["cpu"], "{threads}, instruction set {isa} (AMX: {amx})"),
        "memory": _sizes(report["memory"]),
        "tiers": _tiers_line(report),
        "state": _listed({name: str(value) for name, value in report["state"].items()}, " ")
        or "nothing said",
        "disk reads": _line(
            report["io"],
            "{asked} asked for, {bundled_model} on the bundled model's disk, by {by}, into {into}",
        )
        + (f" ({report['io']['reason']})" if report["io"].get("reason") else ""),
        "CUDA": _cuda_line(report["cuda"]),
        "profile": _profile_line(report["profile"]),
        "packages": _listed({name: found or "missing" for name, found in report["packages"].items()}, " "),
        "environment": _listed(report["environment"], "=") or "nothing set that matters here",
    }
    return "\n".join(f"{name:12} {text}" for name, text in lines.items())


def _line(part: dict[str, Any], template: str) -> str:
    return f"not available: {part['error']}" if "error" in part else template.format(**part)


def _profile_line(profile: dict[str, Any]) -> str:
    if profile.get("in_use") is None:
        return _line(profile, "none: {reason}")
    rates = " and ".join(f"{value / 1e9:.2f} GB/s" for value in profile["figures"].values() if value)
    devices = f", also with {', '.join(profile['tuned_devices'])}" if profile["tuned_devices"] else ""
    tuned = f"{profile['tuned_models']} models tuned{devices}"
    return f"{profile['in_use']}; weights and experts at {rates}; {tuned}"


def _sizes(memory: dict[str, Any]) -> str:
    shown = {key: gib(value) if isinstance(value, int) else value for key, value in memory.items()}
    return _line(shown, "{total_bytes}, {available_bytes} available, ram auto takes {ram_auto_bytes}")


def _listed(items: dict[str, str], between: str) -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in items.items())
