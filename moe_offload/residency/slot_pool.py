"""Slots of one byte size: which expert is in which, and the reads that fill them.

Owns the mechanism only (take a slot, read into it, free it); expert_cache.py decides when.
One thread uses it: reads finish in the background, but a pool learns of it only when asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from moe_offload.config import PoolPlan
from moe_offload.errors import CheckpointError, ConfigError, DeviceError
from moe_offload.planning.eviction import EvictionPolicy
from moe_offload.stats import OffloadStats
from moe_offload.storage.expert_format import ExpertKey, ExpertLayout

UNTOLD_PASSES = 64  # that a policy learns of late


class ExpertSource(Protocol):
    """What the cache asks of storage/expert_store.py; tests put a simulated disk here.

    Every ticket ends in exactly one ``wait`` that returns or raises CheckpointError, or in one
    ``cancel`` that returned True, followed by ``forget``.
    """

    def read(self, key: ExpertKey, slot_address: int, *, speculative: bool) -> int:
        """Queue the reads of an expert; a demand read goes before every queued speculative one."""

    def done(self, ticket: int) -> bool:
        """Whether ``wait`` would not block: finished, well or not."""

    def wait(self, ticket: int) -> None:
        """Block until the bytes are in the slot and forget the ticket, also when it raises this.

        Raises:
            CheckpointError: the read failed.
            DeviceError: it was a copy to a device, and failed.
        """

    def promote(self, ticket: int) -> bool:
        """Turn a speculative read into a demand read, where it has not begun."""

    def cancel(self, ticket: int) -> bool:
        """Take back a read that has not begun; False when it has, and the slot is still written."""

    def forget(self, ticket: int) -> bool:
        """Drop the record of a read that was cancelled."""

    def addresses(self, key: ExpertKey, slot_address: int) -> tuple[int, ...]:
        """First byte of each of the expert's matrices in the slot."""

    def expert_bytes(self, key: ExpertKey) -> int:
        """Bytes of the expert in the file."""


class SlotState(Enum):
    """Of an expert that has a slot; drawn in expert_cache.py."""

    IN_FLIGHT = "in flight"
    STAGED = "staged"  # its bytes are there; not resident (yet)
    RESIDENT = "resident"


@dataclass(slots=True, eq=False)
class Entry:
    """An expert in a slot."""

    key: ExpertKey
    slot: int
    addresses: tuple[int, ...]
    num_bytes: int
    ticket: int  # meaningful while in flight
    state: SlotState
    unclaimed: bool  # speculative, and no step has asked for it yet
    pins: int = 0


