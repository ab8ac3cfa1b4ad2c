"""What a machine says of itself: power, heat, quotas, and a name that stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_offload.residency.machine_state import MachineState, machine_key, machine_state


def machine(root: Path, files: dict[str, str]) -> Path:
    defaults = {"proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n", "proc/cpuinfo": ""}
    for name, text in {**defaults, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


BATTERY = {
    "sys/class/power_supply/AC/type": "Mains",
    "sys/class/power_supply/AC/online": "0",
    "sys/class/power_supply/BAT0/type": "Battery",
    "sys/class/power_supply/BAT0/status": "Discharging",
    "sys/class/power_supply/BAT0/capacity": "41",
    "sys/class/power_supply/hid/type": "Battery",
    "sys/class/power_supply/hid/scope": "Device",
    "sys/class/power_supply/hid/capacity": "99",
    "sys/class/thermal/thermal_zone0/temp": "48000",
    "sys/class/thermal/thermal_zone1/temp": "91500",
    "sys/class/thermal/thermal_zone2/temp": "-274000",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3",
    "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "4",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave",
}


def test_a_laptop_on_battery(tmp_path: Path) -> None:
    state = machine_state(machine(tmp_path, BATTERY))
    assert (state.power, state.battery_percent, state.hottest_celsius) == ("battery", 41, 91.5)
    assert (state.throttle_events, state.governor) == (7, "powersave")
    assert any("41%" in line for line in state.warnings())


def test_plugged_in_it_warns_of_nothing(tmp_path: Path) -> None:
    plugged = {**BATTERY, "sys/class/power_supply/AC/online": "1"}
    state = machine_state(machine(tmp_path, plugged))
    assert state.power == "mains" and state.warnings() == []
    cooler = MachineState(**{**state.__dict__, "throttle_events": 5})
    assert "throttled" in state.warnings(before=cooler)[0]


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    assert machine_state(machine(tmp_path, {})) == MachineState("unknown", None, None, None, None, None, None)


@pytest.mark.parametrize(
    ("files", "quota", "limit"),
    [
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "150000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/b/memory.max": "2147483648",
                "sys/fs/cgroup/a/b/memory.current": "1024",
            },
            1.5,
            2 << 30,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/c\n4:memory:/c",
                "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/c/memory.limit_in_bytes": "1073741824",
                "sys/fs/cgroup/memory/c/memory.usage_in_bytes": "1024",
            },
            0.5,
            1 << 30,
        ),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None, None),
    ],
    ids=["v2", "v1", "unlimited"],
)
def test_quotas_are_seen(tmp_path: Path, files: dict[str, str], quota: float, limit: int) -> None:
    state = machine_state(machine(tmp_path, files))
    assert (state.cpu_quota, state.cgroup_limit_bytes) == (quota, limit)


def test_a_machine_keeps_its_name_and_another_has_another(tmp_path: Path) -> None:
    one = machine(tmp_path / "one", {"proc/cpuinfo": "model name\t: Fast 9000"})
    two = machine(tmp_path / "two", {"proc/cpuinfo": "model name\t: Slow 1"})
    name = machine_key(one)
    assert machine_key(one) == name != machine_key(two)
    quota = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "100000 100000"}
    assert machine_key(machine(tmp_path / "one", quota)) != name or os.cpu_count() == 1
