"""Open an npz file that somebody else may have written."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile


def open_npz(path: Path) -> NpzFile:
    """Return the file, to be used in ``with``; nothing in it is unpickled.

    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be read.
        zipfile.BadZipFile: it is no npz; numpy would take it for a pickle and advise to trust it.
    """
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise zipfile.BadZipFile("it is no npz file, or its end is missing")
    found: NpzFile = np.load(path, allow_pickle=False)
    return found
