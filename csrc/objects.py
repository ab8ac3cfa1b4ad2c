"""Compiled objects that outlive a build: setup.py compiles a file again only where something has changed.

pip builds in folders of its own, so an editable install, a wheel and the next install would each compile
everything. An object's name says what it was made of: the file, what it includes of ours, and what the
compiler says that it would run (its version, and flags that a wrapper or an environment variable adds).
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

CSRC = Path(__file__).parent


class KeptObjects:
    """The objects of one compiler in ``folder``, the newest for each file and command.

    Args:
        compiler: its call, such as ``["ccache", "g++"]``.
        made_with: what objects depend on besides, such as the versions whose headers are included.
    """

    def __init__(self, folder: Path, compiler: Sequence[str], made_with: str) -> None:
        self._folder, self._compiler, self._made_with = folder, compiler, made_with
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, source: Path, flags: Sequence[str], to: Path, compile_to: Callable[[Path], None]) -> None:
        """Put the object of ``source`` at ``to``; ``compile_to`` makes it where it is not kept."""
        command = described(self._compiler, flags, source)
        name = f"{source.stem}-{_digest([self._made_with.encode(), command.encode()])[:8]}"
        files = sorted({*included(source), *_files_of(command)})
        kept = self._folder / f"{name}-{_digest(path.read_bytes() for path in files)[:16]}.o"
        if not kept.exists():
            partial = kept.with_suffix(f".{os.getpid()}.part.o")
            compile_to(partial)
            for outdated in self._folder.glob(f"{name}-*.o"):
                if outdated != partial and not outdated.name.endswith(".part.o"):
                    outdated.unlink(missing_ok=True)
            partial.replace(kept)
        shutil.copyfile(kept, to)


def described(compiler: Sequence[str], flags: Sequence[str], source: Path) -> str:
    """Return what the compiler says that it would run, its version included."""
    asked = [*compiler, *flags, "-###", "-S", str(source), "-o", os.devnull]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stderr


def included(source: Path, csrc: Path = CSRC) -> set[Path]:
    """Return a file and what it includes of ours, all the way down."""
    seen, ahead = set[Path](), [source]
    while ahead:
        path = ahead.pop()
        if path not in seen:
            seen.add(path)
            names = re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(), re.MULTILINE)
            found = {folder / name for name in names for folder in (csrc, path.parent)}
            ahead += [path for path in found if path.is_file()]
    return seen


def _files_of(command: str) -> set[Path]:
    """Return the files of ours that a command names, such as one after -include."""
    words = {Path(word) for word in shlex.split(command) if word.endswith((".h", ".hpp"))}
    return {path for path in words if path.is_file()}


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
