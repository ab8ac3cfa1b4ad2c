"""A checkpoint's name for what is kept about it beside the user's cache: fits, heat, plans."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from moe_offload.errors import CheckpointError
from moe_offload.storage.checkpoint import Checkpoint

SAMPLES, SAMPLE_BYTES = 9, 16384


def checkpoint_key(checkpoint: Checkpoint) -> str:
    """Return "NAME-digest": the same for a copy, another for other weights.

    Files count by size and evenly spread samples, the configuration wholly: reading all of a large
    checkpoint would take longer than what the key saves. Times of change do not count.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    for path in checkpoint.files:
        _add_file(digest, path)
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", checkpoint.path.resolve().name)[:60]
    return f"{name or 'model'}-{digest.hexdigest()[:16]}"


def cache_folder(kind: str) -> Path:
    """Return the folder for one kind of kept things: below XDG_CACHE_HOME, or ~/.cache.

    A user without a home (of a container) has it below /, as with HOME=/; most cannot write there.
    """
    base, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    root = Path(base) if os.path.isabs(base) else Path(home if os.path.isabs(home) else "/") / ".cache"
    return root / "moe_offload" / kind


def is_kept(path: Path) -> bool:
    """Whether there is such a file; False, too, where this user may not look (Path.is_file raises)."""
    return os.path.isfile(path)


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size}\n".encode())
            for number in range(SAMPLES):
                offset = max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1)
                digest.update(os.pread(file.fileno(), SAMPLE_BYTES, offset))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; check the disk") from error