class SlotPool:
    """``plan.num_slots`` slots from ``first_address`` on, shared by the experts of ``plan.layers``."""

    def __init__(
        self,
        plan: PoolPlan,
        layouts: Mapping[int, ExpertLayout],
        store: ExpertSource,
        policy: EvictionPolicy,
        stats: OffloadStats,
        first_address: int,
        clock: Callable[[], float],
    ) -> None:
        self.slot_bytes, self.num_experts = plan.slot_bytes, plan.num_experts
        self.num_slots, self.num_staging = plan.num_slots, plan.num_staging
        self.store, self.policy, self.stats = store, policy, stats
        self.first_address, self.clock = first_address, clock
        self.free = list(range(plan.num_slots - 1, -1, -1))  # taken from the end
        self.residents: dict[ExpertKey, Entry] = {}
        self.staged: dict[ExpertKey, Entry] = {}  # in flight or staged, oldest first
        self.warming: dict[
            ExpertKey, Entry
        ] = {}  # of the staged: read at the start for no step in particular
        self._untold: deque[tuple[int, Sequence[int], Sequence[float] | None]]
        self._untold = deque(maxlen=UNTOLD_PASSES * len(plan.layers))  # steps, see routed
        self.draining: list[tuple[int, int]] = []  # (ticket, slot) of abandoned reads that had begun
        self.table: dict[int, list[Entry | None]] = {}  # layer_idx -> by expert_id
        self.above: SlotPool | None = None  # of a faster tier, filled from here: what it has may leave first
        self.held: dict[ExpertKey, int] = {}  # copies to there that are under way, by expert
        self.finish_copies: Callable[[], None] | None = None  # waits until nothing is held
        self._layers_end = max(plan.layers) + 1
        for layer_idx in plan.layers:
            assert layouts[layer_idx].slot_bytes <= plan.slot_bytes, f"layer {layer_idx} needs a larger slot"
            self.table[layer_idx] = [None] * layouts[layer_idx].num_experts

    @property
    def capacity(self) -> int:
        """Most residents."""
        return self.num_slots - self.num_staging

    @property
    def is_full_size(self) -> bool:
        """Whether every expert has a slot of its own: nothing ever has to leave."""
        return self.num_staging == 0

    def slot_address(self, slot: int) -> int:
        return self.first_address + slot * self.slot_bytes

    def find(self, key: ExpertKey) -> Entry | None:
        return self.table[key.layer_idx][key.expert_id]

    def read(self, key: ExpertKey, *, speculative: bool) -> Entry:
        """Start reading an expert into a free slot."""
        assert self.find(key) is None, f"{key} has a slot already"
        slot = self.free.pop()  # before the read begins: an interrupt may lose a slot, never share one
        address = self.slot_address(slot)
        try:
            ticket = self.store.read(key, address, speculative=speculative)
        except Exception:
            self.free.append(slot)
            raise
        entry = Entry(
            key=key,
            slot=slot,
            addresses=self.store.addresses(key, address),
            num_bytes=self.store.expert_bytes(key),
            ticket=ticket,
            state=SlotState.IN_FLIGHT,
            unclaimed=speculative,
        )
        self.table[key.layer_idx][key.expert_id] = entry
        self.staged[key] = entry
        return entry

    def finish(self, entry: Entry) -> None:
        """Wait for an entry's read.

        Raises:
            CheckpointError, DeviceError: it failed; the slot is free again and a later step reads anew.
        """
        try:
            self.store.wait(entry.ticket)
        except (CheckpointError, DeviceError):
            self._remove(entry)
            raise
        entry.state = SlotState.STAGED

    def wait(self, entry: Entry) -> None:
        """Block until an entry's bytes are there, counted as stall; raises as ``finish`` does."""
        if entry.state is not SlotState.IN_FLIGHT:
            return
        started = self.clock()
        try:
            self.finish(entry)
        finally:
            self.stats.stall_s += self.clock() - started

    def settle(self, entry: Entry) -> Entry | None:
        """Take note of a read that finished meanwhile; None when it failed: a hint is never an error."""
        if entry.state is SlotState.IN_FLIGHT and self.store.done(entry.ticket):
            try:
                self.finish(entry)
            except (CheckpointError, DeviceError):
                return None
        return entry

    def claim(self, entry: Entry) -> bool:
        """Take over a prefetch that is needed now; True when it was useful, False when it is late."""
        entry.unclaimed = False
        if self.warming.pop(entry.key, None) is not None:
            self.stats.warm_bytes += entry.num_bytes
            if entry.state is SlotState.STAGED:
                return True
            self.store.promote(entry.ticket)
            return False
        if entry.state is SlotState.STAGED:
            self.stats.prefetch_useful_bytes += entry.num_bytes
            return True
        self.stats.prefetch_late_bytes += entry.num_bytes
        self.store.promote(entry.ticket)
        return False

    def admit(self, entry: Entry) -> None:
        """Make a staged expert a resident: book-keeping only, its bytes stay where they are."""
        assert entry.state is SlotState.STAGED, f"{entry.key} is {entry.state.value}, wait for it first"
        del self.staged[entry.key]
        entry.state = SlotState.RESIDENT
        self.residents[entry.key] = entry
        self.policy.on_insert(entry.key)

    def routed(self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float] | None) -> None:
        """Show the policy a step; later, if ever, while every expert has a slot: nobody is to leave then."""
        if self.is_full_size:
            self._untold.append((layer_idx, expert_ids, weights))
        else:
            self.policy.on_route(layer_idx, expert_ids, weights)

    def tell_policy(self) -> None:
        """Show the policy what was put off, the last ``UNTOLD_PASSES`` passes of it."""
        while self._untold:
            self.policy.on_route(*self._untold.popleft())

    def evict(self, count: int, candidates: Collection[ExpertKey]) -> None:
        """Free the slots of ``count`` residents that the policy chooses among ``candidates``.

        What the tier above has goes first: its bytes would be here twice.
        """
        self.tell_policy()
        if self.held and count:
            candidates = self._not_held(count, candidates)
        twice = self.above.residents.keys() & candidates if self.above is not None and count else set()
        if len(twice) < count:
            once = set(candidates) - twice if twice else candidates
            victims = [*twice, *self.policy.victims(once, count - len(twice))]
        else:
            victims = self.policy.victims(twice, count)
        assert len(set(victims)) == count, f"{self.policy.name} chose {victims}, wanted {count} residents"
        for key in victims:
            entry = self.residents[key]
            assert not entry.pins, f"{self.policy.name} chose {key}, which is pinned"
            self.policy.on_evict(key)
            self._remove(entry)
        self.stats.evictions += count

    def _not_held(self, count: int, candidates: Collection[ExpertKey]) -> Collection[ExpertKey]:
        """Return the candidates from which nothing is being copied: all of them, where those are too few."""
        free = set(candidates) - self.held.keys()
        if len(free) >= count:
            return free
        assert self.finish_copies is not None
        self.finish_copies()
        return candidates

    def hold(self, key: ExpertKey) -> int:
        """Keep an expert whose bytes are there in its place until ``let_go``; returns its slot's address."""
        entry = self.find(key)
        assert entry is not None and entry.state is not SlotState.IN_FLIGHT, f"{key} is not in memory"
        self.held[key] = self.held.get(key, 0) + 1
        return self.slot_address(entry.slot)

    def let_go(self, key: ExpertKey) -> None:
        """End one ``hold``; none is left of those that ``recover`` ended."""
        count = self.held.get(key, 0) - 1
        if count > 0:
            self.held[key] = count
        else:
            self.held.pop(key, None)

    def discard(self, entry: Entry) -> None:
        """Free a staged expert's slot, or abandon its read: at once when it had not begun."""
        if entry.state is SlotState.IN_FLIGHT and not self._was_forgotten(entry.ticket):
            self._abandon(entry)
            return
        if entry.unclaimed:
            self.stats.prefetch_wasted_bytes += entry.num_bytes
        if entry.key in self.warming:
            self.stats.warm_bytes += entry.num_bytes
        self._remove(entry)

    def cancel(self, entry: Entry) -> bool:
        """Take back a read that has not begun; False leaves it in flight."""
        if not self.store.cancel(entry.ticket):
            return False
        self.store.forget(entry.ticket)
        self.stats.prefetch_cancelled += entry.unclaimed
        self._remove(entry)
        return True

    def make_room(self, count: int) -> None:
        """Free slots until there are ``count``, dearest last.

        First abandoned reads that have finished, then what was read at the start and is not resident yet
        (coldest first), then speculation nobody claimed (oldest first),
        then residents, then waiting for reads that nobody wants any more. Where every expert has a
        slot of its own only such a read can be in the way.
        """
        self.reap()
        if self.is_full_size:
            self.drain()
            return
        for entry in [*reversed(self.warming.values()), *self.unclaimed()]:
            if len(self.free) >= count:
                return
            if self.settle(entry):
                self.discard(entry)
        if len(self.free) < count:
            unpinned = {key for key, entry in self.residents.items() if not entry.pins}
            self.evict(min(count - len(self.free), len(unpinned)), unpinned)
        while len(self.free) < count:
            assert self.draining, f"{count} slots wanted, {len(self.free)} free, the others pinned"
            self._drain_one(self.draining[0])

    def make_room_for_hint(self, key: ExpertKey, after_layer: int) -> bool:
        """Find a slot for a prefetch: a staging slot that no step claims, or that of a finished guess
        that nobody claimed and that is needed later than ``key``: the one needed last.

        Args:
            after_layer: the layer that has just routed; the next one is the first to be needed.
        """
        if self.draining:
            self.reap()
        num_guesses = len(self.staged) - len(self.warming) + len(self.draining)
        if self.free and (self.is_full_size or num_guesses < self.num_staging):
            return True
        farthest, distance = None, self._layers_until(key.layer_idx, after_layer)
        for entry in self.unclaimed():
            if self.settle(entry) is None:
                return True
            entry_distance = self._layers_until(entry.key.layer_idx, after_layer)
            if entry.state is SlotState.STAGED and entry_distance > distance:
                farthest, distance = entry, entry_distance
        if farthest is None:
            return False
        self.discard(farthest)
        return True

    def _layers_until(self, layer_idx: int, after_layer: int) -> int:
        """Return how far ahead a layer is: those up to ``after_layer`` come again with the next token."""
        return layer_idx if layer_idx > after_layer else layer_idx + self._layers_end

    def guessed_bytes(self) -> int:
        """Return the bytes of speculative reads that no step has claimed and that have not finished."""
        entries = [e for e in self.staged.values() if e.unclaimed and e.state is SlotState.IN_FLIGHT]
        return sum(entry.num_bytes for entry in entries if not self.store.done(entry.ticket))

    def preload(self, keys: Iterable[ExpertKey]) -> None:
        """Queue the reads of experts that shall become residents: as many as there is room for."""
        room = min(len(self.free), self.capacity - len(self.residents) - len(self.warming))
        for key in keys:
            if room <= 0:
                return
            if self.find(key) is None:
                entry = self.read(key, speculative=True)
                entry.unclaimed = False
                self.warming[key] = entry
                room -= 1

    def absorb(self) -> None:
        """Make residents of what ``preload`` has read meanwhile, as long as there is room."""
        for entry in list(self.warming.values()):
            under_way = entry.state is SlotState.IN_FLIGHT and not self.store.done(entry.ticket)
            if under_way or self.settle(entry) is None:  # whoever waited for all reads has settled some
                continue
            self.stats.warm_bytes += entry.num_bytes
            del self.warming[entry.key]
            if len(self.residents) < self.capacity:
                self.admit(entry)
            else:
                self.discard(entry)

    def free_one(self) -> None:
        """Free a slot for a stream that has none: what nobody waits for is in the way."""
        self.drain()
        if not self.free and self.warming:
            self.discard(next(reversed(self.warming.values())))
            self.drain()

    def reap(self) -> None:
        """Free the slots of abandoned reads that have finished."""
        for pair in [pair for pair in self.draining if self.store.done(pair[0])]:
            self._drain_one(pair)

    def drain(self) -> None:
        """Wait until no read is in flight that nobody wants."""
        while self.draining:
            self._drain_one(self.draining[0])

    def unclaimed(self) -> list[Entry]:
        """Return the speculative entries that no step has asked for, oldest first."""
        return [entry for entry in self.staged.values() if entry.unclaimed]

    def recover(self, policy: EvictionPolicy) -> None:
        """Make the books agree again after an interrupt between any two instructions; never blocks.

        Finished residents stay; all else is given up. A slot that neither list nor entry accounts
        for may have a read under way that nobody knows: it is never used again.
        """
        owners = [*self.residents.values(), *self.staged.values()]
        owners += [entry for row in self.table.values() for entry in row if entry is not None]
        entries = {entry.slot: entry for entry in owners}
        self.residents, self.staged, self.warming, self.held = {}, {}, {}, {}
        for row in self.table.values():
            row[:] = [None] * len(row)
        drained = {slot for _, slot in self.draining}
        self.draining = [pair for pair in self.draining if not self._was_forgotten(pair[0])]
        known_free = set(self.free) - drained - entries.keys()
        known_free |= drained - {slot for _, slot in self.draining}
        self.free = sorted(known_free, reverse=True)
        for slot, entry in entries.items():
            if slot not in drained:
                self._recover_entry(entry)
        self.num_slots = len(self.free) + len(self.draining) + len(self.residents)
        self.policy = policy
        self._untold.clear()
        for key in self.residents:
            policy.on_insert(key)

    def _recover_entry(self, entry: Entry) -> None:
        """Keep a resident; free a slot whose read is over; leave one whose read is not to drain."""
        entry.pins = 0
        if entry.state is SlotState.RESIDENT and self.find(entry.key) is None:
            self.residents[entry.key] = entry
            self.table[entry.key.layer_idx][entry.key.expert_id] = entry
            return
        if entry.state is SlotState.IN_FLIGHT and not self._was_forgotten(entry.ticket):
            if not self.store.cancel(entry.ticket):
                self.draining.append((entry.ticket, entry.slot))
                return
            self.store.forget(entry.ticket)
        self.free.append(entry.slot)

    def _was_forgotten(self, ticket: int) -> bool:
        """Whether a ticket is unknown: then its read is over."""
        try:
            self.store.done(ticket)
        except ConfigError:
            return True
        return False

    def check(self) -> None:
        """Assert what holds whenever no step or stream is open."""
        assert len(self.residents) <= self.capacity, f"{len(self.residents)} residents of {self.capacity}"
        entries = {**self.residents, **self.staged}
        assert len(entries) == len(self.residents) + len(self.staged), "a key is resident and staged"
        in_table = {entry.key: entry for row in self.table.values() for entry in row if entry is not None}
        assert in_table == entries, "the table and the owners disagree"
        slots = [*self.free, *(slot for _, slot in self.draining), *(e.slot for e in entries.values())]
        assert len(slots) == len(set(slots)) == self.num_slots, f"slots {sorted(slots)} of {self.num_slots}"
        for entry in entries.values():
            assert (entry.state is SlotState.RESIDENT) == (entry.key in self.residents), f"{entry}"
            assert entry.pins == 0, f"{entry} is pinned by nobody"
        assert self.held.keys() <= self.residents.keys(), f"{self.held} are held and not resident"

    def _abandon(self, entry: Entry) -> None:
        if self.cancel(entry):
            return
        if entry.unclaimed:
            self.stats.prefetch_wasted_bytes += entry.num_bytes
        del self.staged[entry.key]
        self.warming.pop(entry.key, None)
        self.table[entry.key.layer_idx][entry.key.expert_id] = None
        self.draining.append((entry.ticket, entry.slot))

    def _drain_one(self, pair: tuple[int, int]) -> None:
        ticket, slot = pair
        with suppress(
            CheckpointError, DeviceError
        ):  # nobody wants these bytes; who does reads again and is told
            self.store.wait(ticket)
        self.draining.remove(pair)
        self.free.append(slot)

    def _remove(self, entry: Entry) -> None:
        owner = self.residents if entry.state is SlotState.RESIDENT else self.staged
        del owner[entry.key]
        self.warming.pop(entry.key, None)
        self.table[entry.key.layer_idx][entry.key.expert_id] = None
        self.free.append(entry.slot)
