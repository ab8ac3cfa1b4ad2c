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

from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager

from moe_offload.residency.cache_books import CacheBooks
from moe_offload.residency.cache_hints import CacheHints
from moe_offload.residency.cache_pools import Step as Step
from moe_offload.residency.cache_upkeep import CacheUpkeep
from moe_offload.residency.prompt_stream import Batch, Copies, stream_experts
from moe_offload.residency.slot_entry import SlotState
from moe_offload.residency.slot_pool import SlotPool
from moe_offload.storage.expert_format import ExpertKey


class ExpertCache(CacheHints, CacheUpkeep, CacheBooks):
    """Experts in the slots of an arena, read from ``store`` as steps and prefetches ask for them.

    Args:
        pools: laid out in the arena one after the other.
        layouts: by layer index, of every layer of the pools.
        arena: holds all the slots.
        policy_factory: makes one policy per pool.
        top_k: no pool shrinks below the experts of one token.
        clock: seconds, for stats.stall_s.
    """

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
        if self.keeps_log and routed is None:
            self.log.add(layer_idx, expert_ids)
        elif self.keeps_log and routed is not None:
            self.log.add(layer_idx, routed[0], None, [i for i in routed[0] if i not in expert_ids])
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

    def end(self, step: Step) -> None:
        """Unpin, show the policy the step, make its misses residents, then evict what is too many."""
        assert self._open is step, "this step is not open"
        pool = self._pool_of[step.layer_idx]
        for entry in step.entries:
            if entry.state is not SlotState.RESIDENT:
                pool.admit(entry)
        for entry in step.entries:
            entry.pins -= 1
        self._open = None
        pool.routed(step.layer_idx, *(step.routed or (step.expert_ids, step.weights)))
        self._evict_excess(pool)

    def free_slots(self, most: int) -> list[list[int]]:
        """Return, for each of ``plans``, addresses of free slots, at most so many."""
        return [[pool.slot_address(slot) for slot in pool.free[-most:]] for pool in self._pools]

    def used(
        self,
        layer_idx: int,
        expert_ids: Sequence[int],
        weights: Sequence[float],
        num_hits: int,
        read: Sequence[tuple[int, int]],
    ) -> None:
        """Count a step that native code ran as ``begin`` and ``end`` would have; see ``used_residents``.

        Args:
            read: (expert, address) of what missed and was put into one of ``free_slots``.
        """
        pool = self._pool_of[layer_idx]
        for expert_id, address in read:
            entry = pool.adopt(ExpertKey(layer_idx, expert_id), address)
            self._stats.misses += 1
            self._stats.demand_bytes += entry.num_bytes
        self.used_residents(layer_idx, expert_ids, weights, num_hits)
        if read:
            self._evict_excess(pool)

    def abort(self, step: Step) -> None:
        """Give up a step after an error or an interrupt; never blocks, the cache stays usable."""
        self._release(self._pool_of[step.layer_idx], step)
        if self._open is step:
            self._open = None

    @property
    def is_midway(self) -> bool:
        """Whether a step or stream is open."""
        return self._open is not None

    def recover(self) -> None:
        """Give up what was under way when an interrupt came, wherever it came; never blocks.

        Ctrl-C may fall between any two instructions, so nothing is believed but what adds up:
        residents stay, policies start anew, a slot that nobody can account for is lost.
        """
        self._open = None
        for pool in self._pools:
            pool.recover(self._policy_factory())
            pool.num_staging = self._staging(pool, pool.num_slots)
            pool.evict(max(0, len(pool.residents) - pool.capacity), pool.residents.keys())

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
        try:
            self.log.add(layer_idx, expert_ids, num_tokens or [1] * len(expert_ids))
            pool = self._pool_of[layer_idx]
            yield from stream_experts(pool, layer_idx, expert_ids, num_tokens, copies)
        finally:
            self._open = None

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
