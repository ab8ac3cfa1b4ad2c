"""The oracle: Belady's rule, for replays of a trace whose future is known. Bounds what a policy can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from moe_offload.planning.policies.table import FloatArray, Ids, Rows, TablePolicy, Weights
from moe_offload.storage.expert_format import ExpertKey

NEVER = 1e15


class BeladyPolicy(TablePolicy):
    """Evict what is used again last; what an event brought in may be the first to leave (bypass).

    With slots of one size and every miss of an event read anyway, no policy has more hits.
    """

    name = "belady"
    fields: ClassVar[dict[str, float]] = {"next_use": NEVER, "last_event": -1.0}
    next_use: FloatArray
    last_event: FloatArray

    def __init__(self) -> None:
        super().__init__()
        self._event = 0
        self._next_uses: Any = []

    def foresee(self, events: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Learn all (layer_idx, expert_ids) events to come, in order; before the first of them."""
        next_use: dict[ExpertKey, float] = {}
        backwards: list[list[float]] = []
        for position in range(len(events) - 1, -1, -1):
            layer_idx, expert_ids = events[position]
            keys = [ExpertKey(layer_idx, expert_id) for expert_id in expert_ids]
            backwards.append([next_use.get(key, NEVER) for key in keys])
            for key in keys:
                next_use[key] = float(position)
        self._next_uses = backwards[::-1]
        for key, first_use in next_use.items():
            row = self.reach(key.layer_idx, key.expert_id)
            self.next_use[row, key.expert_id] = first_use

    def foresee_layers(self, next_uses: Any) -> None:
        """Learn the future for replay_layers: per token the next use of each layer's experts (L, K)."""
        self._next_uses = next_uses

    def observe(self, row: Rows, expert_ids: Ids, weights: Weights) -> None:
        self.next_use[row, expert_ids] = self._next_uses[self._event]
        self.last_event[row, expert_ids] = self._event
        self._event += 1

    def scores(self) -> FloatArray:
        return -self.next_use


class BeladyNoBypassPolicy(BeladyPolicy):
    """Belady's rule where an event's own experts must stay while there are others to evict."""

    name = "belady_no_bypass"

    def scores(self) -> FloatArray:
        return np.where(self.last_event == self._event - 1, 0.0, -self.next_use - 1.0)
