"""``quant=``: quantize a safetensors folder once, into a file in the user's cache, and use that.

The file is named after everything that it depends on, written beside its final name and renamed when
it is whole and on the disk. Who writes holds a lock that the kernel drops with the process, so a
killed run leaves a ``.partial`` that nobody reads and the next run removes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from moe_offload.config import MIB, gib
from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.checkpoint_key import cache_folder, checkpoint_key
from moe_offload.storage.quantize_file import MAX_THREADS, Progress, read_spans, write_quantized
from moe_offload.storage.quantize_plan import QuantPlan, quantized_checkpoint

FORMAT_VERSION = 1  # of what the file holds and how its numbers are made
DISK_RESERVE_BYTES = 64 * MIB
POLL_S = 0.2
PARTIAL, LOCK = ".partial", ".lock"

Say = Callable[[str], None]


def quantize_once(
    plan: QuantPlan,
    *,
    say: Say,
    progress: Progress | None = None,
    num_threads: Callable[[], int] | None = None,
) -> Checkpoint:
    """Return the quantized checkpoint, from the cache or by quantizing now.

    Args:
        say: called with a line for the user when something is written, or waited for.
        progress: called with (bytes written, bytes in all).
        num_threads: asked for the number of threads when something has to be quantized; default the
            cores that this process may use, at most 8.

    Raises:
        CheckpointError: the folder cannot be read, or changed meanwhile.
        ConfigError: the cache cannot be written, or the disk has too little room.
    """
    identity = _identity(plan)
    path = cache_folder("quantized") / f"{_file_stem(plan)}-{plan.quant}-{identity[:16]}.gguf"
    checkpoint = _open_cached(path, plan, identity, say)
    if checkpoint is not None:
        return checkpoint
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path, _Wait(path, plan, say, progress)):
            checkpoint = _open_cached(path, plan, identity, say)  # another process may have been first
            if checkpoint is not None:
                return checkpoint
            _write(path, plan, identity, say, progress, (num_threads or default_threads)())
    except OSError as error:
        _fail(path, plan, error)
    checkpoint = _open_cached(path, plan, identity, say)
    assert checkpoint is not None, f"{path} was removed as soon as it was written"
    return checkpoint


def default_threads() -> int:
    """Return how many threads quantize at a time."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


def _open_cached(path: Path, plan: QuantPlan, identity: str, say: Say) -> Checkpoint | None:
    """Return the checkpoint with the file at ``path``; None when there is none that can be trusted."""
    if not path.exists():
        return None
    try:
        spans = read_spans(path, plan, identity)
    except CheckpointError as error:
        say(f"{error}; it will be made again")
        return None
    checkpoint = quantized_checkpoint(plan, spans)
    return replace(checkpoint, files=(*checkpoint.files, path))


def _write(
    path: Path, plan: QuantPlan, identity: str, say: Say, progress: Progress | None, num_threads: int
) -> None:
    """Quantize into a partial file and rename it; called by the holder of the lock."""
    _remove_stale(path.parent)
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    _check_disk(path, plan)
    say(
        f"quantizing {plan.source.path} to {plan.quant} once: {gib(plan.source_bytes)} become "
        f"{gib(plan.num_bytes)} in {path}"
    )
    try:
        write_quantized(partial, plan, identity, progress, num_threads)
        if _identity(plan) != identity:
            raise CheckpointError(
                f"{plan.source.path} was changed while it was quantized; start again when it is complete"
            )
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_disk(path: Path, plan: QuantPlan) -> None:
    free_bytes = shutil.disk_usage(path.parent).free
    needed_bytes = plan.num_bytes + DISK_RESERVE_BYTES
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"quant={plan.quant} of {plan.source.path} writes {gib(plan.num_bytes)} to {path.parent}, where "
            f"{gib(free_bytes)} are free and {gib(needed_bytes)} are needed; free some space, or set "
            "XDG_CACHE_HOME to a larger disk"
        )


def _fail(path: Path, plan: QuantPlan, error: OSError) -> NoReturn:
    what = f"quant={plan.quant} of {plan.source.path}: {path.parent} cannot be written: {error.strerror}"
    remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
    raise ConfigError(f"{what}; {remedy}, or set XDG_CACHE_HOME to another folder") from error


def _file_stem(plan: QuantPlan) -> str:
    """Name the file so that a person who looks into the cache knows the model."""
    folder = plan.source.path.resolve()
    name = folder.parent.parent.name if folder.parent.name == "snapshots" else folder.name
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name.removeprefix("models--"))[:80] or "model"


def _identity(plan: QuantPlan) -> str:
    """Return a hash of everything that the quantized file depends on.

    Weights count by size, samples and time of change: reading them all would take as long as
    quantizing. (A copy that keeps its times shares the file; samples tell apart what an archive gave
    the same times.)
    """
    source = plan.source
    key = checkpoint_key(source).rpartition("-")[2]
    digest = hashlib.sha256(f"{FORMAT_VERSION} {plan.quant} {key}\n".encode())
    for tensor in plan.tensors:
        digest.update(f"{tensor.name} {tensor.ggml_type.name} {tensor.shape}\n".encode())
        for matrix in tensor.sources:
            digest.update(f"{matrix.span} {matrix.form}\n".encode())
    for path in source.files:
        digest.update(f"{path.name} {path.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()


class _Wait:
    """What a process does while another one quantizes: say so once, show how far it is."""

    def __init__(self, path: Path, plan: QuantPlan, say: Say, progress: Progress | None) -> None:
        self.partial, self.plan, self.say, self.progress = (
            path.with_name(path.name + PARTIAL),
            plan,
            say,
            progress,
        )
        self.said = False

    def __call__(self) -> None:
        if not self.said:
            self.said = True
            self.say(
                f"another process is quantizing {self.plan.source.path} to {self.plan.quant}; waiting for it"
            )
        time.sleep(POLL_S)
        if self.progress is not None:
            with suppress(OSError):
                written_bytes = min(self.partial.stat().st_size, self.plan.num_bytes)
                self.progress(written_bytes, self.plan.num_bytes)


@contextmanager
def _locked(path: Path, while_waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of ``path``: one process writes it. The kernel lets go when the holder dies."""
    lock_path = path.with_name(path.name + LOCK)
    while True:
        fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while not _try_lock(fd):
                while_waiting()
            if _is_at(lock_path, fd):
                try:
                    yield
                finally:
                    lock_path.unlink(missing_ok=True)  # whoever waits for this file sees that: it starts over
                return
        finally:
            os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, fd: int) -> bool:
    """Whether the open file is still the one that ``path`` names."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(path))
    return False


def _remove_stale(folder: Path) -> None:
    """Remove what killed runs left: locks that nobody holds, and their partial files.

    A partial file without a lock does not occur: the lock is made before it and removed after it.
    """
    for lock_path in folder.glob(f"*{LOCK}"):
        with suppress(OSError):
            fd = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if _try_lock(fd) and _is_at(lock_path, fd):
                    Path(str(lock_path).removesuffix(LOCK) + PARTIAL).unlink(missing_ok=True)
                    lock_path.unlink()
            finally:
                os.close(fd)
