"""Files that are written whole or not at all: what was there before stays until the new one is complete."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def why_not(path: Path) -> str | None:
    """Return why a file could not be written at ``path``, as far as that can be told without writing."""
    if path.is_dir():
        return "is a folder; give a file in it"
    if not path.parent.is_dir():
        return f"cannot be written: there is no folder {path.parent}"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return "cannot be written; give another place"
    return None


@contextmanager
def whole_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file beside ``path`` that takes its place when the block ends, and is removed when it fails.

    A link stays a link, and what it leads to is replaced; a file keeps its mode. A device or a pipe
    (/dev/stdout) is written to as it is: its name must not become that of a file. So is a file in a folder
    where nothing can be made.

    Args:
        mode: "wb", or "w" for text in UTF-8.

    Raises:
        OSError: the place cannot be written to.
    """
    target = Path(os.path.realpath(path))
    found = target.stat().st_mode if target.exists() else None
    encoding = None if "b" in mode else "utf-8"
    if found is not None and (not stat.S_ISREG(found) or not os.access(target.parent, os.W_OK)):
        with open(path, mode, encoding=encoding) as file:
            yield file
        return
    partial = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, mode.replace("w", "x"), encoding=encoding) as file:
            yield file
        if found is not None:
            partial.chmod(stat.S_IMODE(found))
        partial.replace(target)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
