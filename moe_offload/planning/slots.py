"""How room for experts becomes slots: layers whose experts have one size share a pool.

Pure. Slots are granted one at a time in an order that does not depend on the budget (every pool keeps the
same share of its experts), so more memory never means fewer slots anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moe_offload.config import STAGING_PER_TOP_K
from moe_offload.planning.plans import PoolPlan
from moe_offload.storage.expert_format import ExpertLayout


@dataclass(frozen=True)
class ExpertPool:
    """A pool before its slots are counted."""

    slot_bytes: int
    layers: tuple[int, ...]
    num_experts: int
    min_slots: int


def group_layers(layouts: Mapping[int, ExpertLayout], top_k: int) -> list[ExpertPool]:
    """Return one pool per slot size, in the order of its first layer."""
    by_size: dict[int, list[ExpertLayout]] = {}
    for _, layout in sorted(layouts.items()):
        by_size.setdefault(layout.slot_bytes, []).append(layout)
    return [
        ExpertPool(
            slot_bytes=slot_bytes,
            layers=tuple(layout.layer_idx for layout in group),
            num_experts=sum(layout.num_experts for layout in group),
            min_slots=min(top_k, max(layout.num_experts for layout in group)),
        )
        for slot_bytes, group in by_size.items()
    ]


def least_expert_bytes(pools: Sequence[ExpertPool]) -> int:
    return sum(pool.min_slots * pool.slot_bytes for pool in pools)


def grant_slots(pools: Sequence[ExpertPool], room_bytes: int, expert_cap: int | None) -> list[int]:
    """Return the slots of each pool: the least, then one at a time to the pool with the smallest share.

    Stops at the first grant that does not fit: skipping it for a smaller slot of another pool would
    use a few bytes more, but then a larger budget could take that slot away again.
    """
    slots = [pool.min_slots for pool in pools]
    room_bytes -= least_expert_bytes(pools)
    room_slots = sum(pool.num_experts for pool in pools) if expert_cap is None else expert_cap
    grants = sorted(
        (count / pool.num_experts, position)
        for position, pool in enumerate(pools)
        for count in range(pool.min_slots + 1, pool.num_experts + 1)
    )
    for _, position in grants[: max(0, room_slots - sum(slots))]:
        room_bytes -= pools[position].slot_bytes
        if room_bytes < 0:
            break
        slots[position] += 1
    return slots


def pool_plans(pools: Sequence[ExpertPool], slots: Sequence[int], top_k: int) -> tuple[PoolPlan, ...]:
    return tuple(
        PoolPlan(
            slot_bytes=pool.slot_bytes,
            layers=pool.layers,
            num_experts=pool.num_experts,
            num_slots=num_slots,
            num_staging=staging_slots(num_slots, pool.num_experts, top_k),
        )
        for pool, num_slots in zip(pools, slots, strict=True)
    )


def with_staging(pools: Sequence[PoolPlan], per_top_k: float, top_k: int) -> tuple[PoolPlan, ...]:
    """Return the pools with another division between residents and reads in flight; the bytes stay."""
    return tuple(
        replace(
            pool,
            num_staging=staging_slots(pool.num_slots, pool.num_experts, top_k, per_top_k),
            staging_per_top_k=per_top_k,
        )
        for pool in pools
    )


def staging_slots(num_slots: int, num_experts: int, top_k: int, per_top_k: float = STAGING_PER_TOP_K) -> int:
    """Return how many of a pool's slots are kept for reads in flight.

    None when every expert has a slot of its own. Otherwise one step's misses and as many prefetched
    experts (2 * top_k) where there is room: a step's misses always fit (top_k), and above that half
    of the slots stay for residents. With top_k slots or fewer everything streams.

    Args:
        per_top_k: what to keep instead of 2, at least 1.
    """
    if num_slots >= num_experts:
        return 0
    if num_slots <= top_k:
        return num_slots
    return min(int(per_top_k * top_k), top_k + (num_slots - top_k) // 2)
