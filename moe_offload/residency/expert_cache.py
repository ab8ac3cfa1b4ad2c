"""Which experts are in memory, for whom, and until when.

The life of a slot::

                 read                   finish               end(): admitted
        free ───────────► in flight ──────────► staged ─────────────────────► resident ◄──┐
         ▲                    │                   │                             │    │    │
         │   cancelled,       │                   │  end(): chosen as victim,   │    └──► pinned
         │   failed, drained  │                   │  or speculation overwritten │   begin()  end()
         └────────────────────┴───────────────────┴──────── evicted ◄───────────┘

Slots are uniform: of ``num_slots``, at most ``num_slots - num_staging`` hold residents, so that reads
always find room. A staged expert becomes resident by book-keeping; the victim's slot is the new
staging slot. No bytes are copied.

A step is event-atomic: ``begin`` classifies all ids of a step against one snapshot and pins them,
``end`` shows the policy the whole step and only then chooses victims. One thread calls; one step or
one stream is open at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_offload.config import PoolPlan
from moe_offload.errors import CheckpointError, DeviceError
from moe_offload.planning.eviction import EvictionPolicy
from moe_offload.planning.placement import staging_slots
from moe_offload.residency.prompt_stream import Batch, Copies, stream_experts
from moe_offload.residency.route_log import RouteLog
from moe_offload.residency.slot_pool import Entry, ExpertSource, SlotPool, SlotState
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


class ExpertCache:
    """Experts in the slots of an arena, read from ``store`` as steps and prefetches ask for them.

    Args:
        pools: laid out in the arena one after the other.
        layouts: by layer index, of every layer of the pools.
        arena: holds all the slots.
        policy_factory: makes one policy per pool.
        top_k: no pool shrinks below the experts of one token.
        clock: seconds, for stats.stall_s.
    """

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
        self._tables: dict[int, NDArray[np.uint64]] | None = None  # see resident_tables
        self._open: Step | int | None = None  # the open step, or the layer of the open stream
        address = arena.address
        for plan in pools:
            pool = SlotPool(plan, layouts, store, policy_factory(), stats, address, clock)
            address += plan.num_bytes
            self._pools.append(pool)
            self._pool_of |= dict.fromkeys(plan.layers, pool)
        num_experts = {i: len(pool.table[i]) for i, pool in self._pool_of.items()}
        self.log = RouteLog(self._all_residents, lambda: self.hits_and_needs, num_experts)

    # One token, or a few: everything in memory at once.

    def begin(
        self,
        layer_idx: int,
        expert_ids: Sequence[int],
        weights: Sequence[float] | None = None,
        routed: tuple[Sequence[int], Sequence[float] | None] | None = None,
    ) -> Step | None:
        """Pin a step's experts and start reading those that are missing.

        Misses beyond the staging slots evict first, by policy, what the step does not need.

        Args:
            expert_ids: the union over the step's tokens, ascending.
            weights: the router's, one for each of ``expert_ids``; policies may use them.
            routed: all that the router chose and its weights, where another tier serves the others:
                policies and the log see these.

        Returns:
            None when the step needs more experts than the pool has slots: use ``stream``.
        """
        assert self._open is None, "end or abort the open step, or close the open stream, first"
        pool = self._pool_of[layer_idx]
        if len(expert_ids) > pool.num_slots:
            return None
        self.log.add(layer_idx, expert_ids if routed is None else routed[0])
        step = Step(layer_idx, expert_ids, weights, [], routed=routed)
        try:
            missing = self._pin_what_is_there(pool, step)
            if missing:
                self._read_missing(pool, step, missing)
        except BaseException:
            self._release(pool, step)
            raise
        self._open = step
        return step

    def extend(self, step: Step, expert_ids: Sequence[int]) -> None:
        """Add experts, ascending, to the open step, as ``begin`` would; ``room`` says how many it holds."""
        assert self._open is step, "this step is not open"
        pool, more = self._pool_of[step.layer_idx], Step(step.layer_idx, expert_ids, None, [])
        try:
            missing = self._pin_what_is_there(pool, more)
            if missing:
                self._read_missing(pool, more, missing)
        finally:  # what was pinned belongs to the step, whose abort unpins it
            step.entries += more.entries
            step.ready, step.pending = sorted(step.ready + more.ready), sorted(step.pending + more.pending)

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

    def wait(self, step: Step, expert_id: int) -> None:
        """Block until an expert of the step can be used.

        Raises:
            DeviceError: it is being copied to a device, and that failed.
            CheckpointError: its read failed; abort the step, a later one reads again.
        """
        pool = self._pool_of[step.layer_idx]
        entry = pool.table[step.layer_idx][expert_id]
        assert entry is not None and entry.pins, f"expert {expert_id} is not part of this step"
        pool.wait(entry)

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

    def resident_tables(self) -> dict[int, NDArray[np.uint64]] | None:
        """Return the residents' addresses by layer, (num_experts, number of matrices), 0 for all others.

        None where experts may have to leave again. The arrays are kept up to date until ``give_back``,
        ``recover`` or a stream: ask before each token. Who computes from them instead of through ``begin``
        and ``end`` tells ``used_residents`` what was used.
        """
        if self._tables is None and all(pool.is_full_size for pool in self._pools):
            self._tables = {}
            for pool in self._pools:
                for layer_idx, row in pool.table.items():
                    width = len(self._layouts[layer_idx].matrices)
                    self._tables[layer_idx] = np.zeros((len(row), width), np.uint64)
                for key, entry in pool.residents.items():
                    self._tables[key.layer_idx][key.expert_id] = entry.addresses
        return self._tables

    def used_residents(self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float]) -> None:
        """Count a step that ran on ``resident_tables`` as ``begin`` and ``end`` would have."""
        self._stats.hits += len(expert_ids)
        self._pool_of[layer_idx].routed(layer_idx, expert_ids, weights)

    def end(self, step: Step) -> None:
        """Unpin, show the policy the step, make its misses residents, then evict what is too many."""
        assert self._open is step, "this step is not open"
        pool = self._pool_of[step.layer_idx]
        for entry in step.entries:
            if entry.state is not SlotState.RESIDENT:
                pool.admit(entry)
                if self._tables is not None:
                    self._tables[step.layer_idx][entry.key.expert_id] = entry.addresses
        for entry in step.entries:
            entry.pins -= 1
        self._open = None
        pool.routed(step.layer_idx, *(step.routed or (step.expert_ids, step.weights)))
        excess = len(pool.residents) - pool.capacity
        if excess > 0:
            pool.evict(excess, pool.residents.keys())

    def abort(self, step: Step) -> None:
        """Give up a step after an error or an interrupt; never blocks, the cache stays usable."""
        self._release(self._pool_of[step.layer_idx], step)
        if self._open is step:
            self._open = None

    def recover(self) -> None:
        """Give up what was under way when an interrupt came, wherever it came; never blocks.

        Ctrl-C may fall between any two instructions, so nothing is believed but what adds up:
        residents stay, policies start anew, a slot that nobody can account for is lost.
        """
        self._open = self._tables = None
        for pool in self._pools:
            pool.recover(self._policy_factory())
            pool.num_staging = staging_slots(pool.num_slots, pool.num_experts, self._top_k)
            pool.evict(max(0, len(pool.residents) - pool.capacity), pool.residents.keys())

    # A prompt: expert after expert, past the residents.

    def stream(
        self,
        layer_idx: int,
        expert_ids: Sequence[int],
        num_tokens: Sequence[int] | None = None,
        copies: Copies | None = None,
    ) -> Generator[tuple[int, tuple[int, ...]], None, None]:
        """Yield (expert_id, matrix addresses) for ``expert_ids`` in their order, one after the other.

        See ``stream_batches``.
        """
        with closing(self.stream_batches(layer_idx, expert_ids, num_tokens, copies)) as batches:
            for batch in batches:
                yield from batch

    def stream_batches(
        self,
        layer_idx: int,
        expert_ids: Sequence[int],
        num_tokens: Sequence[int] | None = None,
        copies: Copies | None = None,
    ) -> Generator[Batch, None, None]:
        """Yield lists of (expert_id, matrix addresses), together ``expert_ids`` in their order.

        Residents are used in place; the others are read once each through the free slots, as many
        ahead as there are. A list holds residents and, at its end, at most one that was read; its addresses
        are good until the next list is asked for. Nothing is evicted. Closing the generator early leaves
        the cache consistent without blocking.

        Args:
            num_tokens: how many tokens chose each of ``expert_ids``; the most used ones become
                residents where there is room.
            copies: of what was yielded, to a faster tier: a slot is not used again while it is copied.
                Lists are then of one expert.

        Raises:
            CheckpointError: a read failed.
        """
        assert self._open is None, "end or abort the open step, or close the open stream, first"
        self._open = layer_idx
        self.log.add(layer_idx, expert_ids, num_tokens or [1] * len(expert_ids))
        try:
            pool = self._pool_of[layer_idx]
            yield from stream_experts(pool, layer_idx, expert_ids, num_tokens, copies)
        finally:
            self._open = self._tables = None

    @contextmanager
    def lend(self, layer_idx: int, most: int) -> Generator[list[int]]:
        """Lend the addresses of at most ``most`` free slots for a prompt's experts of a layer.

        Meanwhile nothing else happens to the cache, and residents stay where they are. Speculation makes
        room.
        """
        assert self._open is None, "end or abort the open step, or close the open stream, first"
        pool = self._pool_of[layer_idx]
        for entry in pool.unclaimed():
            if len(pool.free) < most and not pool.is_full_size:
                pool.discard(entry)
        pool.reap()
        slots = [pool.free.pop() for _ in range(min(most, len(pool.free)))]
        self._open = layer_idx
        try:
            yield [pool.slot_address(slot) for slot in slots]
        finally:
            self._open = None
            pool.free += slots

    def resident_addresses(self, layer_idx: int, expert_ids: Iterable[int]) -> list[int]:
        """Return the first bytes of the matrices of residents, one after the other."""
        row = self._pool_of[layer_idx].table[layer_idx]
        addresses: list[int] = []
        for expert_id in expert_ids:
            entry = row[expert_id]
            assert entry is not None and entry.state is SlotState.RESIDENT
            addresses += entry.addresses
        return addresses

    # Hints.

    def prefetch(self, keys: Iterable[ExpertKey], *, after_layer: int | None = None) -> None:
        """Start speculative reads, in order of ``keys``, into staging slots that no step claims.

        Drops what is in memory or on its way, and the rest when there is no room. A finished
        speculation that nobody claimed makes room (wasted) for one that is needed sooner; a resident
        never does.

        Args:
            after_layer: the layer that has just routed; None: the open step's, or none has.
        """
        if isinstance(self._open, int):
            return  # a stream uses all the slots
        if after_layer is None:
            after_layer = self._open.layer_idx if self._open is not None else -1
        for key in keys:
            pool = self._pool_of[key.layer_idx]
            if pool.find(key) is None and pool.make_room_for_hint(key, after_layer):
                pool.read(key, speculative=True)

    def absent(self, layer_idx: int, expert_ids: Iterable[int]) -> list[int]:
        """Return which of a layer's experts have no slot, here or in a tier above."""
        pool = self._pool_of[layer_idx]
        row = pool.table[layer_idx]
        if pool.above is None:
            return [expert_id for expert_id in expert_ids if row[expert_id] is None]
        above = pool.above.table[layer_idx]
        return [i for i in expert_ids if row[i] is None and above[i] is None]

    def guessed_bytes(self, layer_idx: int) -> int:
        """Return the bytes of guesses being read or about to be, for the pool of a layer."""
        return self._pool_of[layer_idx].guessed_bytes()

    def expert_bytes(self, layer_idx: int) -> int:
        """Return the bytes of an expert of a layer in the file."""
        return self._pool_of[layer_idx].store.expert_bytes(ExpertKey(layer_idx, 0))

    @property
    def largest_expert_bytes(self) -> int:
        """Bytes of the largest slot: about the largest expert's."""
        return max((pool.slot_bytes for pool in self._pools), default=0)

    @property
    def stats(self) -> OffloadStats:
        """The counters that it keeps up to date."""
        return self._stats

    def contradict(self, layer_idx: int, expert_ids: Iterable[int]) -> None:
        """Cancel queued speculation of a layer whose router chose ``expert_ids`` instead."""
        pool = self._pool_of[layer_idx]
        guesses = [
            entry
            for entry in pool.staged.values()
            if entry.unclaimed and entry.state is SlotState.IN_FLIGHT and entry.key.layer_idx == layer_idx
        ]
        if guesses:
            chosen = {int(expert_id) for expert_id in expert_ids}
            for entry in guesses:
                if entry.key.expert_id not in chosen:
                    pool.cancel(entry)

    @property
    def needs_not_resident(self) -> int:
        """How often a step needed an expert that was not resident, prefetched or not."""
        return self._stats.misses + self._stats.prefetch_hits

    @property
    def has_every_expert(self) -> bool:
        """Whether a prefetch could find nothing to do."""
        return all(len(pool.residents) == pool.num_experts for pool in self._pools)

    # A faster tier, filled from this one (device_tier.py).

    def put_below(self, above: ExpertCache, finish_copies: Callable[[], None]) -> None:
        """Let ``above`` be filled from here: what it has is the first to leave where slots are wanted.

        Args:
            finish_copies: waits until ``above`` copies nothing that this one holds.
        """
        for layer_idx, pool in self._pool_of.items():
            pool.above = above._pool_of.get(layer_idx)
            pool.finish_copies = finish_copies

    def stand_alone(self) -> None:
        """End ``put_below``: the tier above is gone."""
        for pool in self._pools:
            pool.above, pool.finish_copies, pool.held = None, None, {}

    def hold(self, key: ExpertKey) -> int:
        """Keep an expert whose bytes are there until ``let_go``; returns the address of its slot."""
        return self._pool_of[key.layer_idx].hold(key)

    def let_go(self, key: ExpertKey) -> None:
        """End one ``hold``."""
        self._pool_of[key.layer_idx].let_go(key)

    def is_resident(self, key: ExpertKey) -> bool:
        return key in self._pool_of[key.layer_idx].residents

    # The start of a run (warm_start.py).

    def preload(self, keys: Iterable[ExpertKey]) -> None:
        """Queue reads of experts that shall become residents, in order, as far as there is room.

        They are the last in the reader's queue and give way to whatever a step or a prompt needs;
        ``absorb`` makes residents of what has arrived.
        """
        wanted = list(keys)
        for pool in self._pools:
            pool.preload(key for key in wanted if key.layer_idx in pool.table)

    def preload_share(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        """``preload`` some of a layer's experts, as far as its share of the pool goes."""
        pool = self._pool_of[layer_idx]
        row = pool.table[layer_idx]
        held = sum(entry is not None for entry in row)
        share = pool.capacity * len(row) // pool.num_experts
        absent = [i for i in expert_ids if row[i] is None][: max(0, share - held)]
        pool.preload(ExpertKey(layer_idx, expert_id) for expert_id in absent)

    @property
    def is_warming(self) -> bool:
        """Whether reads of ``preload`` have not become residents yet."""
        return any(pool.warming for pool in self._pools)

    def has_room(self, layer_idx: int) -> bool:
        """Whether one more expert of the layer could become a resident without another leaving."""
        pool = self._pool_of[layer_idx]
        return bool(pool.free) and len(pool.residents) + len(pool.warming) < pool.capacity

    def finish_reads(self) -> None:
        """Wait for every read under way; those that fail are dropped."""
        for pool in self._pools:
            for entry in list(pool.staged.values()):
                if entry.state is SlotState.IN_FLIGHT:
                    with suppress(CheckpointError, DeviceError):
                        pool.finish(entry)
            pool.drain()

    def absorb(self) -> None:
        """Make residents of what ``preload`` has read meanwhile; nothing while a step or stream is open."""
        if self._open is None and self.is_warming:
            self._tables = None
            for pool in self._pools:
                pool.absorb()

    def keep_only(self, keys: Iterable[ExpertKey]) -> None:
        """Let all residents leave but ``keys``, between steps, and whatever was being read."""
        assert self._open is None, "residents leave between steps"
        self._tables = None
        self.finish_reads()
        kept = set(keys)
        for pool in self._pools:
            for entry in list(pool.staged.values()):
                pool.discard(entry)
            others = pool.residents.keys() - kept
            pool.evict(len(others), others)

    def policy_states(self) -> list[Mapping[str, NDArray[Any]]]:
        """Return what each pool's policy has learned; empty where it keeps none of it."""
        for pool in self._pools:
            pool.tell_policy()
        states = (getattr(pool.policy, "state", None) for pool in self._pools)
        return [state() if state is not None else {} for state in states]

    def restore_policies(self, states: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        """Let policies go on from ``policy_states`` of the same policies; before any step.

        Raises:
            ValueError, KeyError: a state contradicts itself; the policies are then new ones.
        """
        try:
            for pool, state in zip(self._pools, states, strict=len(states) > 0):
                if state:
                    pool.policy.restore(state)  # type: ignore[attr-defined]
        except (ValueError, KeyError):
            for pool in self._pools:
                pool.policy = self._policy_factory()
            raise

    def use_policy(
        self,
        policy_factory: Callable[[], EvictionPolicy],
        states: Sequence[Mapping[str, NDArray[Any]]] = (),
    ) -> None:
        """Go on with other policies, between steps; the residents stay, and the new policies learn of them.

        Args:
            states: what earlier policies of the kind had learned (``policy_states``).
        """
        assert self._open is None, "a policy is changed between steps"
        self._policy_factory = policy_factory
        for number, pool in enumerate(self._pools):
            policy = policy_factory()
            if number < len(states) and states[number]:
                policy.restore(states[number])  # type: ignore[attr-defined]
            for key in pool.residents:
                policy.on_insert(key)
            pool.policy = policy

    # Memory.

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots, filled or not; less after ``give_back``."""
        return sum(pool.num_slots * pool.slot_bytes for pool in self._pools)

    @property
    def filled_bytes(self) -> int:
        """Bytes of the slots that hold a resident: what is certainly in memory."""
        return sum(len(pool.residents) * pool.slot_bytes for pool in self._pools)

    def give_back(self, num_bytes: int) -> int:
        """Evict by policy and return slots to the system; the cache stays smaller from then on.

        Never below one token's experts, and nothing while a step or stream is open.

        Returns:
            Bytes given back: whole slots, so perhaps more than asked, or less at the minimum.
        """
        given = 0
        while self._pools and self._open is None and given < num_bytes:
            pool = max(self._pools, key=lambda pool: self._spare_slots(pool) * pool.slot_bytes)
            count = min(-(-(num_bytes - given) // pool.slot_bytes), self._spare_slots(pool))
            if count <= 0:
                break
            self._shrink(pool, count)
            given += count * pool.slot_bytes
        return given

    def close(self) -> None:
        """Cancel what has not begun and wait for what has: after that nothing writes to the arena."""
        for pool in self._pools:
            for entry in list(pool.staged.values()):
                pool.discard(entry)
        for pool in self._pools:
            pool.drain()

    def residents(self) -> list[ExpertKey]:
        """Return the resident experts, sorted; for tests and reports."""
        return sorted(key for pool in self._pools for key in pool.residents)

    def _all_residents(self) -> Iterator[ExpertKey]:
        return (key for pool in self._pools for key in pool.residents)

    @property
    def hits_and_needs(self) -> tuple[int, int]:
        """How often a step found an expert resident, and how often it needed one."""
        return self._stats.hits, self._stats.hits + self.needs_not_resident

    def check(self) -> None:
        """Assert the invariants of every pool; only between steps."""
        assert self._open is None, "a step or stream is open"
        for pool in self._pools:
            pool.check()

    def _pin_what_is_there(self, pool: SlotPool, step: Step) -> list[int]:
        """Classify the step's ids against one snapshot, pin those with a slot, return the others."""
        row = pool.table[step.layer_idx]
        missing = []
        for expert_id in step.expert_ids:
            entry = row[expert_id]
            if entry is not None and entry.state is not SlotState.RESIDENT:
                entry = pool.settle(entry)
            if entry is None:
                missing.append(expert_id)
                continue
            entry.pins += 1
            step.entries.append(entry)
            if entry.state is SlotState.RESIDENT:
                self._stats.hits += 1
            elif pool.claim(entry):
                self._stats.prefetch_hits += 1
            else:
                self._stats.misses += 1
            (step.pending if entry.state is SlotState.IN_FLIGHT else step.ready).append(expert_id)
        return missing

    def _read_missing(self, pool: SlotPool, step: Step, missing: Sequence[int]) -> None:
        if len(pool.free) < len(missing):
            pool.make_room(len(missing))
        for expert_id in missing:
            entry = pool.read(ExpertKey(step.layer_idx, expert_id), speculative=False)
            entry.pins += 1
            step.entries.append(entry)
            self._stats.misses += 1
            self._stats.demand_bytes += entry.num_bytes
        step.pending = sorted([*step.pending, *missing])

    def _release(self, pool: SlotPool, step: Step) -> None:
        """Unpin; free what is not resident (a failed read has freed its slot already)."""
        for entry in step.entries:
            entry.pins -= 1
            if entry.state is not SlotState.RESIDENT and pool.find(entry.key) is entry:
                pool.discard(entry)
        step.entries = []

    def _spare_slots(self, pool: SlotPool) -> int:
        least = min(self._top_k, max(len(row) for row in pool.table.values()))
        return max(0, pool.num_slots - least)

    def _shrink(self, pool: SlotPool, count: int) -> None:
        """Take ``count`` slots out of a pool for good and hand their pages back."""
        self._tables = None
        for entry in list(pool.staged.values()):
            pool.discard(entry)
        pool.drain()
        num_slots = pool.num_slots - count
        pool.num_staging = staging_slots(num_slots, pool.num_experts, self._top_k)
        pool.num_slots = num_slots
        pool.evict(max(0, len(pool.residents) - pool.capacity), pool.residents.keys())
        for _ in range(count):
            slot = pool.free.pop()
            self._arena.give_back(pool.slot_address(slot) - self._arena.address, pool.slot_bytes)
        self._stats.slots_given_back += count
