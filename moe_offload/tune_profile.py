"""What `tune` writes: figures, settings, evidence; for the model, and figures alone for the machine."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_offload import ops, profile_store
from moe_offload.errors import ConfigError
from moe_offload.planning.profile_speed import split_overhead
from moe_offload.planning.tuning import Choice
from moe_offload.profile_schema import CURVES, FIGURES, REQUIRED, DeviceProfile, Figure
from moe_offload.residency.machine_state import cpu_name, machine_key
from moe_offload.tune_stage import Stage, combined
from moe_offload.tune_tiers import Tiers

CPU_SECTIONS, DEVICE_SECTIONS = ("cpu", "ram", "disk"), ("gpu", "link")


def assemble(
    name: str,
    command: str,
    checkpoint: str,
    tiers: Tiers,
    stages: list[Stage],
    seconds: float,
    device: str = profile_store.CPU,
) -> DeviceProfile:
    """Return the profile: what was measured, what was chosen, and the evidence.

    Args:
        checkpoint: its key.
        device: the key of what computed beside the CPU.
    """
    choice, best = combined(stages)
    tiers.figures["model"] |= _overheads(stages) | _prediction(choice, stages[-1]) | _gain(choice, stages[-1])
    keep_the_possible(tiers)
    evidence: dict[str, Any] = {
        "verdict": "; ".join(f"{stage.name}: {stage.verdict}" for stage in stages),
        "seconds": round(seconds, 1),
        "pairs": best.pairs,
        "tokens": best.tokens,
        "ram_bytes": stages[0].ram_bytes,
        "duel": [_duel(stage) for stage in stages if stage.rival is not None],
        "run": [run for stage in stages for run in stage.runs],
    }
    if best.gain is not None and best.choice != best.defaults:
        evidence |= {"speedup": best.gain.speedup}
        evidence |= {"speedup_low": best.gain.low, "speedup_high": best.gain.high}
    return DeviceProfile(
        name=name,
        description=f"{cpu_name() or 'this machine'}, {ops.usable_cores()} cores, as {command} saw it",
        unified_memory=False,
        measured=profile_store.measured_now(command),
        figures=tiers.figures,
        curves=tiers.curves,
        expert_times=tiers.expert_times,
        notes={
            "machine": {"key": machine_key(), "device": device},
            "state": profile_store.state_notes(),
            "checkpoint": {"key": checkpoint},
            "settings": as_settings(choice, stages[0].slots, stages[0].device_slots),
            "evidence": evidence,
        },
    )


def _overheads(stages: list[Stage]) -> dict[str, Figure]:
    """Return what layers cost in runs that read nothing ahead; nothing where there were none."""
    first, last = stages[0], stages[-1]
    if first.layer_s is None:
        return {}
    layer_s, stall_s = split_overhead(first.layer_s, first.stalled_share)
    if stall_s is None and last.layer_s is not None:
        stall_s = split_overhead(last.layer_s, last.stalled_share, layer_s)[1]
    found = {"layer_overhead": layer_s, "stall_overhead": stall_s}
    note = f"beside bytes and waiting, nothing read ahead, {', '.join(stage.name for stage in stages)}"
    return {name: Figure(value, "measured", note) for name, value in found.items() if value is not None}


def _gain(choice: Choice, stage: Stage) -> dict[str, Figure]:
    """Return what the chosen prefetching gained; nothing where other prefetching was paired, or none."""
    seen, paired = stage.prefetch, stage.defaults
    if seen is None or (choice.predictor, choice.prefetch_depth) != (paired.predictor, paired.prefetch_depth):
        return {}
    between = f"{seen.pairs} pairs of runs ({seen.gain.low:.2f} to {seen.gain.high:.2f}), {stage.name}"
    return {
        "prefetch_speedup": Figure(seen.gain.speedup, "measured", between),
        "prefetch_hit_rate": Figure(seen.hit_rate, "measured", f"of those without prefetching, {stage.name}"),
    }


def _prediction(choice: Choice, stage: Stage) -> dict[str, Figure]:
    """Return what the chosen predictor finds a layer ahead and takes; nothing where none was asked."""
    found = stage.predictors.get(choice.predictor)
    if found is None or 1 not in found.recall:
        return {}
    note = f"of {choice.predictor}, a layer ahead, {stage.name}"
    missed = {} if 1 not in found.missed_recall else {"missed_recall": found.missed_recall[1]}
    figures = {"recall": found.recall[1], **missed, "predict_time": found.predict_s}
    return {name: Figure(value, "measured", note) for name, value in figures.items()}


def _duel(stage: Stage) -> dict[str, Any]:
    """Return what won under one budget, against what, by how much and in how many pairs of runs."""
    assert stage.rival is not None and stage.gain is not None
    sides, gain = ["the defaults", stage.rival.describe()], stage.gain
    speedup, low, high = gain.speedup, gain.low, gain.high
    if stage.choice == stage.defaults:
        speedup, low, high = 1 / speedup, 1 / high, 1 / low if low else math.inf
    else:
        sides.reverse()
    entry = {"stage": stage.name, "winner": sides[0], "against": sides[1], "speedup": speedup}
    return entry | ({"low": low, "high": high} if math.isfinite(high) else {}) | {"pairs": stage.pairs}


def keep_the_possible(tiers: Tiers) -> None:
    """Leave out what the schema calls impossible: a machine that was stopped meanwhile measures such things.

    Raises:
        ConfigError: no profile can be without it.
    """
    for section, figures in tiers.figures.items():
        for name in [
            name for name, figure in figures.items() if not _is_possible(section, name, figure.value)
        ]:
            if name in REQUIRED.get(section, ()):
                raise ConfigError(
                    f"{section}.{name} was measured as {figures[name].value:.3g}, which cannot be; run "
                    "`moe-offload tune` again while nothing stops it"
                )
            del figures[name]
    for section, curves in tiers.curves.items():
        for name, curve in list(curves.items()):
            _, least, most = CURVES[section][name].bounds
            points = tuple(point for point in curve.points if least <= point[1] <= most)
            curves[name] = replace(curve, points=points)
            if not points:
                del curves[name]


def _is_possible(section: str, name: str, value: float) -> bool:
    _, least, most = FIGURES[section][name]
    return least <= value <= most


def as_settings(choice: Choice, slots: int, device_slots: int = 0) -> dict[str, Any]:
    """Return a choice as [settings] of a profile; without prefetch there is nothing to say of predictors."""
    settings: dict[str, Any] = {
        "num_threads": choice.num_threads,
        "policy": choice.policy,
        "prefetch": choice.prefetch,
        "ram_slots": slots,
        "ram_staging": choice.ram_staging,
    }
    if choice.prefetch:
        settings |= {"predictor": choice.predictor, "prefetch_depth": choice.prefetch_depth}
    if choice.scheduler is not None:
        settings |= {"scheduler": choice.scheduler, "vram_slots": device_slots}
        settings |= {"vram_staging": choice.vram_staging, "exclusive": choice.exclusive}
    return settings


def keep(profile: DeviceProfile, checkpoint: str) -> Path | None:
    """Keep the profile for this checkpoint, and its figures for all others on this machine.

    Those of a device are for loads with it, the rest for all.
    """
    profile_store.keep(_of_machine(profile, CPU_SECTIONS, profile_store.CPU), None)
    device = profile.notes["machine"]["device"]
    if device != profile_store.CPU:
        profile_store.keep(_of_machine(profile, (*CPU_SECTIONS, *DEVICE_SECTIONS), device), None)
    return profile_store.keep(profile, checkpoint)


def _of_machine(profile: DeviceProfile, sections: tuple[str, ...], device: str) -> DeviceProfile:
    """Return what a profile says of the machine, whatever the model."""
    own = {name: section for name, section in profile.figures.items() if name in sections}
    times = [time for time in profile.expert_times if time.device == "cpu" or device != profile_store.CPU]
    notes = {name: notes for name, notes in profile.notes.items() if name == "state"}
    notes = {"machine": {"key": machine_key(), "device": device}, **notes}
    return replace(profile, name=machine_key(), figures=own, expert_times=times, notes=notes)
