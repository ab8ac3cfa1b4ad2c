"""Memory cgroups for benchmarks: run a process with less memory than the machine has.

Version 1 and 2; needs root, or a subtree that was delegated to the user. What the process reads through
the page cache is charged to it, as on a machine of that size.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
REMOVE_WITHIN_S = 10.0
_names = itertools.count()


class CgroupUnavailableError(Exception):
    """No memory cgroup can be made here; the text says why."""


class MemoryCgroup:
    """A cgroup of ``limit_bytes``, removed by ``__exit__`` once its processes have ended.

    Raises:
        CgroupUnavailableError: when it is made.
    """

    def __init__(self, limit_bytes: int, root: Path = ROOT) -> None:
        self.limit_bytes = limit_bytes
        refusals = []
        for parent, version in _parents(root):
            folder = parent / f"moe_offload_bench_{os.getpid()}_{next(_names)}"
            try:
                _create(folder, version, limit_bytes)
            except OSError as error:
                refusals.append(f"{parent}: {error.strerror}")
                if folder.is_dir():
                    folder.rmdir()
                continue
            self.folder, self.version = folder, version
            return
        raise CgroupUnavailableError(
            "; ".join(refusals) or "no memory controller is mounted in /sys/fs/cgroup"
        )

    @property
    def procs(self) -> Path:
        """The file that a process writes its id to in order to join."""
        return self.folder / "cgroup.procs"

    def peak_bytes(self) -> int | None:
        """Most that the group held, page cache included; None where the kernel does not say."""
        names = ("memory.max_usage_in_bytes", "memory.peak")
        return next((int((self.folder / n).read_text()) for n in names if (self.folder / n).exists()), None)

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(self, *exc: object) -> None:
        deadline = time.monotonic() + REMOVE_WITHIN_S
        while True:
            try:
                return self.folder.rmdir()
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)  # its last process is on its way out


def unavailable_reason() -> str | None:
    """Return why no cgroup can be made, or None."""
    try:
        with MemoryCgroup(1 << 30):
            return None
    except CgroupUnavailableError as error:
        return str(error)


def _parents(root: Path) -> Iterator[tuple[Path, int]]:
    """Yield (folder, version) below which a cgroup may be made: our own first, then the mount's root.

    In version 2 a group with processes may not have limited groups below it, so there the group around
    ours comes first.
    """
    mounts = root / "sys/fs/cgroup"
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            candidates, version = [mounts / "memory" / path.lstrip("/"), mounts / "memory"], 1
        elif controllers == "" and (mounts / "cgroup.controllers").exists():
            own = mounts / path.lstrip("/")
            candidates, version = [own.parent if own != mounts else mounts, own, mounts], 2
        else:
            continue
        for candidate in dict.fromkeys(candidates):
            if candidate.is_dir():
                yield candidate, version


def _create(folder: Path, version: int, limit_bytes: int) -> None:
    if version == 2:
        control = folder.parent / "cgroup.subtree_control"
        if "memory" not in control.read_text().split():
            control.write_text("+memory")
    folder.mkdir()
    (folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")).write_text(str(limit_bytes))
    swap = folder / ("memory.swap.max" if version == 2 else "memory.memsw.limit_in_bytes")
    if swap.exists():
        swap.write_text("0" if version == 2 else str(limit_bytes))
