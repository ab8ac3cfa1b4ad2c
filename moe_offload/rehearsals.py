"""What `plan` rehearsed on this machine, kept beside the user's cache so that the next one need not.

What the program costs beside bytes holds for all models of a machine, and for a day; how fast a model's own
experts are read and computed is kept for an hour: disks and hosts that others share change. What is then
measured anew counts together with what was measured within a day, figure by figure the median, since one look
at such a host finds a mood of seconds.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import moe_offload
from moe_offload.planning.machine_speed import MachineSpeed, Overheads, PromptSpeed, medians
from moe_offload.residency.machine_state import machine_key
from moe_offload.storage.checkpoint_key import cache_folder
from moe_offload.whole_file import whole_file

OVERHEADS_S, STEPS_S = 24 * 3600.0, 3600.0  # that they need not be measured again
MOST_KEPT = 9  # rehearsals of one name
PROGRAM = "overheads"  # the name of what holds for all models

T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """A rehearsal and how long ago it was."""

    machine: MachineSpeed
    age_s: float


def kept_overheads() -> Overheads | None:
    """Return what the program costs beside bytes, as it was measured here; None: not lately."""
    found = _lately(PROGRAM, _overheads, OVERHEADS_S)
    return medians([overheads for overheads, _ in found]) if found else None


def kept_steps(checkpoint: str) -> Kept | None:
    """Return how fast a checkpoint's steps were, overheads not among it; None: not rehearsed lately.

    Args:
        checkpoint: its key.
    """
    found = _lately(checkpoint, _machine, STEPS_S)
    return Kept(medians([machine for machine, _ in found]), found[-1][1]) if found else None


def keep(name: str, measured: Overheads | MachineSpeed, *, afresh: bool = False) -> None:
    """Keep what was measured for ``name``, a checkpoint's key or PROGRAM; a disk that refuses is no error.

    Args:
        afresh: what was measured before is to count no more.
    """
    path = _path(name)
    earlier = [] if afresh else _entries(name)[1 - MOST_KEPT :]
    entries = [*earlier, {"taken": time.time(), "values": asdict(measured)}]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, "w") as file:
            json.dump({"version": moe_offload.__version__, "rehearsals": entries}, file)
    except OSError:
        pass  # it is measured again


def _path(name: str) -> Any:
    return cache_folder("rehearsals") / f"{machine_key()}-{name}.json"


def _entries(name: str) -> list[dict[str, Any]]:
    """Return what was kept, oldest first; nothing where it is missing, damaged or another version's."""
    try:
        kept = json.loads(_path(name).read_text())
        return list(kept["rehearsals"]) if kept["version"] == moe_offload.__version__ else []
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _lately(name: str, make: Callable[[Any], T], newest_s: float) -> list[tuple[T, float]]:
    """Return what was measured within a day and its age, the newest last; nothing where that is too old."""
    found, now = [], time.time()
    for entry in _entries(name):
        try:
            values, age_s = make(entry["values"]), now - float(entry["taken"])
        except (ValueError, TypeError, KeyError):
            return []
        if 0 <= age_s < OVERHEADS_S:
            found.append((values, age_s))
    return found if found and found[-1][1] < newest_s else []


def _overheads(values: Any) -> Overheads:
    return Overheads(**_floats(Overheads, values))


def _floats(kind: type[Any], values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of ``kind``'s fields, all of them numbers that are no less than 0."""
    return {field.name: _number(values[field.name]) for field in fields(kind)}


def _number(value: Any) -> float:
    if not 0.0 <= float(value) < float("inf"):
        raise ValueError(f"{value} was never measured")
    return float(value)


def _difference(value: Any) -> float:
    if not math.isfinite(value):
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
    dense, expert = (
        tuple((_number(x), _number(y)) for x, y in values[name]) for name in ("dense_macs_per_s", "expert_s")
    )
    handling, fresh = (
        tuple((_number(x), _difference(y)) for x, y in values[name]) for name in ("handling_s", "fresh_s")
    )
    return PromptSpeed(
        dense_macs_per_s=dense,
        expert_s=expert,
        read_s=_number(values["read_s"]),
        handling_s=handling,
        fresh_s=fresh,
        score_s=_number(values["score_s"]),
        own_share=_number(values["own_share"]),
    )
