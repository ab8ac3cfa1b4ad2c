"""The errors that a user can cause or meet; broken invariants are assertions instead."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: object, known: Iterable[str]) -> str:
    """Return "; did you mean 'lru'?" where a known name is near to ``name``, else nothing."""
    names = {candidate.lower(): candidate for candidate in known}
    near = get_close_matches(str(name).strip().lower(), names, n=1)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


class ConfigError(ValueError):
    """An argument or a use of the model object that cannot work; the message says what would."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: names the file, the tensor, what was found and wanted."""


class BudgetError(MemoryError):
    """A memory budget that cannot hold what was asked; carries the numbers and the remedy."""


class DeviceError(RuntimeError):
    """An accelerator failed; what runs goes on without it where it can.

    Attributes:
        fault: 0 this once, 1 the device is lost, 2 it had no memory (csrc/device/link.h).
    """

    def __init__(self, message: str, fault: int = 0) -> None:
        super().__init__(message)
        self.fault = fault
