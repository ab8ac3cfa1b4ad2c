"""Reading headers with pread: nothing is mapped, nothing is allocated by a number that was not checked."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from moe_offload.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20
LFS_POINTER_BYTES = 1024  # and fewer


class HeaderReader:
    """A regular file opened for reading at byte offsets; every failure is a CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        try:
            # O_NONBLOCK: opening a named pipe must not wait for a writer.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            link = " (what it links to is missing: fetch it again)" if path.is_symlink() else ""
            raise CheckpointError(f"{path}: cannot be opened: {_reason(error)}{link}") from error
        try:
            self._fd, status = fd, os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: not a regular file; give a checkpoint's folder or .gguf file")
            self.num_bytes = status.st_size
            if self.num_bytes <= LFS_POINTER_BYTES and self.read_up_to(0, 20) == b"version https://git-":
                self.fail("stands for a file that git-lfs has not fetched yet; fetch it: git lfs pull")
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> HeaderReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self._fd = -1

    def read_up_to(self, offset: int, num_bytes: int) -> bytes:
        """Return at most ``num_bytes`` bytes at ``offset``, fewer only at the end of the file."""
        parts = []
        while num_bytes > 0:
            try:
                part = os.pread(self._fd, num_bytes, offset)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: read error at byte {offset}: {_reason(error)}; check the disk"
                ) from error
            if not part:
                break
            parts.append(part)
            offset, num_bytes = offset + len(part), num_bytes - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read(self, offset: int, num_bytes: int, what: str) -> bytes:
        """Return exactly ``num_bytes`` bytes at ``offset``, checked against the file's size first."""
        if num_bytes > self.num_bytes - offset:
            self.fail(
                f"{what} takes {num_bytes} bytes at byte {offset}, but the file has {self.num_bytes}; "
                "it is truncated or corrupt: fetch it again"
            )
        data = self.read_up_to(offset, num_bytes)
        if len(data) != num_bytes:
            self.fail(f"{what}: {len(data)} of {num_bytes} bytes at byte {offset}: the file was shortened")
        return data

    def fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {message}")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a small file such as config.json."""
    with HeaderReader(path) as file:
        if file.num_bytes > MAX_JSON_BYTES:
            file.fail(f"{file.num_bytes} bytes, but a file of this kind has at most {MAX_JSON_BYTES}")
        return parse_json_object(file.read(0, file.num_bytes, "the file"), str(path))


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object, refusing duplicate keys at any depth."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: not valid JSON ({error}); the file is corrupt: fetch it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object is wanted, found {type(value).__name__}")
    return value


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {duplicate!r} appears twice")
    return result


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
