"""Which figures `moe-offload plan` goes by: a profile's, or what this machine was measured to give."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cache

from moe_offload.config import DeviceChoice
from moe_offload.device import load_profile
from moe_offload.planning.machine_speed import MachineSpeed, Overheads
from moe_offload.planning.profile_speed import profile_speed
from moe_offload.profile_store import CPU, GIVEN, TUNED_MACHINE, TUNED_MODEL, ProfileInUse, stored_profile
from moe_offload.rehearsals import PROGRAM, Kept, keep, kept_overheads, kept_steps
from moe_offload.runtime.native_families import native_step_reason
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.checkpoint_key import checkpoint_key
from moe_offload.terminal import Progress, seconds


@dataclass(frozen=True)
class Source:
    """Where a machine's figures are from.

    Attributes:
        profile: None: they were measured, ``age_s`` ago.
    """

    machine: MachineSpeed
    profile: ProfileInUse | None = None
    age_s: float | None = None

    def describe(self) -> str:
        """Return it in a few words."""
        again = " (--profile none measures now)"
        if self.profile is not None:
            return f"profile {self.profile.describe()}{'' if self.profile.kind == GIVEN else again}"
        return f"measured {seconds(self.age_s)} ago{again}" if self.age_s else "measured now"


def find_source(asked: str | None, checkpoint: Checkpoint, vram: str | None) -> Source:
    """Return the figures to plan with.

    Args:
        asked: a profile's name or file; None: what was tuned here for the checkpoint, or else for the
            machine, or what was measured lately, or now; "none": what is measured now.
        vram: where a GPU's memory is asked for, what was tuned with it goes first.

    Raises:
        ConfigError: no such profile, or it is damaged.
    """
    found = _profile(asked, checkpoint, vram)
    if found is not None:
        return Source(profile_speed(found.profile), found)
    kept = _rehearsed(checkpoint, may_be_kept=asked is None)
    return Source(kept.machine, None, kept.age_s)


def _profile(asked: str | None, checkpoint: Checkpoint, vram: str | None) -> ProfileInUse | None:
    if asked == "none":
        return None
    if asked is not None:
        return ProfileInUse(load_profile(asked), GIVEN, None)
    device = CPU if vram is None else DeviceChoice("cuda").key
    found = stored_profile(checkpoint_key(checkpoint), device)
    return found if found is not None and found.kind in (TUNED_MODEL, TUNED_MACHINE) else None


def _rehearsed(checkpoint: Checkpoint, *, may_be_kept: bool) -> Kept:
    """Return what this machine gives to the checkpoint: what was measured lately, or else now.

    Args:
        may_be_kept: False: what was measured before is forgotten.
    """
    key, afresh = checkpoint_key(checkpoint), not may_be_kept
    overheads, steps = (kept_overheads(), kept_steps(key)) if may_be_kept else (None, None)
    if overheads is None:
        overheads = _measured_overheads()
        keep(PROGRAM, overheads, afresh=afresh)
    if steps is None:
        steps = Kept(_measured_steps(checkpoint), 0.0)
        keep(key, steps.machine, afresh=afresh)
        steps = replace(kept_steps(key) or steps, age_s=0.0)
    return replace(steps, machine=replace(steps.machine, overheads=overheads))


@cache
def _measured_overheads() -> Overheads:
    """Return the program's own costs; once for all models of a command."""
    from moe_offload.cli_session import import_libraries

    import_libraries()
    from moe_offload.runtime.yardstick import measure_overheads

    with Progress("measuring this machine", sys.stderr):
        return measure_overheads()


def _measured_steps(checkpoint: Checkpoint) -> MachineSpeed:
    from moe_offload.cli_session import import_libraries

    import_libraries()
    from moe_offload.measure_steps import measure_steps  # imports torch

    is_native = native_step_reason(checkpoint.config) is None
    with Progress("measuring the model's experts", sys.stderr):
        return measure_steps(checkpoint, is_native=is_native)
