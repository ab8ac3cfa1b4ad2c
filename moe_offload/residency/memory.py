"""How much memory there is, for this process, now: the system's, the cgroup's, and our own share.

Reads /proc and the cgroup files below ``root``, so that tests bring their own. Linux only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from moe_offload.config import KIB, MIB
from moe_offload.errors import ConfigError

ROOT = Path("/")
RESERVE_BYTES = 512 * MIB
RESERVE_SHARE = 0.05  # of the memory there is
UNLIMITED_BYTES = 1 << 60  # cgroup v1 prints a number near 2^63 where there is no limit


def available_bytes(root: Path = ROOT) -> int:
    """Return what the process may still take: the system's free memory, or less in a cgroup.

    Every cgroup from ours to the root counts: its limit less its use. Page cache that the kernel
    would drop first (inactive_file) is not counted as used.
    """
    _, available = system_memory(root)
    in_cgroups = [limit - used for limit, used in cgroup_limits(root)]
    return max(0, min([available, *in_cgroups]))


def total_bytes(root: Path = ROOT) -> int:
    """Return the memory of the machine, or of the tightest cgroup around us."""
    total, _ = system_memory(root)
    return min([total, *(limit for limit, _ in cgroup_limits(root))])


def process_bytes(root: Path = ROOT) -> int:
    """Return the resident set of this process (VmRSS)."""
    return _kib_field(root / "proc/self/status", "VmRSS")


def peak_bytes(root: Path = ROOT) -> int:
    """Return the largest resident set that this process ever had (VmHWM).

    Not getrusage: its maximum survives exec, so a child may report its parent's peak.
    """
    return _kib_field(root / "proc/self/status", "VmHWM")


def auto_ram_bytes(reserve_bytes: int | None = None, root: Path = ROOT) -> int:
    """Return the budget of ``ram="auto"``: what we hold and what is available, less a reserve.

    Args:
        reserve_bytes: left for others; by default 512 MiB or 5% of the memory, whichever is more.
    """
    if reserve_bytes is None:
        reserve_bytes = max(RESERVE_BYTES, math.ceil(RESERVE_SHARE * total_bytes(root)))
    return max(0, process_bytes(root) + available_bytes(root) - reserve_bytes)


class MemoryGuard:
    """Tell how many bytes to give back while others take memory; 0 nearly always.

    Args:
        available: bytes that are free now.
        reserve_bytes: what should stay free. Choose it below the reserve of ``auto_ram_bytes``, or
            the first byte that anybody takes asks for slots back.
        interval_s: ``available`` is asked no more often than this.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        available: Callable[[], int],
        *,
        reserve_bytes: int = RESERVE_BYTES // 2,
        interval_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._available, self._reserve_bytes = available, reserve_bytes
        self._interval_s, self._clock = interval_s, clock
        self._asked_at = -math.inf

    def bytes_to_give_back(self) -> int:
        """Return how far the free memory is below the reserve."""
        now = self._clock()
        if now - self._asked_at < self._interval_s:
            return 0
        self._asked_at = now
        return max(0, self._reserve_bytes - self._available())


def system_memory(root: Path) -> tuple[int, int]:
    """Return (total, available) bytes of the machine."""
    if root == ROOT:
        memory = psutil.virtual_memory()
        return memory.total, memory.available
    meminfo = root / "proc/meminfo"
    return _kib_field(meminfo, "MemTotal"), _kib_field(meminfo, "MemAvailable")


def _kib_field(path: Path, name: str) -> int:
    """Return the bytes of a line "Name:   123 kB".

    Raises:
        ConfigError: no such file or line, as on systems other than Linux.
    """
    try:
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * KIB
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}); moe_offload runs on Linux") from error
    raise ConfigError(f"{path} has no line {name}; moe_offload runs on Linux")


def cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, use) of every cgroup around us that has a memory limit."""
    for folder, version in _cgroup_folders(root):
        names = ["memory.max", "memory.high"] if version == 2 else ["memory.limit_in_bytes"]
        limits = [limit for name in names if (limit := _number(folder / name)) is not None]
        used = _number(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
        if used is not None and limits and min(limits) < UNLIMITED_BYTES:
            droppable = _stat_field(folder / "memory.stat", "inactive_file", "total_inactive_file")
            yield min(limits), max(0, used - droppable)


def _cgroup_folders(root: Path) -> Iterator[tuple[Path, int]]:
    """Yield (folder, cgroup version) of our memory cgroup and of those around it.

    In a container /proc names a path of the host that is not mounted: the parts that exist count,
    and the root of the mount is the container's own cgroup.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            hybrid = mounts / "unified"
            mount, version = (hybrid if hybrid.is_dir() else mounts), 2
        elif "memory" in controllers.split(","):
            mount, version = mounts / "memory", 1
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:depth]), version


def _number(path: Path) -> int | None:
    """Return the number in a cgroup file; None when the file is missing or says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stat_field(path: Path, *names: str) -> int:
    """Return the largest of the named lines of a memory.stat: v1's total_ covers the groups below."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return 0
    return max((int(line[1]) for line in lines if len(line) == 2 and line[0] in names), default=0)
