"""`moe-offload tune`: measure the machine for a model, choose settings, verify them, keep what won."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_offload.cli_session import check_output, import_libraries, open_with_experts
from moe_offload.config import DEMO_MODEL, DeviceChoice, RuntimeConfig, parse_device
from moe_offload.errors import ConfigError
from moe_offload.header_sizes import element_bytes
from moe_offload.planning.plans import DevicePlan
from moe_offload.planning.time_budget import TimeBudget
from moe_offload.profile_schema import DeviceProfile, Figure
from moe_offload.profile_write import write_profile
from moe_offload.residency.accelerator import Device, check_device, open_device
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.checkpoint_key import checkpoint_key
from moe_offload.terminal import Progress, seconds

if TYPE_CHECKING:
    from moe_offload.tune_stage import Stage
    from moe_offload.tune_tiers import Tiers

SECONDS, QUICK_SECONDS = 150.0, 30.0  # of the three minutes and forty seconds that it may take
TIERS_SHARE = 0.3
MOST_RUNS_SHOWN = 8


def run(args: argparse.Namespace) -> int:
    """Tune, keep the profile, and print what was chosen and why."""
    budget = TimeBudget(_seconds(args), time.perf_counter)
    check_output("-o", args.output)
    checkpoint = open_with_experts(args, "tune")
    import_libraries()
    from moe_offload import tune_profile
    from moe_offload.residency.machine_state import machine_state

    before, key = machine_state(), checkpoint_key(checkpoint)
    choice, device_plan = _device(args, checkpoint)
    with Progress("measuring", sys.stderr) as progress, contextlib.redirect_stderr(io.StringIO()):
        tiers, stages = _measure(args, checkpoint, budget, progress, choice, device_plan)
    name = args.output.stem if args.output is not None else key
    device = "cpu" if choice is None else choice.key
    profile = tune_profile.assemble(name, _command(args), key, tiers, stages, budget.spent_s, device)
    kept = tune_profile.keep(profile, key)
    if args.output is not None:
        _write(args.output, profile)
    for warning in machine_state().warnings(before):
        print(f"moe-offload: note: {warning}", file=sys.stderr)
    print(json.dumps(as_json(profile, kept)) if args.json else as_text(profile, args.output or kept))
    return 0


def _measure(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    budget: TimeBudget,
    progress: Progress,
    choice: DeviceChoice | None,
    plan: DevicePlan | None,
) -> tuple[Tiers, list[Stage]]:
    """Measure the tiers and verify settings; loading's own lines are not the user's business here."""
    from moe_offload import tune, tune_tiers

    def say(what: str, share: float) -> None:
        progress.step(what)(share, 1.0)

    share = budget.share(TIERS_SHARE)
    with _opened(choice, plan) as device:
        tiers = tune_tiers.measure_all(checkpoint, share, say, device=device)
    if plan is not None:
        note = "that may be used, driver and workspace included"
        tiers.figures["gpu"]["vram"] = Figure(plan.vram_bytes, "measured", note)
    load = {name: getattr(args, name) for name in ("ram", "experts", "context", "device", "vram")}
    tuner = tune.Tuner(checkpoint, args.model or DEMO_MODEL, tiers, budget, load, say=say)
    return tiers, tuner.stages()


def _device(
    args: argparse.Namespace, checkpoint: Checkpoint
) -> tuple[DeviceChoice | None, DevicePlan | None]:
    """Return the accelerator that was asked for, and how its memory is divided.

    Raises:
        ConfigError: it is not there, or the model has no experts for it.
        BudgetError: it has too little memory.
    """
    from moe_offload.runtime.device_setup import plan_vram

    choice = parse_device(args.device, args.vram)
    if choice is None:
        return None, None
    check_device(choice)
    plan = plan_vram(checkpoint, RuntimeConfig(device=choice), element_bytes(checkpoint))
    if plan is None:
        raise ConfigError("--device: the model has no experts, and nothing else runs there; tune without it")
    return choice, plan


@contextlib.contextmanager
def _opened(choice: DeviceChoice | None, plan: DevicePlan | None) -> Iterator[Device | None]:
    """Open the device with the memory that experts will have."""
    if choice is None or plan is None:
        yield None
        return
    device = open_device(choice, plan.expert_bytes)
    try:
        yield device
    finally:
        device.close()


def _seconds(args: argparse.Namespace) -> float:
    given: float | None = args.seconds
    if given is None:
        return QUICK_SECONDS if args.quick else SECONDS
    if not 0 < given < float("inf"):
        raise ConfigError(f"--seconds must be a positive number, got {given:g}")
    return given


def _command(args: argparse.Namespace) -> str:
    """Return what was asked for, without paths: a profile may be passed on."""
    given = {
        "--seconds": args.seconds,
        "--ram": args.ram,
        "--experts": args.experts,
        "--context": args.context,
        "--device": args.device,
        "--vram": args.vram,
    }
    words = ["moe-offload tune", *(["--quick"] if args.quick else [])]
    words += [f"{flag} {value}" for flag, value in given.items() if value not in (None, "auto")]
    return " ".join(words)


def _write(path: Path, profile: DeviceProfile) -> None:
    try:
        write_profile(path, profile)
    except OSError as error:
        raise ConfigError(f"-o {path}: {error.strerror}; give a file that can be written") from error


def as_json(profile: DeviceProfile, path: Path | None) -> dict[str, Any]:
    """Return the profile for programs, figures in base units."""
    return {
        "profile": None if path is None else str(path),
        "figures": {
            section: {name: figure.value for name, figure in figures.items()}
            for section, figures in profile.figures.items()
        },
        **{name: dict(notes) for name, notes in profile.notes.items()},
    }


def as_text(profile: DeviceProfile, path: Path | None) -> str:
    """Return what was measured and chosen, for people."""
    evidence = profile.notes["evidence"]
    lines = {
        "memory": f"{_gb(profile, 'ram', 'read_bandwidth')}; the decode kernel "
        f"{_gb(profile, 'ram', 'kernel_bandwidth')}, {_gb(profile, 'ram', 'kernel_bandwidth_busy')} while "
        "experts are read",
        "disk": f"experts at {_gb(profile, 'disk', 'read_bandwidth')}, "
        f"{_gb(profile, 'disk', 'read_bandwidth_busy')} while the kernel runs",
        **({"device": _device_line(profile)} if profile.has("gpu") else {}),
        "settings": ", ".join(f"{name} {value}" for name, value in profile.settings.items()),
        "verdict": evidence["verdict"],
        "took": seconds(evidence["seconds"]),
        "kept in": str(path) if path is not None else "nowhere: see above",
    }
    shown = [f"{name:10} {text}" for name, text in lines.items()]
    return "\n".join([*shown, "", *map(_run_line, evidence["run"][:MOST_RUNS_SHOWN])])


def _device_line(profile: DeviceProfile) -> str:
    link = f"link {_gb(profile, 'link', 'to_device_bandwidth')} there, "
    link += f"{_gb(profile, 'link', 'to_host_bandwidth')} back"
    return (
        f"experts at {_gb(profile, 'gpu', 'read_bandwidth')}, {link}, {profile.settings['vram_slots']} slots"
    )


def _gb(profile: DeviceProfile, section: str, name: str) -> str:
    value = profile.get(section, name)
    return "not known" if value is None else f"{value / 1e9:.2f} GB/s"


def _run_line(run: dict[str, Any]) -> str:
    against = run.get("against_defaults")
    interval = f" ({run['low']:.3f} to {run['high']:.3f})" if "low" in run else ""
    gain = "" if against is None else f", {against:.3f} times the defaults{interval}"
    return f"  {run['tokens_per_s']:8.4g} tok/s  {run['settings']}, {run['stage']}{gain}"
