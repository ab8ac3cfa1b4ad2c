"""What `plan` rehearsed on this machine, kept beside the user's cache so that the next one need not.

What the program costs beside bytes holds for all models of a machine, and for a day; how fast a model's own
experts are read and computed is kept for an hour: disks and hosts that others share change.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import moe_offload
from moe_offload.planning.machine_speed import MachineSpeed, Overheads, PromptSpeed
from moe_offload.residency.machine_state import machine_key
from moe_offload.storage.checkpoint_key import cache_folder

OVERHEADS_S, STEPS_S = 24 * 3600.0, 3600.0  # that they are kept
PROGRAM = "overheads"  # the name of what holds for all models

T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """A rehearsal and how long ago it was."""

    machine: MachineSpeed
    age_s: float


def kept_overheads() -> Overheads | None:
    """Return what the program costs beside bytes, as it was measured here; None: not lately."""
    found = _read(PROGRAM, OVERHEADS_S, lambda values: Overheads(**_floats(Overheads, values)))
    return None if found is None else found[0]


def kept_steps(checkpoint: str) -> Kept | None:
    """Return how fast a checkpoint's steps were, overheads not among it; None: not rehearsed lately.

    Args:
        checkpoint: its key.
    """
    found = _read(checkpoint, STEPS_S, _machine)
    return None if found is None else Kept(*found)


def keep(name: str, measured: Overheads | MachineSpeed) -> None:
    """Keep what was measured for ``name``, a checkpoint's key or PROGRAM; a disk that refuses is no error."""
    path = _path(name)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    entry = {"version": moe_offload.__version__, "taken": time.time(), "values": asdict(measured)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(entry))
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)


def _path(name: str) -> Any:
    return cache_folder("rehearsals") / f"{machine_key()}-{name}.json"


def _read(name: str, kept_s: float, make: Callable[[Any], T]) -> tuple[T, float] | None:
    """Return what was kept and its age; None where it is missing, old, damaged or another version's."""
    try:
        entry = json.loads(_path(name).read_text())
        age_s = time.time() - float(entry["taken"])
        if entry["version"] != moe_offload.__version__ or not 0 <= age_s < kept_s:
            return None
        return make(entry["values"]), age_s
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _floats(kind: type[Any], values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of ``kind``'s fields, all of them numbers that are no less than 0."""
    return {field.name: _number(values[field.name]) for field in fields(kind)}


def _number(value: Any) -> float:
    if not 0.0 <= float(value) < float("inf"):
        raise ValueError(f"{value} was never measured")
    return float(value)


def _machine(values: Mapping[str, Any]) -> MachineSpeed:
    prompt, macs, experts = (values[name] for name in ("prompt", "macs_per_s", "expert_bytes_per_s"))
    return MachineSpeed(
        ram_bytes_per_s=_number(values["ram_bytes_per_s"]),
        disk_bytes_per_s=_number(values["disk_bytes_per_s"]),
        macs_per_s=None if macs is None else _number(macs),
        expert_bytes_per_s=None if experts is None else _number(experts),
        disk_latency_s=_number(values["disk_latency_s"]),
        submit_s=_number(values["submit_s"]),
        prompt=None if prompt is None else _prompt(prompt),
    )


def _prompt(values: Mapping[str, Any]) -> PromptSpeed:
    dense, expert, handling = (
        tuple((_number(x), _number(y)) for x, y in values[name])
        for name in ("dense_macs_per_s", "expert_s", "handling_s")
    )
    return PromptSpeed(
        dense_macs_per_s=dense,
        expert_s=expert,
        read_s=_number(values["read_s"]),
        handling_s=handling,
        score_s=_number(values["score_s"]),
        own_share=_number(values["own_share"]),
    )
