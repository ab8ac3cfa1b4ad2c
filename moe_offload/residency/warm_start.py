"""What a run learned, kept for the next: every expert's heat, the policies' scores, whether prefetching pays.

A file a checkpoint in the user's cache, written whole and renamed. What is damaged, foreign or from another
version costs a line on stderr and a cold start, nothing else. Knows no torch.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.npz import open_npz
from moe_offload.planning.prefetch_switch import Findings
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.storage.expert_format import ExpertKey
from moe_offload.whole_file import whole_file

VERSION = 1
MOST_FILE_BYTES = 8 << 20
MOST_FOLDER_BYTES = 64 << 20  # the files unused for longest leave

enabled = True  # tests switch it off: what one leaves behind is not the next one's business


@dataclass(frozen=True)
class WarmState:
    """Heat (E,) by layer, and the arrays of each pool's policy, where it has any.

    Attributes:
        prefetching: under which setting what was found of prefetching; None: nothing was.
    """

    heat: Mapping[int, NDArray[Any]]
    policy: str
    policy_states: tuple[Mapping[str, NDArray[Any]], ...] = field(default=())
    prefetching: tuple[str, Findings] | None = None

    def hottest(self) -> list[ExpertKey]:
        """Return every expert that was ever used, the hottest first.

        By its share of what its layer saw: a last layer sees less of prompts than the others do.
        """
        keys = [
            (-heat, layer_idx, expert_id)
            for layer_idx, layer_heat in self.heat.items()
            for expert_id, heat in enumerate((layer_heat / max(layer_heat.sum(), 1e-300)).tolist())
            if heat > 0
        ]
        return [ExpertKey(layer_idx, expert_id) for _, layer_idx, expert_id in sorted(keys)]


def state_of(cache: ExpertCache, policy: str, prefetching: tuple[str, Findings] | None = None) -> WarmState:
    """Return what the cache has learned, and what was found of prefetching."""
    cache.log.pack()
    return WarmState(cache.log.heat, policy, tuple(cache.policy_states()), prefetching)


def write_state(path: Path, checkpoint: str, state: WarmState) -> None:
    """Keep a state for the next run; a line on stderr where that is not possible.

    Args:
        checkpoint: its key (storage/checkpoint_key.py).
    """
    arrays: dict[str, Any] = {
        f"heat.{layer_idx}": heat.astype(np.float32) for layer_idx, heat in state.heat.items()
    }
    for number, policy_state in enumerate(state.policy_states):
        arrays |= {f"policy.{number}.{name}": array for name, array in policy_state.items()}
    if sum(array.nbytes for array in arrays.values()) > MOST_FILE_BYTES:
        arrays = {name: array for name, array in arrays.items() if name.startswith("heat.")}
    notes: dict[str, Any] = {"version": VERSION, "checkpoint": checkpoint, "policy": state.policy}
    if state.prefetching is not None:
        setting, findings = state.prefetching
        notes["prefetching"] = {"setting": setting, **findings._asdict()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            np.savez(file, **arrays, notes=np.str_(json.dumps(notes)))
        _trim(path.parent, path)
    except OSError as error:
        _say(f"what this run learned is not kept: {path}: {error.strerror}")


def _trim(folder: Path, newest: Path) -> None:
    """Remove the files unused for longest until the folder is within MOST_FOLDER_BYTES."""
    files = [(path, path.stat()) for path in folder.glob("*.npz") if path != newest]
    room = MOST_FOLDER_BYTES - newest.stat().st_size
    for path, stat in sorted(files, key=lambda file: -file[1].st_mtime):
        room -= stat.st_size
        if room < 0:
            path.unlink(missing_ok=True)


def read_state(path: Path, checkpoint: str, num_experts: Mapping[int, int]) -> WarmState | None:
    """Return what an earlier run kept; None, and a line on stderr, where it is of no use.

    Args:
        num_experts: by layer index; heat of other shapes is refused.
    """
    try:
        if path.stat().st_size > 2 * MOST_FILE_BYTES:
            raise ValueError("it is too large")
        with open_npz(path) as file:
            return _checked({name: file[name] for name in file.files}, checkpoint, num_experts)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        _say(f"this start is cold: {path} is of no use ({error or type(error).__name__})")
        return None


def _checked(arrays: dict[str, Any], checkpoint: str, num_experts: Mapping[int, int]) -> WarmState:
    notes = json.loads(str(arrays.pop("notes")))
    if (notes["version"], notes["checkpoint"]) != (VERSION, checkpoint):
        raise ValueError(f"it is of version {notes['version']} and of {notes['checkpoint']}")
    heat = {layer_idx: arrays.pop(f"heat.{layer_idx}") for layer_idx in num_experts}
    for layer_idx, layer_heat in heat.items():
        if layer_heat.shape != (num_experts[layer_idx],) or not np.isfinite(layer_heat).all():
            raise ValueError(f"layer {layer_idx} does not fit")
    states: dict[int, dict[str, Any]] = {}
    for name, array in arrays.items():
        _, number, key = name.split(".")
        states.setdefault(int(number), {})[key] = array
    policy_states = tuple(states[number] for number in sorted(states))
    return WarmState(heat, str(notes["policy"]), policy_states, _checked_findings(notes))


def _checked_findings(notes: Mapping[str, Any]) -> tuple[str, Findings] | None:
    if (kept := notes.get("prefetching")) is None:
        return None
    findings = Findings(bool(kept["pays"]), float(kept["gain"]))
    if not abs(findings.gain) < 1e3:
        raise ValueError(f"prefetching cannot save {findings.gain}")
    return str(kept["setting"]), findings


def begin_warm(cache: ExpertCache, state: WarmState, policy: str) -> None:
    """Start where an earlier run ended: its heat, its policies' scores, and the hottest experts being read.

    Nothing waits for those reads: demands go before them, and a step or a prompt that needs the room takes
    it.
    """
    for layer_idx, heat in state.heat.items():
        cache.log.heat[layer_idx][:] = heat
    if state.policy == policy:
        try:
            cache.restore_policies(state.policy_states)
        except (ValueError, KeyError, TypeError) as error:
            _say(
                f"the eviction policy starts anew, an earlier run left what this one does not read ({error})"
            )
    cache.preload(state.hottest())


def _say(line: str) -> None:
    print(f"moe-offload: note: {line}", file=sys.stderr)
