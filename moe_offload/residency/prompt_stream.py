"""The experts of a prompt, in batches of what is in memory, past the residents of a pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from typing import Protocol

from moe_offload.residency.slot_entry import Entry, SlotState
from moe_offload.residency.slot_pool import SlotPool
from moe_offload.storage.expert_format import ExpertKey

Batch = list[tuple[int, tuple[int, ...]]]  # (expert_id, matrix addresses)


class Copies(Protocol):
    """Copies of experts to a faster tier, which read a slot after the next expert was asked for."""

    def under_way(self, expert_id: int) -> bool:
        """Whether the expert's slot is still read."""

    def finish(self, expert_id: int) -> None:
        """Wait until it is not."""


class _Lingering:
    """What was yielded and is still being copied: its slots are used again when that has ended."""

    def __init__(self, copies: Copies | None) -> None:
        self._copies = copies
        self._entries: deque[Entry] = deque()  # oldest first

    def keep(self, entry: Entry) -> bool:
        """Take over an entry of which a copy is under way."""
        keeps = self._copies is not None and self._copies.under_way(entry.key.expert_id)
        if keeps:
            self._entries.append(entry)
        return keeps

    def copied(self, wait: bool) -> Generator[Entry]:
        """Yield the entries that are free now; with ``wait``, at least the oldest."""
        while self._entries and self._copies is not None:
            expert_id = self._entries[0].key.expert_id
            if wait:
                self._copies.finish(expert_id)
            elif self._copies.under_way(expert_id):
                return
            wait = False
            yield self._entries.popleft()

    def all(self) -> list[Entry]:
        return list(self._entries)


def stream_experts(
    pool: SlotPool,
    layer_idx: int,
    expert_ids: Sequence[int],
    num_tokens: Sequence[int] | None,
    copies: Copies | None = None,
) -> Generator[Batch, None, None]:
    """Yield what is at hand, at least one expert; see ``ExpertCache.stream_batches``."""
    held: dict[int, Entry] = {}  # pinned, by expert id: what is there and what is being read ahead
    lingering = _Lingering(copies)

    def release(entry: Entry) -> None:
        entry.pins -= 1
        if entry.state is SlotState.STAGED:
            keeps = entry.key.expert_id in keepers and len(pool.residents) < pool.capacity
            (pool.admit if keeps else pool.discard)(entry)

    try:
        warm = _hold_what_is_there(pool, layer_idx, expert_ids, held)
        unread = deque(expert_id for expert_id in expert_ids if expert_id not in held)
        keepers = warm | _choose_keepers(pool, layer_idx, expert_ids, num_tokens, len(warm))
        left = deque(expert_ids)
        while left:
            for entry in lingering.copied(wait=False):
                release(entry)
            if left[0] not in held and not pool.free:
                for entry in lingering.copied(wait=True):
                    release(entry)
            if left[0] not in held and not pool.free:
                pool.free_one()
            _read_ahead(pool, layer_idx, unread, held)
            pool.wait(held[left[0]])
            batch = _take_what_is_at_hand(pool, left, held) if copies is None else [left.popleft()]
            yield [(expert_id, held[expert_id].addresses) for expert_id in batch]
            for expert_id in batch:
                entry = held.pop(expert_id)
                if not lingering.keep(entry):
                    release(entry)
        while lingering.all():
            for entry in lingering.copied(wait=True):
                release(entry)
    finally:
        for entry in [*held.values(), *lingering.all()]:
            entry.pins -= 1
            if entry.state is not SlotState.RESIDENT and pool.find(entry.key) is entry:
                pool.discard(entry)


def _take_what_is_at_hand(pool: SlotPool, left: deque[int], held: dict[int, Entry]) -> list[int]:
    """Take residents from the front of ``left``, and what was read where it comes first or after them.

    No more than one of these: its slot is needed for the next read.
    """
    batch: list[int] = []
    while left and (entry := held.get(left[0])) is not None:
        if batch and entry.state is SlotState.IN_FLIGHT and not pool.store.done(entry.ticket):
            break
        is_resident = entry.state is SlotState.RESIDENT
        pool.wait(entry)
        batch.append(left.popleft())
        if not is_resident:
            break
    return batch


def _hold_what_is_there(
    pool: SlotPool, layer_idx: int, expert_ids: Sequence[int], held: dict[int, Entry]
) -> set[int]:
    """Pin residents and this layer's speculation; all other speculation leaves its slots.

    Returns:
        The ids that were being read since the start: they become residents.
    """
    pool.absorb()
    wanted = set(expert_ids)
    for entry in pool.unclaimed():
        is_wanted = entry.key.layer_idx == layer_idx and entry.key.expert_id in wanted
        if not is_wanted and not pool.is_full_size:
            pool.discard(entry)
    row = pool.table[layer_idx]
    found = [there for i in expert_ids if (there := row[i]) is not None and pool.settle(there)]
    # One slot stays for what must be read, or a stream would wait for itself.
    room = pool.num_slots - len(pool.residents) - (len(found) < len(expert_ids))
    warm = {entry.key.expert_id for entry in found if entry.key in pool.warming}
    for entry in found:
        if entry.state is not SlotState.RESIDENT:
            if room == 0:
                pool.discard(entry)
                continue
            room -= 1
            pool.claim(entry)
        entry.pins += 1
        held[entry.key.expert_id] = entry
    return warm


def _choose_keepers(
    pool: SlotPool,
    layer_idx: int,
    expert_ids: Sequence[int],
    num_tokens: Sequence[int] | None,
    num_warm: int,
) -> set[int]:
    """Return which experts become residents: the most used, in free slots only.

    No more than the layer's share of the pool, or the first layers of the first prompt would take
    every slot.
    """
    row = pool.table[layer_idx]
    absent = [i for i in expert_ids if (entry := row[i]) is None or entry.state is not SlotState.RESIDENT]
    residents = sum(entry is not None and entry.state is SlotState.RESIDENT for entry in row)
    layer_share = pool.capacity * len(row) // pool.num_experts
    room = pool.capacity - len(pool.residents) - len(pool.warming) - num_warm
    count = max(0, min(layer_share - residents - num_warm, room))
    uses = dict(zip(expert_ids, num_tokens, strict=True)) if num_tokens is not None else {}
    return set(sorted(absent, key=lambda expert_id: (-uses.get(expert_id, 0), expert_id))[:count])


def _read_ahead(pool: SlotPool, layer_idx: int, unread: deque[int], held: dict[int, Entry]) -> None:
    """Fill the free slots with the next reads."""
    pool.reap()
    while unread and pool.free:
        entry = pool.read(ExpertKey(layer_idx, unread[0]), speculative=False)
        entry.pins += 1
        held[unread.popleft()] = entry
        pool.stats.stream_bytes += entry.num_bytes
