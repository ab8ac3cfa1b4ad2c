"""Which profile a model is loaded with, and what of it counts: figures, and settings nobody gave."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from moe_offload import ops, profile_store
from moe_offload.config import MIB, DeviceChoice, RuntimeConfig
from moe_offload.device import load_profile
from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.header_sizes import bytes_per_token
from moe_offload.measure import WEIGHTS_BYTES, measure_machine
from moe_offload.planning.correction import RunningCorrection
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.plans import PlacementPlan
from moe_offload.planning.profile_speed import profile_speed
from moe_offload.planning.scheduler import check_scheduler
from moe_offload.profile_store import GIVEN, MEASURED_NOW, TUNED_MACHINE, TUNED_MODEL, ProfileInUse
from moe_offload.residency.prefetch_pace import DISK_RATE, LINK_RATE
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.checkpoint_key import checkpoint_key

LAYER = "layer_s"  # a name in a RunningCorrection
LEAST_WEIGHTS_BYTES = 4 * MIB
PREDICTION = ("predictor", "prefetch", "prefetch_depth")  # one question in three parts
DIVISION = ("ram_staging", "vram_staging", "exclusive")
CHECKS: dict[str, Callable[[str], object]] = {"policy": make_policy, "scheduler": check_scheduler}
SETTINGS = ("num_threads", "policy", "scheduler", *DIVISION, *PREDICTION)


def find_profile(
    asked: str | Path, checkpoint: Checkpoint, device: DeviceChoice | None = None
) -> ProfileInUse | None:
    """Return the profile to load with; None: there is none yet, or none is wanted.

    Args:
        asked: "auto": what was kept for the checkpoint, or else for the machine; "none"; or a name or file.
        device: what the load is to use beside the CPU.

    Raises:
        ConfigError: no such profile, or it is damaged.
    """
    if not isinstance(asked, str | Path):
        raise ConfigError(f"profile must be a name or a file, got {asked!r:.80} ({type(asked).__name__})")
    if str(asked) == "none" or not checkpoint.experts.layouts:
        return None
    if str(asked) == "auto":
        key = profile_store.CPU if device is None else device.key
        return profile_store.stored_profile(checkpoint_key(checkpoint), key)
    return ProfileInUse(load_profile(asked), GIVEN, Path(asked))


def with_settings(config: RuntimeConfig, found: ProfileInUse | None, given: Collection[str]) -> RuntimeConfig:
    """Return ``config`` with what was tuned in place of defaults; what the caller gave stays.

    What was tuned with a device is for loads with one, and what was tuned without for those without.

    Args:
        given: names of the arguments that the caller chose.

    Raises:
        ConfigError: a profile that was asked for names a policy or scheduler that nobody knows.
    """
    if found is None:
        return config
    if (config.device is not None) != ("scheduler" in found.profile.settings):
        return config  # a device may even take threads from the CPU
    tuned = {name: value for name, value in found.profile.settings.items() if name in SETTINGS}
    if "predictor" in given or "prefetch" in given:
        tuned = {name: value for name, value in tuned.items() if name not in PREDICTION}
    tuned = {name: value for name, value in tuned.items() if name not in given}
    for name in CHECKS.keys() & tuned.keys():
        try:
            CHECKS[name](str(tuned[name]))
        except (ConfigError, CheckpointError) as error:
            if found.kind == GIVEN:
                raise
            note = f"what was tuned is not known here, its default is taken: {error} ({found.path})"
            print(f"moe-offload: note: {note}", file=sys.stderr)
            del tuned[name]
    return replace(config, **tuned)


def measure_once(checkpoint: Checkpoint, plan: PlacementPlan, say: Callable[[str], None]) -> ProfileInUse:
    """Look at the machine for the first time and keep what was seen.

    Takes only memory that the plan has for what is not loaded yet, so that the budget holds here, too.
    """
    room_bytes = (plan.total_bytes - plan.base_bytes) // 2
    weights_bytes = max(LEAST_WEIGHTS_BYTES, min(WEIGHTS_BYTES, room_bytes))
    profile = profile_store.quick_profile(measure_machine(checkpoint, weights_bytes), ops.num_threads())
    found = ProfileInUse(profile, MEASURED_NOW, profile_store.keep(profile, None))
    speed = profile_speed(profile)
    say(
        f"first load on this machine: weights from RAM at {speed.ram_bytes_per_s / 1e9:.1f} GB/s, experts "
        f"from disk at {speed.disk_bytes_per_s / 1e9:.2f} GB/s; `moe-offload tune` finds the best settings"
    )
    return found


def choose(
    found: ProfileInUse | None,
    asked: str | Path,
    checkpoint: Checkpoint,
    plan: PlacementPlan,
    say: Callable[[str], None],
) -> ProfileInUse | None:
    """Return ``found``, or what a first look at the machine gives where that is wanted; say which."""
    if found is not None:
        if found.kind in (TUNED_MODEL, TUNED_MACHINE, GIVEN):
            say(f"profile: {found.describe()}")
        return found
    if str(asked) != "auto" or not plan.pools:
        return None
    try:
        return measure_once(checkpoint, plan, say)
    except CheckpointError:
        return None  # what cannot be read now cannot be loaded either: loading says so, with the tensor


def expectations(found: ProfileInUse | None, checkpoint: Checkpoint) -> RunningCorrection:
    """Return what the run expects of disk and layers, for its measurements to correct."""
    if found is None:
        return RunningCorrection()
    layers = max(1, checkpoint.spec.num_hidden_layers)
    speed = profile_speed(found.profile)
    overhead_s = layers * (found.profile.get("model", "layer_overhead") or 0.0)
    token_s = bytes_per_token(checkpoint, 0).total_bytes / speed.ram_bytes_per_s + overhead_s
    disk = found.profile.get("disk", "read_bandwidth_busy") or speed.disk_bytes_per_s
    expected = {DISK_RATE: disk, LAYER: token_s / layers}
    link = found.profile.get("link", "to_device_bandwidth_busy", "to_device_bandwidth")
    return RunningCorrection(expected | ({} if link is None else {LINK_RATE: link}))
