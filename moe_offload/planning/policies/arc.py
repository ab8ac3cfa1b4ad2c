"""ARC, and Fate: shallow layers resident, ARC for the others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from itertools import chain

from moe_offload.storage.expert_format import ExpertKey

Keys = OrderedDict[ExpertKey, None]


class ArcPolicy:
    """Adaptive replacement cache (Megiddo and Modha, FAST 2003), event by event.

    T1 holds what was used once, T2 what was used again, B1 and B2 what left them lately; a return from
    B1 raises the target size of T1, one from B2 lowers it. The capacity is the most residents seen. An
    insertion is a first use: the event that brought an expert in does not count as its second.
    """

    name = "arc"

    def __init__(self) -> None:
        self._t1: Keys = OrderedDict()  # least recent first, as all four
        self._t2: Keys = OrderedDict()
        self._b1: Keys = OrderedDict()
        self._b2: Keys = OrderedDict()
        self._target = 0.0
        self._capacity = 0
        self._inserted: set[ExpertKey] = set()  # since the last event

    def on_route(
        self, layer_idx: int, expert_ids: Sequence[int], expert_weights: Sequence[float] | None
    ) -> None:
        for expert_id in sorted(expert_ids):
            key = ExpertKey(layer_idx, expert_id)
            if key in self._inserted:
                continue
            if key in self._t1:
                del self._t1[key]
                self._t2[key] = None
            elif key in self._t2:
                self._t2.move_to_end(key)
        self._inserted.clear()

    def on_insert(self, key: ExpertKey) -> None:
        if key in self._b1:
            step = max(1.0, len(self._b2) / len(self._b1))
            self._target = min(float(self._capacity), self._target + step)
            del self._b1[key]
            self._t2[key] = None
        elif key in self._b2:
            step = max(1.0, len(self._b1) / len(self._b2))
            self._target = max(0.0, self._target - step)
            del self._b2[key]
            self._t2[key] = None
        else:
            self._t1[key] = None
        self._inserted.add(key)

    def on_evict(self, key: ExpertKey) -> None:
        self._inserted.discard(key)
        resident, ghosts = (self._t1, self._b1) if key in self._t1 else (self._t2, self._b2)
        del resident[key]
        ghosts[key] = None
        self._capacity = max(self._capacity, len(self._t1) + len(self._t2))
        while len(self._t1) + len(self._b1) > self._capacity and self._b1:
            self._b1.popitem(last=False)
        while len(self._b1) + len(self._b2) > self._capacity and self._b2:
            self._b2.popitem(last=False)

    def victims(self, candidates: Collection[ExpertKey], count: int) -> list[ExpertKey]:
        chosen: list[ExpertKey] = []
        once = (key for key in self._t1 if key in candidates)
        again = (key for key in self._t2 if key in candidates)
        for _ in range(min(count, len(candidates))):
            left_once = len(self._t1) - sum(key in self._t1 for key in chosen)
            order = (once, again) if left_once > self._target else (again, once)
            chosen.append(next(chain(*order)))
        return chosen


class FatePolicy(ArcPolicy):
    """Fate (arXiv 2502.12224): the experts of the lowest layers stay, ARC for the deep ones.

    Shallow are the lowest four layers seen, since the next layer's router is hardest to foresee there;
    their experts leave only when there is no other. In a pool of one layer this is ARC.
    """

    name = "fate"
    num_shallow_layers = 4

    def __init__(self) -> None:
        super().__init__()
        self._layers: list[int] = []

    def on_insert(self, key: ExpertKey) -> None:
        if key.layer_idx not in self._layers:
            self._layers = sorted([*self._layers, key.layer_idx])
        super().on_insert(key)

    def victims(self, candidates: Collection[ExpertKey], count: int) -> list[ExpertKey]:
        shallow = set(self._layers[: self.num_shallow_layers])
        if len(self._layers) <= self.num_shallow_layers:
            return super().victims(candidates, count)
        deep = {key for key in candidates if key.layer_idx not in shallow}
        chosen = super().victims(deep, count)
        if len(chosen) < min(count, len(candidates)):
            rest = {key for key in candidates if key.layer_idx in shallow}
            chosen += super().victims(rest, count - len(chosen))
        return chosen
