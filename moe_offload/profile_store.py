"""The profiles that this user's machines have: where they are kept, which one a model gets.

Below XDG_CACHE_HOME (~/.cache), a file a machine and one for each checkpoint that was tuned there, and the
same again for each device that was used; the machine's name is in the file's name, since a home may be shared
by several.
"""

from __future__ import annotations

import datetime
import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import moe_offload
from moe_offload.device import load_profile
from moe_offload.errors import ConfigError
from moe_offload.planning.machine_speed import MachineSpeed
from moe_offload.profile_schema import DeviceProfile, Figure
from moe_offload.profile_write import write_profile
from moe_offload.residency.machine_state import cpu_name, machine_key, machine_state
from moe_offload.residency.memory import total_bytes
from moe_offload.storage.checkpoint_key import cache_folder, is_kept

TUNED_MODEL, TUNED_MACHINE = "tuned for this model", "tuned on this machine"
CPU = "cpu"  # the device of a profile that knows none
MEASURED, MEASURED_NOW, GIVEN = "measured at an earlier load", "measured now", "given"


@dataclass(frozen=True)
class ProfileInUse:
    """A profile and how it was found; ``path`` None: it could not be kept."""

    profile: DeviceProfile
    kind: str
    path: Path | None

    @property
    def device(self) -> str:
        """The key of the device that it was tuned with."""
        return str(self.profile.notes.get("machine", {}).get("device", CPU))

    def describe(self) -> str:
        """Return it in a line: kind, date, device, settings."""
        date = self.profile.measured.get("date")
        words = [self.kind if self.kind != GIVEN else f"{self.profile.name}, as asked for"]
        if date and self.kind in (TUNED_MODEL, TUNED_MACHINE, MEASURED):
            words.append(f"on {date}")
        if self.device != CPU:
            words.append(f"with {self.device}")
        text = " ".join(words)
        chosen = [f"{name} {value}" for name, value in self.profile.settings.items()]
        return f"{text} ({', '.join(chosen)})" if chosen else text


def stored_path(checkpoint: str | None = None, device: str = CPU) -> Path:
    """Return where this machine's profile is kept, or the one for a checkpoint (its key) on it.

    Args:
        device: its key (DeviceChoice.key).
    """
    name = machine_key() if checkpoint is None else f"{machine_key()}-{checkpoint}"
    return cache_folder("profiles") / (f"{name}.toml" if device == CPU else f"{name}@{device}.toml")


def stored_profile(checkpoint: str | None, device: str = CPU) -> ProfileInUse | None:
    """Return the profile of this machine that was kept: for the checkpoint, or else the machine's own.

    With a device, those that know it go first: of the others only figures count. A file that is damaged or
    of another machine costs a line on stderr.

    Args:
        checkpoint: its key; None: the machine's own only.
        device: its key.
    """
    keys = (checkpoint, None) if checkpoint is not None else (None,)
    for with_device, key in itertools.product(dict.fromkeys((device, CPU)), keys):
        path = stored_path(key, with_device)
        if not is_kept(path):
            continue
        try:
            profile = load_profile(path)
        except ConfigError as error:
            _say(f"a kept profile is of no use: {error}")
            continue
        if profile.notes.get("machine", {}).get("key") != machine_key():
            _say(f"{path} is a profile of another machine")
            continue
        return ProfileInUse(profile, _kind(profile, key), path)
    return None


def _kind(profile: DeviceProfile, checkpoint: str | None) -> str:
    if not profile.notes.get("evidence"):
        return MEASURED
    return TUNED_MACHINE if checkpoint is None else TUNED_MODEL


def keep(profile: DeviceProfile, checkpoint: str | None) -> Path | None:
    """Keep a profile for later loads; None, and a line on stderr, where that is not possible.

    Args:
        checkpoint: its key; None: for all models of this machine.
    """
    path = stored_path(checkpoint, ProfileInUse(profile, MEASURED_NOW, None).device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_profile(path, profile)
    except OSError as error:
        _say(f"the machine's profile is not kept: {path}: {error.strerror}")
        return None
    return path


def quick_profile(speed: MachineSpeed, num_threads: int) -> DeviceProfile:
    """Return the profile of a first look at the machine.

    Args:
        speed: as measured with the first model that was loaded.
    """

    def figure(value: float, note: str = "") -> Figure:
        return Figure(value, "measured", note)

    figures = {
        "cpu": {"physical_cores": figure(num_threads, "that the process may use")},
        "ram": {
            "capacity": figure(total_bytes()),
            "read_bandwidth": figure(speed.ram_bytes_per_s, "by the decode kernel"),
            "kernel_bandwidth": figure(speed.ram_bytes_per_s, f"{num_threads} threads"),
        },
        "disk": {"read_bandwidth": figure(speed.disk_bytes_per_s, "experts, several in flight")},
    }
    if speed.macs_per_s is not None:
        figures["cpu"]["int8_throughput"] = figure(2 * speed.macs_per_s, "by the prompt kernel")
    return DeviceProfile(
        name=machine_key(),
        description=cpu_name() or "this machine",
        unified_memory=False,
        measured=measured_now("from_pretrained"),
        figures=figures,
        notes={"machine": {"key": machine_key(), "device": "cpu"}, "state": state_notes()},
    )


def measured_now(command: str) -> dict[str, str]:
    """Return the [measured] table of this moment."""
    today = datetime.date.today().isoformat()
    return {"date": today, "command": command, "version": moe_offload.__version__}


def state_notes() -> Mapping[str, str | int | float]:
    """Return what the machine says of its state, without what it does not say."""
    state = machine_state()
    notes = {
        "power": state.power,
        "battery_percent": state.battery_percent,
        "hottest_celsius": state.hottest_celsius,
        "throttle_events": state.throttle_events,
        "governor": state.governor,
        "cpu_quota": state.cpu_quota,
    }
    return {name: value for name, value in notes.items() if value is not None}


def _say(line: str) -> None:
    print(f"moe-offload: note: {line}", file=sys.stderr)
