"""Which experts leave when slots are wanted: policies on ints, deterministic, no clock.

A policy sees every routing event of the layers of its pool (one event per layer and decode step, all
ids at once) and knows which experts are resident. It is asked for victims after the event.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Sequence
from importlib import import_module
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moe_offload.errors import CheckpointError, ConfigError, nearest
from moe_offload.storage.expert_format import ExpertKey


@runtime_checkable
class EvictionPolicy(Protocol):
    """Order the residents of one pool.

    Calls come in this order: ``on_insert`` of what a step brought in, ``on_route`` of the step,
    ``victims``, ``on_evict`` of each victim. ``candidates`` is a subset of the inserted keys that
    answers ``in`` quickly (a dict's view or a set); ties go to the smaller key.
    """

    name: str

    def on_route(
        self, layer_idx: int, expert_ids: Sequence[int], expert_weights: Sequence[float] | None
    ) -> None: ...

    def on_insert(self, key: ExpertKey) -> None: ...

    def on_evict(self, key: ExpertKey) -> None: ...

    def victims(self, candidates: Collection[ExpertKey], count: int) -> list[ExpertKey]: ...


class LruPolicy:
    """Evict what was chosen longest ago; experts of one event are equally recent."""

    name = "lru"

    def __init__(self) -> None:
        self._residents: OrderedDict[ExpertKey, None] = OrderedDict()  # least recent first

    def on_route(
        self, layer_idx: int, expert_ids: Sequence[int], expert_weights: Sequence[float] | None
    ) -> None:
        for expert_id in sorted(expert_ids):
            key = ExpertKey(layer_idx, expert_id)
            if key in self._residents:
                self._residents.move_to_end(key)

    def on_insert(self, key: ExpertKey) -> None:
        self._residents[key] = None

    def on_evict(self, key: ExpertKey) -> None:
        del self._residents[key]

    def victims(self, candidates: Collection[ExpertKey], count: int) -> list[ExpertKey]:
        chosen: list[ExpertKey] = []
        for key in self._residents:
            if len(chosen) == count:
                break
            if key in candidates:
                chosen.append(key)
        return chosen


class EwmaPolicy:
    """Evict the lowest decayed frequency: at every event of its layer, for every expert,

        score <- (1 - alpha) * score + alpha * [chosen]

    Decay is lazy. With n the layer's event count, ``log(score) - n * log(1 - alpha)`` changes only when
    the expert is chosen, so that is what is stored, and ``n * log(1 - alpha)`` is added per layer when
    experts of several layers are compared. ``tests/test_eviction.py`` holds this equal to the formula.
    """

    name = "ewma"

    def __init__(self, alpha: float = 0.05) -> None:
        self.alpha = alpha
        self._log_decay = math.log1p(-alpha)
        self._num_events: dict[int, int] = {}
        self._timeless: dict[ExpertKey, float] = {}  # log(score) - n * log(1 - alpha), once chosen
        self._rows: dict[int, int] = {}  # layer_idx -> row of the two arrays below
        self._layers: list[int] = []
        self._table = np.full((0, 0), np.inf)  # (layers, experts): timeless score; +inf: not resident
        self._offsets = np.zeros((0, 1))  # (layers, 1): n * log(1 - alpha)

    def on_route(
        self, layer_idx: int, expert_ids: Sequence[int], expert_weights: Sequence[float] | None
    ) -> None:
        row = self._row(layer_idx)
        num_events = self._num_events[layer_idx] + 1
        offset = num_events * self._log_decay
        decay_by_now = offset - self._log_decay
        for expert_id in expert_ids:
            key = ExpertKey(layer_idx, expert_id)
            timeless = self._timeless.get(key)
            score = 0.0 if timeless is None else math.exp(timeless + decay_by_now)
            timeless = math.log((1.0 - self.alpha) * score + self.alpha) - offset
            self._timeless[key] = timeless
            if expert_id < self._table.shape[1] and self._table[row, expert_id] != np.inf:
                self._table[row, expert_id] = timeless
        self._num_events[layer_idx] = num_events
        self._offsets[row, 0] = offset

    def on_insert(self, key: ExpertKey) -> None:
        row = self._row(key.layer_idx)
        if key.expert_id >= self._table.shape[1]:
            wider = key.expert_id + 1 - self._table.shape[1]
            self._table = np.pad(self._table, ((0, 0), (0, wider)), constant_values=np.inf)
        self._table[row, key.expert_id] = self._timeless.get(key, -np.inf)  # never chosen goes first

    def on_evict(self, key: ExpertKey) -> None:
        self._table[self._rows[key.layer_idx], key.expert_id] = np.inf

    def victims(self, candidates: Collection[ExpertKey], count: int) -> list[ExpertKey]:
        scores = self._table + self._offsets
        flat: NDArray[np.float64] = scores.reshape(-1)
        chosen: list[ExpertKey] = []
        while len(chosen) < min(count, len(candidates)):
            position = int(flat.argmin())  # the first of equals: rows and columns ascend with the key
            assert flat[position] != np.inf, "candidates must have been inserted"
            flat[position] = np.inf
            row, expert_id = divmod(position, scores.shape[1])
            key = ExpertKey(self._layers[row], expert_id)
            if key in candidates:
                chosen.append(key)
        return chosen

    def _row(self, layer_idx: int) -> int:
        """Return the layer's row of the arrays, made in ascending order of layers when it is new."""
        if layer_idx not in self._rows:
            self._num_events[layer_idx] = 0
            self._layers = sorted([*self._layers, layer_idx])
            row = self._layers.index(layer_idx)
            self._table = np.insert(self._table, row, np.inf, axis=0)
            self._offsets = np.insert(self._offsets, row, 0.0, axis=0)
            self._rows = {layer: position for position, layer in enumerate(self._layers)}
        return self._rows[layer_idx]


_POLICIES_FOLDER = "moe_offload.planning.policies"
POLICIES = {
    "ewma": "moe_offload.planning.eviction:EwmaPolicy",
    "lru": "moe_offload.planning.eviction:LruPolicy",
    "arc": f"{_POLICIES_FOLDER}.arc:ArcPolicy",
    "class_lru": f"{_POLICIES_FOLDER}.frequency:ClassLruPolicy",
    "fate": f"{_POLICIES_FOLDER}.arc:FatePolicy",
    "horizon": f"{_POLICIES_FOLDER}.horizon:HorizonPolicy",
    "lcp": f"{_POLICIES_FOLDER}.frequency:LcpPolicy",
    "least_stale": f"{_POLICIES_FOLDER}.passes:LeastStalePolicy",
    "lfru": f"{_POLICIES_FOLDER}.frequency:LfruPolicy",
    "lfu": f"{_POLICIES_FOLDER}.frequency:LfuPolicy",
    "moe_infinity": f"{_POLICIES_FOLDER}.passes:MoeInfinityPolicy",
    "mrs": f"{_POLICIES_FOLDER}.frequency:MrsPolicy",
    "plec": f"{_POLICIES_FOLDER}.passes:PlecPolicy",
    "static": f"{_POLICIES_FOLDER}.frequency:StaticPolicy",
}
ORACLES = {  # know the future of a trace: for replays only
    "belady": f"{_POLICIES_FOLDER}.belady:BeladyPolicy",
    "belady_no_bypass": f"{_POLICIES_FOLDER}.belady:BeladyNoBypassPolicy",
}


def make_policy(name: str, *, oracles: bool = False) -> EvictionPolicy:
    """Return a new policy by its name, or of the class at an import path "package.module:Class".

    What follows an "=" is the class's argument: "horizon=fit.npz" is ``HorizonPolicy("fit.npz")``.

    Args:
        oracles: also those that must know the future, for a replay.

    Raises:
        ConfigError: no such name, module or class, or the class is no EvictionPolicy.
        CheckpointError: the file that its argument names is damaged.
    """
    base, equals, argument = name.partition("=")
    if ":" not in base and base in ORACLES and not oracles:
        raise ConfigError(f"policy {base!r} knows the future: it exists in replays of a trace only")
    path = base if ":" in base else {**POLICIES, **ORACLES}.get(base)
    if path is None:
        raise ConfigError(_unknown_policy(name, f"is unknown{nearest(base, POLICIES)}"))
    module_name, _, class_name = path.partition(":")
    try:
        policy = getattr(import_module(module_name), class_name)(*([argument] if equals else []))
    except (ConfigError, CheckpointError):  # of the policy's own file
        raise
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(_unknown_policy(name, f"cannot be made ({error})")) from error
    if not isinstance(policy, EvictionPolicy):
        raise ConfigError(_unknown_policy(name, "has not the methods of an EvictionPolicy"))
    return policy


def _unknown_policy(name: str, reason: str) -> str:
    known = ", ".join(POLICIES)
    return f'policy {name!r} {reason}; known are {known}, or an import path "package.module:Class"'
