"""Door to the native reader and arena: environment, files, errors in the checkpoint's words."""

from __future__ import annotations

import os
from enum import IntEnum
from pathlib import Path

from moe_offload import _native
from moe_offload._native import BOUNCE_BYTES, HUGE_PAGE_BYTES, NOT_FILLED, Arena, DirectReader
from moe_offload.errors import CheckpointError, ConfigError

__all__ = [
    "BOUNCE_BYTES",
    "DEFAULT_NUM_IO_THREADS",
    "HUGE_PAGE_BYTES",
    "NOT_FILLED",
    "Arena",
    "DirectReader",
    "TicketState",
    "add_file",
    "io_mode_from_env",
    "open_reader",
    "put_together",
]

DEFAULT_NUM_IO_THREADS = 4  # beside the ring; each has one pread in flight and sleeps in the kernel
IO_MODES = ("direct", "threads", "buffered")


class TicketState(IntEnum):
    """Life of a read: QUEUED → READING → DONE | FAILED, or QUEUED → CANCELLED."""

    QUEUED = _native.QUEUED
    READING = _native.READING
    DONE = _native.DONE
    FAILED = _native.FAILED
    CANCELLED = _native.CANCELLED


def io_mode_from_env() -> str:
    """Return ``MOE_OFFLOAD_IO``: ``direct`` (the default), ``threads`` (without io_uring) or ``buffered``."""
    io_mode = os.environ.get("MOE_OFFLOAD_IO", "") or "direct"
    if io_mode not in IO_MODES:
        raise ConfigError(f"MOE_OFFLOAD_IO must be one of {', '.join(IO_MODES)}, got {io_mode!r}")
    return io_mode


def open_reader(num_threads: int = DEFAULT_NUM_IO_THREADS, io_mode: str | None = None) -> DirectReader:
    """Start a reader; ``io_mode`` None asks the environment. Its owner calls ``close``.

    Raises:
        ConfigError: the process may not start its threads.
    """
    io_mode = io_mode_from_env() if io_mode is None else io_mode
    try:
        return DirectReader(num_threads, io_mode)
    except RuntimeError as error:  # a std::system_error
        raise ConfigError(
            f"{num_threads} threads that read cannot be started ({error}); see ulimit -u, ulimit -v and the "
            "cgroup's pids.max"
        ) from error


def add_file(reader: DirectReader, path: Path) -> int:
    """Open a file of the checkpoint; returns its file_id in ``reader``.

    Raises:
        CheckpointError: the file is missing, not a regular file, or may not be read.
    """
    try:
        return reader.add_file(os.fspath(path))
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}; check that the file exists and may be read"
        ) from error


def put_together(relayout: int, scales: int, codes: int, blocks: int, rows: int, cols: int) -> None:
    """Put a matrix's codes and scales together in blocks, all by address (csrc/io/relayout.h)."""
    _native.relayout(int(relayout), scales, codes, blocks, rows, cols)
