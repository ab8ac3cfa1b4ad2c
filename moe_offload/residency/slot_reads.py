"""Slots of one byte size: which expert is in which, and the reads that fill them.

Owns the mechanism only: take a slot, read into it, admit what has arrived, free it. slot_pool.py decides
whose slot is freed for whom, expert_cache.py when. One thread uses it: reads finish in the background, but
a pool learns of it only when asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from moe_offload.errors import CheckpointError, ConfigError, DeviceError
from moe_offload.planning.eviction import EvictionPolicy
from moe_offload.planning.plans import PoolPlan
from moe_offload.residency.slot_checks import check_slots
from moe_offload.residency.slot_entry import ON_ITS_WAY, Entry, ExpertSource, SlotState
from moe_offload.stats import OffloadStats
from moe_offload.storage.expert_format import ExpertKey, ExpertLayout


class SlotReads:
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
        self.staging_per_top_k = plan.staging_per_top_k
        self.store, self.policy, self.stats = store, policy, stats
        self.first_address, self.clock = first_address, clock
        self.free = list(range(plan.num_slots - 1, -1, -1))  # taken from the end
        # Slots that native code may begin guesses in (early_reads.py): free ones, and of finished guesses.
        self.lent: list[int] = []
        self.exchanged: dict[int, Entry] = {}
        self.residents: dict[ExpertKey, Entry] = {}
        self.staged: dict[ExpertKey, Entry] = {}  # in flight or staged, oldest first
        # Of the staged: speculation that no step has asked for, and that nobody has seen arrive.
        self.guesses: dict[ExpertKey, Entry] = {}
        # Of the staged: read at the start for no step in particular.
        self.warming: dict[ExpertKey, Entry] = {}
        self.draining: list[tuple[int, int]] = []  # (ticket, slot) of abandoned reads that had begun
        self.table: dict[int, list[Entry | None]] = {}  # layer_idx -> by expert_id
        for layer_idx in plan.layers:
            assert layouts[layer_idx].slot_bytes <= plan.slot_bytes, f"layer {layer_idx} needs a larger slot"
            self.table[layer_idx] = [None] * layouts[layer_idx].num_experts
        # For native code, layer_idx -> (num_experts, number of matrices): the addresses of residents, and of
        # staged ones that are shown; first ON_ITS_WAY for others that have a slot; 0 for all others. Whoever
        # takes a slot away clears the whole row: native code keeps tickets in it (resident_table.h).
        self.resident_table: dict[int, NDArray[np.uint64]] = {
            i: np.zeros((len(row), len(layouts[i].matrices)), np.uint64) for i, row in self.table.items()
        }

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
        return self._enter(key, slot, ticket, speculative=speculative)

    def book(self, key: ExpertKey, slot_address: int, ticket: int) -> None:
        """Take note of a guess's read that native code began in a lent slot; told again, do nothing."""
        slot = (slot_address - self.first_address) // self.slot_bytes
        given = self.exchanged.get(slot)
        if given is not None:
            self.stats.prefetch_wasted_bytes += given.num_bytes if given.key in self.staged else 0
            self._forget(given.key)
            self.staged.pop(given.key, None)
        elif slot in self.lent:
            self.lent.remove(slot)
        else:
            return
        self._enter(key, slot, ticket, speculative=True)
        self.exchanged.pop(slot, None)  # last: until then nobody else may have what is read into

    def take_back(self) -> None:
        """End a loan of slots: those that nothing was booked for are free again."""
        self.exchanged = {}
        if self.lent:
            self.free += self.lent
            self.lent = []

    def _enter(self, key: ExpertKey, slot: int, ticket: int, *, speculative: bool) -> Entry:
        entry = Entry(
            key=key,
            slot=slot,
            addresses=self.store.addresses(key, self.slot_address(slot)),
            num_bytes=self.store.expert_bytes(key),
            ticket=ticket,
            state=SlotState.IN_FLIGHT,
            unclaimed=speculative,
        )
        self.table[key.layer_idx][key.expert_id] = entry
        self.resident_table[key.layer_idx][key.expert_id, 0] = ON_ITS_WAY
        self.staged[key] = entry
        if speculative:
            self.guesses[key] = entry
        return entry

    def adopt(self, key: ExpertKey, address: int) -> Entry:
        """Make a resident of an expert that native code has put into the free slot at ``address``."""
        assert self.find(key) is None, f"{key} has a slot already"
        slot = (address - self.first_address) // self.slot_bytes
        self.free.remove(slot)
        entry = Entry(
            key=key,
            slot=slot,
            addresses=self.store.addresses(key, address),
            num_bytes=self.store.expert_bytes(key),
            ticket=0,
            state=SlotState.STAGED,
            unclaimed=False,
        )
        self.table[key.layer_idx][key.expert_id] = self.staged[key] = entry
        self.admit(entry)
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
        self.guesses.pop(entry.key, None)

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
        self.no_guess(entry)
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

    def no_guess(self, entry: Entry) -> None:
        """Take note that somebody wants an entry for certain."""
        entry.unclaimed = False
        self.guesses.pop(entry.key, None)

    def admit(self, entry: Entry) -> None:
        """Make a staged expert a resident: book-keeping only, its bytes stay where they are."""
        assert entry.state is SlotState.STAGED, f"{entry.key} is {entry.state.value}, wait for it first"
        del self.staged[entry.key]
        entry.state = SlotState.RESIDENT
        self.residents[entry.key] = entry
        self.resident_table[entry.key.layer_idx][entry.key.expert_id] = entry.addresses
        self.policy.on_insert(entry.key)

    def discard(self, entry: Entry) -> None:
        """Free a staged expert's slot, or abandon its read: at once when it had not begun."""
        if entry.state is SlotState.IN_FLIGHT and not self.was_forgotten(entry.ticket):
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

    def check(self) -> None:
        """Assert what holds whenever no step or stream is open."""
        check_slots(self)

    def was_forgotten(self, ticket: int) -> bool:
        """Whether a ticket is unknown: then its read is over."""
        try:
            self.store.done(ticket)
        except ConfigError:
            return True
        return False

    def _abandon(self, entry: Entry) -> None:
        if self.cancel(entry):
            return
        if entry.unclaimed:
            self.stats.prefetch_wasted_bytes += entry.num_bytes
        del self.staged[entry.key]
        self._forget(entry.key)
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
        self._forget(entry.key)
        self.free.append(entry.slot)

    def _forget(self, key: ExpertKey) -> None:
        self.warming.pop(key, None)
        self.guesses.pop(key, None)
        self.table[key.layer_idx][key.expert_id] = None
        self.resident_table[key.layer_idx][key.expert_id] = 0
