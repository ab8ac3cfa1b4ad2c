"""What holds of a pool's slots whenever nobody is using them; for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_offload.residency.slot_entry import ON_ITS_WAY, SlotState

if TYPE_CHECKING:
    from moe_offload.residency.slot_reads import SlotReads


def check_slots(pool: SlotReads) -> None:
    """Assert what holds whenever no step or stream is open."""
    assert len(pool.residents) <= pool.capacity, f"{len(pool.residents)} residents of {pool.capacity}"
    entries = {**pool.residents, **pool.staged}
    assert len(entries) == len(pool.residents) + len(pool.staged), "a key is resident and staged"
    in_table = {entry.key: entry for row in pool.table.values() for entry in row if entry is not None}
    assert in_table == entries, "the table and the owners disagree"
    slots = [*pool.free, *(slot for _, slot in pool.draining), *(e.slot for e in entries.values())]
    assert len(slots) == len(set(slots)) == pool.num_slots, f"slots {sorted(slots)} of {pool.num_slots}"
    under_way = {entry.key for entry in pool.unclaimed() if entry.state is SlotState.IN_FLIGHT}
    assert pool.guesses.keys() == under_way, f"guesses {pool.guesses.keys()}, under way {under_way}"
    for entry in entries.values():
        assert (entry.state is SlotState.RESIDENT) == (entry.key in pool.residents), f"{entry}"
        assert entry.pins == 0, f"{entry} is pinned by nobody"
    for layer_idx, row in pool.table.items():
        for expert_id, found in enumerate(row):
            numbers = tuple(pool.resident_table[layer_idx][expert_id].tolist())
            wanted: tuple[int, ...] = (0,) if found is None else (ON_ITS_WAY,)
            is_there = found is not None and found.state is SlotState.RESIDENT
            if found is not None and (is_there or (found.key in pool.staged and numbers[0] > ON_ITS_WAY)):
                wanted = found.addresses
            assert numbers[: len(wanted)] == wanted, f"layer {layer_idx} expert {expert_id}: {numbers}"
