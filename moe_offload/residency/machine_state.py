"""Which machine this is and what state it is in: a name for it, quotas, power, temperature.

A figure measured on battery, under a quota or while the processor throttles is true there and nowhere
else, so it is kept with the figure. Reads /proc and /sys below ``root``, so that tests bring their own;
what a machine does not tell is left out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_offload import _native
from moe_offload.config import GIB
from moe_offload.residency.memory import ROOT, UNLIMITED_BYTES, cgroup_limits, system_memory

POWER = Path("sys/class/power_supply")
THERMAL = Path("sys/class/thermal")
CPUS = Path("sys/devices/system/cpu")
SWITCHES = ("MOE_OFFLOAD_IO", "MOE_OFFLOAD_ISA")
HOTTEST_CELSIUS = 150.0  # a sensor that says more is not one


@dataclass(frozen=True)
class MachineState:
    """How the machine is now; None: it does not say.

    Attributes:
        power: "mains", "battery" or "unknown".
        throttle_events: since the machine started; a difference between two states counts.
        cpu_quota: processors that the cgroup pays for.
        cgroup_limit_bytes: memory of the tightest cgroup around the process.
    """

    power: str
    battery_percent: int | None
    hottest_celsius: float | None
    throttle_events: int | None
    governor: str | None
    cpu_quota: float | None
    cgroup_limit_bytes: int | None

    def warnings(self, before: MachineState | None = None) -> list[str]:
        """Return what makes measurements of this moment worth less, in words for the user."""
        found = []
        if self.power == "battery":
            charge = "" if self.battery_percent is None else f" ({self.battery_percent}%)"
            found.append(f"on battery{charge}: plugged in, the machine may be faster")
        if before is not None and (self.throttle_events or 0) > (before.throttle_events or 0):
            found.append("the processor throttled meanwhile: let it cool down and measure again")
        if self.governor == "powersave" and self.power == "battery":
            found.append("the processor's governor is powersave")
        return found


def machine_state(root: Path = ROOT) -> MachineState:
    """Return the state of the machine now."""
    power, battery_percent = _power(root)
    limits = [limit for limit, _ in cgroup_limits(root) if limit < UNLIMITED_BYTES]
    return MachineState(
        power=power,
        battery_percent=battery_percent,
        hottest_celsius=_hottest(root),
        throttle_events=_throttle_events(root),
        governor=_text(root / CPUS / "cpu0/cpufreq/scaling_governor"),
        cpu_quota=_cpu_quota(root),
        cgroup_limit_bytes=min(limits, default=None),
    )


def machine_key(root: Path = ROOT) -> str:
    """Return a short name of the machine for files: its processor, cores and memory; not its host name.

    Cores are those that the process may use: a container with another share of the machine is another one,
    and so is the machine under a switch that makes it slower.
    """
    total_bytes, _ = system_memory(root)
    cores = os.cpu_count(), _native.usable_cores(str(root))
    switches = [os.environ.get(name, "") for name in SWITCHES]
    facts = (cpu_name(root), cores, round(total_bytes / GIB), *switches)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def cpu_name(root: Path = ROOT) -> str:
    """Return the processor's own name, or "" where /proc/cpuinfo has none (some ARM machines)."""
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return ""


def _power(root: Path) -> tuple[str, int | None]:
    """Return the source of power, and the charge of the first battery that belongs to the machine."""
    online: list[bool] = []
    charge, discharging = None, False
    for supply in _folders(root / POWER, ""):
        kind, scope = _text(supply / "type"), _text(supply / "scope")
        if kind in ("Mains", "USB") and (value := _integer(supply / "online")) is not None:
            online.append(value != 0)
        elif kind == "Battery" and scope != "Device":  # a mouse's battery says Device
            charge = _integer(supply / "capacity") if charge is None else charge
            discharging |= _text(supply / "status") == "Discharging"
    if discharging and not any(online):
        return "battery", charge
    return ("mains" if online or charge is not None else "unknown"), charge


def _hottest(root: Path) -> float | None:
    celsius = [
        value / 1000
        for zone in _folders(root / THERMAL, "thermal_zone")
        if (value := _integer(zone / "temp")) is not None and 0 < value / 1000 < HOTTEST_CELSIUS
    ]
    return max(celsius, default=None)


def _throttle_events(root: Path) -> int | None:
    counts = [
        count
        for cpu in _folders(root / CPUS, "cpu")
        for name in ("core_throttle_count", "package_throttle_count")
        if (count := _integer(cpu / "thermal_throttle" / name)) is not None
    ]
    return sum(counts) if counts else None


def _cpu_quota(root: Path) -> float | None:
    """Return the tightest quota of the cgroups around us, in processors (cgroup v2, then v1)."""
    quotas = []
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        mounts = root / "sys/fs/cgroup"
        if controllers == "":
            mount, is_v2 = (mounts / "unified" if (mounts / "unified").is_dir() else mounts), True
        elif "cpu" in controllers.split(","):
            named = mounts / controllers
            mount, is_v2 = (named if named.is_dir() else mounts / "cpu"), False
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            quotas += _quota_of(mount.joinpath(*parts[:depth]), is_v2)
    return min(quotas, default=None)


def _quota_of(folder: Path, is_v2: bool) -> list[float]:
    if is_v2:
        fields = (_text(folder / "cpu.max") or "").split()
    else:
        fields = [_text(folder / name) or "" for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    if len(fields) != 2 or not all(field.isdigit() for field in fields) or int(fields[1]) == 0:
        return []  # "max", -1, or no such controller
    return [int(fields[0]) / int(fields[1])]


def _folders(parent: Path, prefix: str) -> Iterator[Path]:
    if parent.is_dir():
        yield from sorted(path for path in parent.iterdir() if path.name.startswith(prefix))


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _integer(path: Path) -> int | None:
    try:
        return int(_text(path) or "")
    except ValueError:
        return None
