"""`moe-offload tune`: measure the machine for a model, choose settings, verify them, keep what won."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_offload.cli_session import import_libraries
from moe_offload.config import DEMO_MODEL
from moe_offload.errors import ConfigError
from moe_offload.planning.time_budget import TimeBudget
from moe_offload.profile_schema import DeviceProfile
from moe_offload.profile_write import write_profile
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.checkpoint_key import checkpoint_key
from moe_offload.terminal import Progress, seconds

if TYPE_CHECKING:
    from moe_offload.tune import Stage
    from moe_offload.tune_tiers import Tiers

SECONDS, QUICK_SECONDS = 150.0, 30.0  # of the three minutes and forty seconds that it may take
TIERS_SHARE = 0.3
MOST_RUNS_SHOWN = 8


def run(args: argparse.Namespace) -> int:
    """Tune, keep the profile, and print what was chosen and why."""
    budget = TimeBudget(_seconds(args), time.perf_counter)
    _check_output(args.output)
    checkpoint = open_checkpoint(args.model or DEMO_MODEL)
    import_libraries()
    from moe_offload import tune_profile
    from moe_offload.residency.machine_state import machine_state

    before, key = machine_state(), checkpoint_key(checkpoint)
    with Progress("measuring", sys.stderr) as progress, contextlib.redirect_stderr(io.StringIO()):
        tiers, stages = _measure(args, checkpoint, budget, progress)
    name = args.output.stem if args.output is not None else key
    profile = tune_profile.assemble(name, _command(args), key, tiers, stages, budget.spent_s)
    kept = tune_profile.keep(profile, key)
    if args.output is not None:
        _write(args.output, profile)
    for warning in machine_state().warnings(before):
        print(f"moe-offload: note: {warning}", file=sys.stderr)
    print(json.dumps(as_json(profile, kept)) if args.json else as_text(profile, args.output or kept))
    return 0


def _measure(
    args: argparse.Namespace, checkpoint: Any, budget: TimeBudget, progress: Progress
) -> tuple[Tiers, list[Stage]]:
    """Measure the tiers and verify settings; loading's own lines are not the user's business here."""
    from moe_offload import tune, tune_tiers

    def say(what: str, share: float) -> None:
        progress.step(what)(share, 1.0)

    tiers = tune_tiers.measure_all(checkpoint, budget.share(TIERS_SHARE), say)
    load = {"ram": args.ram, "experts": args.experts, "context": args.context}
    tuner = tune.Tuner(checkpoint, args.model or DEMO_MODEL, tiers, budget, load, say=say)
    return tiers, tuner.stages()


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
    }
    words = ["moe-offload tune", *(["--quick"] if args.quick else [])]
    words += [f"{flag} {value}" for flag, value in given.items() if value not in (None, "auto")]
    return " ".join(words)


def _check_output(path: Path | None) -> None:
    """Refuse a file that could not be written, before anything is measured."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"-o {path}: give a file in a folder that exists, such as profile.toml")


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
        "settings": ", ".join(f"{name} {value}" for name, value in profile.settings.items()),
        "verdict": evidence["verdict"],
        "took": seconds(evidence["seconds"]),
        "kept in": str(path) if path is not None else "nowhere: see above",
    }
    shown = [f"{name:10} {text}" for name, text in lines.items()]
    return "\n".join([*shown, "", *map(_run_line, evidence["run"][:MOST_RUNS_SHOWN])])


def _gb(profile: DeviceProfile, section: str, name: str) -> str:
    value = profile.get(section, name)
    return "not known" if value is None else f"{value / 1e9:.2f} GB/s"


def _run_line(run: dict[str, Any]) -> str:
    against = run.get("against_defaults")
    interval = f" ({run['low']:.3f} to {run['high']:.3f})" if "low" in run else ""
    gain = "" if against is None else f", {against:.3f} times the defaults{interval}"
    return f"  {run['tokens_per_s']:8.4g} tok/s  {run['settings']}, {run['stage']}{gain}"
