"""The pools of an expert cache: which serves which layer, what is in them, and at which address."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moe_offload.planning.eviction import EvictionPolicy
from moe_offload.planning.plans import PoolPlan
from moe_offload.residency.route_log import RouteLog
from moe_offload.residency.slot_entry import Entry, ExpertSource, SlotState
from moe_offload.residency.slot_pool import SlotPool
from moe_offload.stats import OffloadStats
from moe_offload.storage.expert_format import ExpertKey, ExpertLayout


class SlotMemory(Protocol):
    """Page-aligned memory of all slots (storage/io.py: Arena)."""

    @property
    def address(self) -> int:
        """First byte."""

    def give_back(self, offset: int, num_bytes: int) -> None:
        """Let the system take these pages."""


@dataclass(slots=True, eq=False)
class Step:
    """The experts of one layer and step, pinned from ``begin`` to ``end`` or ``abort``.

    Attributes:
        ready: expert ids whose bytes were there at ``begin``, ascending.
        pending: expert ids being read, ascending; ``cache.wait`` for each before its use.
        routed: ids and weights that the router chose, where this tier is asked for some of them only.
    """

    layer_idx: int
    expert_ids: Sequence[int]
    weights: Sequence[float] | None
    entries: list[Entry]
    ready: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    routed: tuple[Sequence[int], Sequence[float] | None] | None = None


class CachePools:
    """Slots of an arena in pools, one behind the other; see ``ExpertCache``.

    Attributes:
        keeps_log: whether ``log`` has what is routed, for the next start and the distance to Belady.
        unpin: lets go of memory (address, bytes) that a device's driver holds, before it is given back.
    """

    keeps_log = True
    unpin: Callable[[int, int], None] | None = None

    def __init__(
        self,
        pools: Sequence[PoolPlan],
        layouts: Mapping[int, ExpertLayout],
        store: ExpertSource,
        arena: SlotMemory,
        policy_factory: Callable[[], EvictionPolicy],
        stats: OffloadStats,
        *,
        top_k: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._arena, self._top_k, self._stats = arena, top_k, stats
        self.plans = tuple(pools)
        self._policy_factory, self._layouts = policy_factory, layouts
        self._pools: list[SlotPool] = []
        self._pool_of: dict[int, SlotPool] = {}
        self._open: Step | int | None = None  # the open step, or the layer of the open stream
        address = arena.address
        for plan in pools:
            pool = SlotPool(plan, layouts, store, policy_factory(), stats, address, clock)
            address += plan.num_bytes
            self._pools.append(pool)
            self._pool_of |= dict.fromkeys(plan.layers, pool)
        num_experts = {i: len(pool.table[i]) for i, pool in self._pool_of.items()}
        self.log = RouteLog(self._all_residents, lambda: self.hits_and_needs, num_experts)

    def room(self, layer_idx: int) -> int:
        """Return how many experts a step of the layer may have."""
        return self._pool_of[layer_idx].num_slots

    def has_bytes(self, layer_idx: int, expert_ids: Iterable[int]) -> list[bool]:
        """Return for each expert whether its bytes are there."""
        pool = self._pool_of[layer_idx]
        found = [pool.table[layer_idx][expert_id] for expert_id in expert_ids]
        settled = [None if entry is None else pool.settle(entry) for entry in found]
        return [entry is not None and entry.state is not SlotState.IN_FLIGHT for entry in settled]

    def are_resident(self, layer_idx: int, expert_ids: Iterable[int]) -> list[bool]:
        """Return for each expert whether it is resident."""
        row = self._pool_of[layer_idx].table[layer_idx]
        found = [row[expert_id] for expert_id in expert_ids]
        return [entry is not None and entry.state is SlotState.RESIDENT for entry in found]

    def is_resident(self, key: ExpertKey) -> bool:
        return key in self._pool_of[key.layer_idx].residents

    def absent(self, layer_idx: int, expert_ids: Iterable[int]) -> list[int]:
        """Return which of a layer's experts have no slot, here or in a tier above."""
        pool = self._pool_of[layer_idx]
        row = pool.table[layer_idx]
        above = None if pool.above is None else pool.above.table.get(layer_idx)
        if above is None:
            return [expert_id for expert_id in expert_ids if row[expert_id] is None]
        return [i for i in expert_ids if row[i] is None and above[i] is None]

    def has_room(self, layer_idx: int) -> bool:
        """Whether one more expert of the layer could become a resident without another leaving."""
        pool = self._pool_of[layer_idx]
        return bool(pool.free) and len(pool.residents) + len(pool.warming) < pool.capacity

    def num_newcomers(self, layer_idx: int) -> int:
        """Return how many of a layer's experts are not resident and would find room beside those that are."""
        pool = self._pool_of[layer_idx]
        missing = sum(entry is None for entry in pool.table[layer_idx])
        return max(0, min(missing, pool.capacity - len(pool.residents)))

    def next_slots(self) -> Iterator[tuple[int, int]]:
        """Yield address and bytes of the slots that experts will be read into next, the next one first."""
        for pool in self._pools:
            for slot in reversed(pool.free):
                yield pool.slot_address(slot), pool.slot_bytes

    def residents(self) -> list[ExpertKey]:
        """Return the resident experts, sorted; for tests and reports."""
        return sorted(key for pool in self._pools for key in pool.residents)

    def _all_residents(self) -> Iterator[ExpertKey]:
        return (key for pool in self._pools for key in pool.residents)

    def addresses(self, layer_idx: int, expert_id: int) -> tuple[int, ...]:
        """Return the first byte of each matrix of an expert of the open step or stream."""
        entry = self._pool_of[layer_idx].table[layer_idx][expert_id]
        assert entry is not None and entry.pins and entry.state is not SlotState.IN_FLIGHT, (
            f"layer {layer_idx} expert {expert_id} is not in memory for an open step"
        )
        return entry.addresses

    def step_addresses(self, step: Step, expert_ids: Sequence[int]) -> list[int]:
        """Return the first bytes of the matrices of some of a step's experts, one after the other."""
        row = self._pool_of[step.layer_idx].table[step.layer_idx]
        addresses: list[int] = []
        for expert_id in expert_ids:
            entry = row[expert_id]
            assert entry is not None and entry.pins and entry.state is not SlotState.IN_FLIGHT, (
                f"layer {step.layer_idx} expert {expert_id} is not in memory for an open step"
            )
            addresses += entry.addresses
        return addresses

    def arrivals(self, step: Step, expert_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return first bytes as ``step_addresses``, and the ticket of each read under way, 0 for none.

        For who can wait for a read elsewhere than here.
        """
        row = self._pool_of[step.layer_idx].table[step.layer_idx]
        addresses: list[int] = []
        tickets: list[int] = []
        for expert_id in expert_ids:
            entry = row[expert_id]
            assert entry is not None and entry.pins, f"expert {expert_id} is not part of this step"
            addresses += entry.addresses
            tickets.append(entry.ticket if entry.state is SlotState.IN_FLIGHT else 0)
        return addresses, tickets

    def by_arrival(self, step: Step) -> list[int]:
        """Return ``step.pending`` in the order that their reads were asked for: so they come, as a rule."""
        tickets = {entry.key.expert_id: entry.ticket for entry in step.entries}
        return sorted(step.pending, key=tickets.__getitem__)

    def resident_addresses(self, layer_idx: int, expert_ids: Iterable[int]) -> list[int]:
        """Return the first bytes of the matrices of residents, one after the other."""
        row = self._pool_of[layer_idx].table[layer_idx]
        addresses: list[int] = []
        for expert_id in expert_ids:
            entry = row[expert_id]
            assert entry is not None and entry.state is SlotState.RESIDENT
            addresses += entry.addresses
        return addresses

    def resident_table(self, layer_idx: int) -> NDArray[np.uint64]:
        """Return a layer's part of ``SlotReads.resident_table``; the array stays, and is kept up to date.

        Who computes from it instead of through ``begin`` and ``end`` tells ``used_residents`` what was used,
        before the next step.
        """
        return self._pool_of[layer_idx].resident_table[layer_idx]

    def slots_of(self, layer_idx: int) -> tuple[int, int]:
        """Return the address of the first slot of a layer's pool, and the bytes of each."""
        pool = self._pool_of[layer_idx]
        return pool.first_address, pool.slot_bytes

    def pool_numbers(self) -> dict[int, int]:
        """Return the place of each layer's pool among all."""
        number = {id(pool): i for i, pool in enumerate(self._pools)}
        return {layer_idx: number[id(pool)] for layer_idx, pool in self._pool_of.items()}

    @property
    def store(self) -> ExpertSource | None:
        """Where all pools read from; None: there is no pool."""
        return self._pools[0].store if self._pools else None

    @property
    def has_slots_for_all(self) -> bool:
        """Whether no expert ever has to leave for another."""
        return all(pool.is_full_size for pool in self._pools)

    def slot_tables(self) -> dict[int, NDArray[np.uint64]]:
        """Return ``resident_table`` of all layers, to see who has a slot: their first column is not 0."""
        return {i: pool.resident_table[i] for i, pool in self._pool_of.items()}

    def expert_bytes(self, layer_idx: int) -> int:
        """Return the bytes of an expert of a layer in the file."""
        return self._pool_of[layer_idx].store.expert_bytes(ExpertKey(layer_idx, 0))

    @property
    def largest_expert_bytes(self) -> int:
        """Bytes of the largest slot: about the largest expert's."""
        return max((pool.slot_bytes for pool in self._pools), default=0)

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots, filled or not; less after ``give_back``."""
        return sum(pool.num_slots * pool.slot_bytes for pool in self._pools)

    @property
    def filled_bytes(self) -> int:
        """Bytes of the slots that hold a resident: what is certainly in memory."""
        return sum(len(pool.residents) * pool.slot_bytes for pool in self._pools)

    @property
    def stats(self) -> OffloadStats:
        """The counters that it keeps up to date."""
        return self._stats

    @property
    def needs_not_resident(self) -> int:
        """How often a step needed an expert that was not resident, prefetched or not."""
        return self._stats.misses + self._stats.prefetch_hits

    @property
    def hits_and_needs(self) -> tuple[int, int]:
        """How often a step found an expert resident, and how often it needed one."""
        return self._stats.hits, self._stats.hits + self.needs_not_resident

    @property
    def has_every_expert(self) -> bool:
        """Whether a prefetch could find nothing to do."""
        return all(len(pool.residents) == pool.num_experts for pool in self._pools)

    def check(self) -> None:
        """Assert the invariants of every pool; only between steps."""
        assert self._open is None, "a step or stream is open"
        for pool in self._pools:
            pool.check()
