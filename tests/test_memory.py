"""Memory figures from fake /proc and cgroup trees, and from this machine where it can be checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from moe_offload.config import GIB, MIB
from moe_offload.errors import ConfigError
from moe_offload.residency import memory
from moe_offload.residency.memory import (
    MemoryGuard,
    auto_ram_bytes,
    available_bytes,
    peak_bytes,
    process_bytes,
    total_bytes,
)

STATUS = "Name:\tpython\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n"


class FakeSystem:
    """16 GiB of memory, 8 of them available, and the cgroup files that a test adds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {16 << 20} kB\nMemFree: 1 kB\nMemAvailable: {8 << 20} kB\n")
        self.write("proc/self/status", STATUS)

    def write(self, path: str, text: str | int) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(f"{text}\n")

    def cgroup_v2(self, path: str, limit: str | int, used: int, inactive_file: int = 0) -> None:
        folder = f"sys/fs/cgroup/{path}"
        self.write(f"{folder}/memory.max", limit)
        self.write(f"{folder}/memory.current", used)
        self.write(f"{folder}/memory.stat", f"anon 1\ninactive_file {inactive_file}\nactive_file 5")

    def cgroup_v1(self, path: str, limit: int, used: int, inactive_file: int = 0) -> None:
        folder = f"sys/fs/cgroup/memory/{path}"
        self.write(f"{folder}/memory.limit_in_bytes", limit)
        self.write(f"{folder}/memory.usage_in_bytes", used)
        self.write(f"{folder}/memory.stat", f"inactive_file 0\ntotal_inactive_file {inactive_file}")


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    return FakeSystem(tmp_path)


def test_without_cgroups_the_systems_memory_counts(system: FakeSystem) -> None:
    assert available_bytes(system.root) == 8 * GIB
    assert total_bytes(system.root) == 16 * GIB


def test_a_v2_limit_less_its_use_is_what_remains(system: FakeSystem) -> None:
    system.write("proc/self/cgroup", "0::/user/me")
    system.cgroup_v2("user/me", 2 * GIB, used=GIB)
    assert available_bytes(system.root) == GIB
    assert total_bytes(system.root) == 2 * GIB


def test_page_cache_that_would_be_dropped_is_not_use(system: FakeSystem) -> None:
    system.write("proc/self/cgroup", "0::/me")
    system.cgroup_v2("me", 2 * GIB, used=GIB, inactive_file=256 * MIB)
    assert available_bytes(system.root) == GIB + 256 * MIB


def test_the_tightest_cgroup_on_the_way_to_the_root_counts(system: FakeSystem) -> None:
    system.write("proc/self/cgroup", "0::/slice/me")
    system.cgroup_v2("slice/me", "max", used=MIB)
    system.cgroup_v2("slice", 3 * GIB, used=2 * GIB)
    assert available_bytes(system.root) == GIB


def test_the_soft_limit_counts_too(system: FakeSystem) -> None:
    """Beyond memory.high the kernel throttles and reclaims until the process crawls."""
    system.write("proc/self/cgroup", "0::/me")
    system.cgroup_v2("me", 4 * GIB, used=GIB)
    system.write("sys/fs/cgroup/me/memory.high", 2 * GIB)
    assert available_bytes(system.root) == GIB


def test_a_v1_limit_counts_and_its_unlimited_number_does_not(system: FakeSystem) -> None:
    system.write("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/")
    system.cgroup_v1("", 9223372036854771712, used=9 * GIB)
    assert available_bytes(system.root) == 8 * GIB
    system.cgroup_v1("docker/abc", 2 * GIB, used=GIB, inactive_file=100 * MIB)
    assert available_bytes(system.root) == GIB + 100 * MIB


def test_in_a_container_the_mounts_root_is_our_cgroup(system: FakeSystem) -> None:
    """/proc/self/cgroup names the host's path, which the container does not see."""
    system.write("proc/self/cgroup", "4:memory:/docker/abc")
    system.cgroup_v1("", 2 * GIB, used=GIB)
    assert available_bytes(system.root) == GIB


def test_the_unified_folder_of_a_hybrid_system_is_read(system: FakeSystem) -> None:
    system.write("proc/self/cgroup", "4:cpu:/\n0::/me")
    system.cgroup_v2("unified/me", 2 * GIB, used=GIB)
    assert available_bytes(system.root) == GIB


def test_use_beyond_the_limit_leaves_nothing(system: FakeSystem) -> None:
    system.write("proc/self/cgroup", "0::/me")
    system.cgroup_v2("me", GIB, used=2 * GIB)
    assert available_bytes(system.root) == 0
    assert auto_ram_bytes(root=system.root) == 0


def test_auto_takes_what_is_held_and_free_less_a_reserve(system: FakeSystem) -> None:
    assert auto_ram_bytes(0, system.root) == 8 * GIB + MIB
    five_percent = -(-16 * GIB // 20)
    assert auto_ram_bytes(root=system.root) == pytest.approx(8 * GIB + MIB - five_percent, abs=1)
    system.write("proc/self/cgroup", "0::/me")
    system.cgroup_v2("me", 2 * GIB, used=0)
    assert auto_ram_bytes(root=system.root) == 2 * GIB + MIB - 512 * MIB


def test_resident_and_peak_come_from_the_status_file(system: FakeSystem) -> None:
    assert (process_bytes(system.root), peak_bytes(system.root)) == (MIB, 2 * MIB)


def test_a_system_without_proc_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*proc/self/status .*runs on Linux"):
        process_bytes(tmp_path)


def test_this_machine_agrees_with_psutil() -> None:
    total, _ = memory.system_memory(Path("/."))
    assert total == psutil.virtual_memory().total
    assert 0 < available_bytes() <= total_bytes() <= total
    assert 0 < process_bytes() <= peak_bytes()


def test_a_childs_peak_is_its_own() -> None:
    """getrusage reported the parent's peak after exec."""
    ballast = bytearray(200 * MIB)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from moe_offload.residency.memory import peak_bytes; print(peak_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < len(ballast)


def test_the_guard_asks_for_what_is_missing_from_its_reserve_and_not_too_often() -> None:
    now, free, asked = [0.0], [GIB], [0]

    def available() -> int:
        asked[0] += 1
        return free[0]

    guard = MemoryGuard(available, reserve_bytes=256 * MIB, interval_s=1.0, clock=lambda: now[0])
    assert guard.bytes_to_give_back() == 0
    free[0] = 56 * MIB
    assert guard.bytes_to_give_back() == 0  # too early to ask again
    assert asked[0] == 1
    now[0] = 1.0
    assert guard.bytes_to_give_back() == 200 * MIB
    now[0], free[0] = 2.0, 256 * MIB
    assert guard.bytes_to_give_back() == 0
