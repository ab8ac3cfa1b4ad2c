"""What score policies share: arrays of (layers, experts) that grow as layers and experts appear."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_offload._native import lowest_residents
from moe_offload.storage.expert_format import ExpertKey

FloatArray = NDArray[np.float64]
Rows = int | NDArray[np.intp]
Ids = list[int] | NDArray[np.intp]
Weights = Sequence[float] | NDArray[Any]


class TablePolicy(ABC):
    """Evict the residents of the lowest ``scores()``; ties go to the smaller key.

    A subclass names its arrays with their first values in ``fields`` and finds each as an attribute
    of shape (layers, experts); ``observe`` updates them at every event, before any victim is asked for.

    Attributes:
        clock: (layers, 1) events that each layer has had, the one being observed included.
        scores_know_residents: whether in a pool of one layer ``scores`` depends on what is resident, or
            on how passes are counted.
        pass_count: forward passes begun; a layer that is not above the one before begins a new one.
    """

    name = "table"
    scores_know_residents: ClassVar[bool] = False
    fields: ClassVar[dict[str, float]] = {}

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.rows: dict[int, int] = {}
        self.pass_count = 0
        self.clock: FloatArray = np.zeros((0, 1))
        self._resident = np.zeros((0, 0), np.bool_)
        self._num_residents = 0
        self._last_layer = -1
        for field, start in self.fields.items():
            setattr(self, field, np.full((0, 0), start))

    @abstractmethod
    def observe(self, row: Rows, expert_ids: Ids, weights: Weights) -> None:
        """Take note of an event of a layer; ``weights`` are equal where the router's are not known.

        A replay shows all layers of a token at once, ``row`` (layers, 1) and the others (layers, K), to
        a policy whose ``scores`` do not depend on what is resident.
        """

    @abstractmethod
    def scores(self) -> FloatArray:
        """Return (layers, experts): the lowest leaves first. May be the policy's own array."""

    def on_route(
        self, layer_idx: int, expert_ids: Sequence[int], expert_weights: Sequence[float] | None
    ) -> None:
        ids = list(expert_ids)
        row = self.reach(layer_idx, max(ids))
        if layer_idx <= self._last_layer or not self.pass_count:
            self.pass_count += 1
        self._last_layer = layer_idx
        self.clock[row] += 1
        self.observe(row, ids, expert_weights or [1.0 / len(ids)] * len(ids))

    def on_insert(self, key: ExpertKey) -> None:
        row = self.reach(key.layer_idx, key.expert_id)
        self._num_residents += not self._resident[row, key.expert_id]
        self._resident[row, key.expert_id] = True

    def on_evict(self, key: ExpertKey) -> None:
        self._resident[self.rows[key.layer_idx], key.expert_id] = False
        self._num_residents -= 1

    def victims(self, candidates: Collection[ExpertKey], count: int) -> list[ExpertKey]:
        wanted = min(count, len(candidates))
        others = self._num_residents - len(candidates)  # not to be evicted now
        width = self._resident.shape[1]
        positions = lowest_residents(self.scores(), self._resident, wanted + others)
        chosen = [ExpertKey(self.layers[position // width], position % width) for position in positions]
        if others:
            chosen = [key for key in chosen if key in candidates][:wanted]
        assert len(chosen) == wanted, "candidates must have been inserted"
        return chosen

    def reach(self, layer_idx: int, expert_id: int) -> int:
        """Return the layer's row; layers are rows in ascending order, new ones as ``fields`` says."""
        if expert_id >= self._resident.shape[1]:
            self._resize(lambda array, start: _widen(array, expert_id + 1, start))
        if layer_idx not in self.rows:
            self.layers = sorted([*self.layers, layer_idx])
            row = self.layers.index(layer_idx)
            self._resize(lambda array, start: np.insert(array, row, start, axis=0))
            self.clock = np.insert(self.clock, row, 0.0, axis=0)
            self.rows = {layer: position for position, layer in enumerate(self.layers)}
        return self.rows[layer_idx]

    def _resize(self, resized: Callable[[NDArray[Any], float], NDArray[Any]]) -> None:
        self._resident = resized(self._resident, False)
        for field, start in self.fields.items():
            setattr(self, field, resized(getattr(self, field), start))


def _widen(array: NDArray[Any], num_experts: int, start: float) -> NDArray[Any]:
    return np.pad(array, ((0, 0), (0, num_experts - array.shape[1])), constant_values=start)
