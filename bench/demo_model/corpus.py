"""Read a folder of plain text: *.txt and *.txt.xz, documents separated by a line ``<|endoftext|>``."""

from __future__ import annotations

import lzma
import random
from collections.abc import Iterator
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"


def text_files(folder: Path) -> list[Path]:
    """Return the text files of ``folder`` in name order; exits with a message if there is none."""
    files = sorted([*folder.glob("*.txt"), *folder.glob("*.txt.xz")])
    if not files:
        raise SystemExit(f"{folder} holds no *.txt and no *.txt.xz file")
    return files


def domain(path: Path) -> str:
    """Name a file's domain: ``en_prose`` of ``en_prose.txt.xz``."""
    return path.name.removesuffix(".xz").removesuffix(".txt")


def documents(path: Path) -> Iterator[str]:
    """Yield the documents of one file, without their separators."""
    opener = lzma.open if path.suffix == ".xz" else open
    lines: list[str] = []
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.strip() != END_OF_TEXT:
                lines.append(line)
            elif lines:
                yield "".join(lines)
                lines = []
    if lines:
        yield "".join(lines)


def sample_documents(path: Path, max_bytes: int, seed: int) -> list[str]:
    """Return documents in random order, the last one cut, of about ``max_bytes`` in all."""
    shuffled = list(documents(path))
    random.Random(f"{seed} {path.name}").shuffle(shuffled)
    sample, num_bytes = [], 0
    for document in shuffled:
        sample.append(document[: max_bytes - num_bytes])
        num_bytes += len(document.encode())
        if num_bytes >= max_bytes:
            break
    return sample
