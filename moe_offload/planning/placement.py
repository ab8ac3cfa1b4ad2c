"""Where a memory budget goes: fixed parts first, then slots for experts, or a refusal with the numbers.

Pure: ints in, a PlacementPlan out. Layers whose experts have one slot size share a pool. Slots are
granted one at a time in an order that does not depend on the budget (every pool keeps the same share
of its experts), so more memory never means fewer slots anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moe_offload.config import GIB, STAGING_PER_TOP_K, ModelSpec, gib
from moe_offload.errors import BudgetError
from moe_offload.planning.cost_model import (
    device_workspace_bytes,
    kv_bytes,
    scale_copies_bytes,
    state_bytes,
)
from moe_offload.planning.plans import DensePlan, DevicePlan, PlacementPlan, PoolPlan
from moe_offload.storage.expert_format import ExpertLayout


@dataclass(frozen=True)
class FixedCosts:
    """Everything in memory that is not an expert; the same under every budget."""

    base_bytes: int  # interpreter and libraries, measured
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int
    context_tokens: int

    @property
    def total_bytes(self) -> int:
        return self.base_bytes + self.dense_bytes + self.kv_bytes + self.workspace_bytes


@dataclass(frozen=True)
class BudgetRow:
    """What one budget would hold, for `moe-offload inspect`."""

    ram_bytes: int
    fits: bool
    num_slots: int  # experts in memory, 0 when it does not fit
    expert_share: float  # of all experts, 0..1
    smallest_ram_bytes: int


@dataclass(frozen=True)
class _Pool:
    """A pool before its slots are counted."""

    slot_bytes: int
    layers: tuple[int, ...]
    num_experts: int
    min_slots: int


def plan_placement(
    spec: ModelSpec,
    layouts: Mapping[int, ExpertLayout],
    *,
    ram_bytes: int,
    base_bytes: int,
    dense_bytes: int,
    context_tokens: int,
    kv_bytes_per_element: int,
    kv: str | None = None,
    batch_size: int = 1,
    expert_cap: int | None = None,
    reader_bytes: int = 0,
    activation_bytes: int = 0,
) -> PlacementPlan:
    """Divide ``ram_bytes`` among libraries, dense weights, KV cache, workspace and expert slots.

    Args:
        kv: how keys and values are kept (kv_format).
        expert_cap: most experts in memory at all, staging included (config.resolve_expert_cap).
        reader_bytes: buffers of the reader.
        activation_bytes: of one prefill chunk (cost_model.activation_bytes).

    Raises:
        BudgetError: the budget or the cap is below the least that works; names that least.
    """
    cache_bytes = kv_bytes(
        spec,
        context_tokens=context_tokens,
        batch_size=batch_size,
        bytes_per_element=kv_bytes_per_element,
        kv=kv,
    )
    fixed = FixedCosts(
        base_bytes=base_bytes,
        dense_bytes=dense_bytes,
        kv_bytes=cache_bytes + state_bytes(spec) * batch_size,
        workspace_bytes=reader_bytes + activation_bytes + scale_copies_bytes(layouts),
        context_tokens=context_tokens,
    )
    return divide(spec, layouts, fixed, ram_bytes=ram_bytes, expert_cap=expert_cap)


def divide(
    spec: ModelSpec,
    layouts: Mapping[int, ExpertLayout],
    fixed: FixedCosts,
    *,
    ram_bytes: int,
    expert_cap: int | None = None,
) -> PlacementPlan:
    """Give what ``fixed`` leaves of ``ram_bytes`` to expert slots; see ``plan_placement``."""
    pools = _group_layers(layouts, spec.top_k)
    _refuse_what_cannot_fit(fixed, pools, ram_bytes, expert_cap)
    slots = _grant_slots(pools, ram_bytes - fixed.total_bytes, expert_cap)
    return PlacementPlan(
        ram_bytes=ram_bytes,
        base_bytes=fixed.base_bytes,
        dense_bytes=fixed.dense_bytes,
        kv_bytes=fixed.kv_bytes,
        workspace_bytes=fixed.workspace_bytes,
        context_tokens=fixed.context_tokens,
        pools=_pool_plans(pools, slots, spec.top_k),
    )


def plan_device(
    spec: ModelSpec,
    layouts: Mapping[int, ExpertLayout],
    *,
    vram_bytes: int,
    context_bytes: int,
    choose_dense: Callable[[int], DensePlan] | None = None,
) -> DevicePlan:
    """Divide an accelerator's memory among driver, workspace, dense layers and expert slots.

    Args:
        context_bytes: the driver's own.
        choose_dense: which dense layers go there, given what one token's experts leave of the memory.

    Raises:
        BudgetError: not even one token's experts have room; names the least that would do.
    """
    workspace_bytes = device_workspace_bytes(spec)
    pools = _group_layers(layouts, spec.top_k)
    smallest = context_bytes + workspace_bytes + _least_expert_bytes(pools)
    if vram_bytes < smallest:
        raise BudgetError(
            f"vram={gib(vram_bytes)} ({vram_bytes} bytes) is too small: driver {gib(context_bytes)} + "
            f"workspace {gib(workspace_bytes)} + at least {sum(pool.min_slots for pool in pools)} experts "
            f"{gib(_least_expert_bytes(pools))} = {gib(smallest)}; the smallest vram that would do is "
            f"{smallest} bytes, or run without device="
        )
    dense = None if choose_dense is None else choose_dense(vram_bytes - smallest)
    room_bytes = vram_bytes - context_bytes - workspace_bytes
    if dense is not None:
        room_bytes -= dense.held_bytes + dense.workspace_bytes
        workspace_bytes += dense.workspace_bytes
    slots = _grant_slots(pools, room_bytes, None)
    return DevicePlan(
        vram_bytes, context_bytes, workspace_bytes, _pool_plans(pools, slots, spec.top_k), dense=dense
    )


def _pool_plans(pools: Sequence[_Pool], slots: Sequence[int], top_k: int) -> tuple[PoolPlan, ...]:
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


def smallest_ram_bytes(fixed: FixedCosts, layouts: Mapping[int, ExpertLayout], top_k: int) -> int:
    """Return the least budget that would do: the fixed parts and one token's experts per pool."""
    return fixed.total_bytes + _least_expert_bytes(_group_layers(layouts, top_k))


def cold_cache_warning(plan: PlacementPlan, spec: ModelSpec, policy: str) -> str | None:
    """Return what to tell a user whose cache hits almost nothing; None when there is nothing to tell.

    Under LRU every token walks through all layers, so that an expert is gone before its layer comes
    again unless a whole token's experts stay resident.
    """
    wanted = spec.top_k * len(spec.moe_layers)
    resident = sum(pool.num_slots - pool.num_staging for pool in plan.pools)
    if policy != "lru" or resident >= wanted:
        return None
    return (
        f"policy lru hits almost nothing with {resident} resident experts: one token uses {wanted} "
        f"(top_k {spec.top_k} x {len(spec.moe_layers)} layers); use horizon, the default, or a larger ram"
    )


def budgets_table(
    spec: ModelSpec, layouts: Mapping[int, ExpertLayout], budgets: Sequence[int], fixed: FixedCosts
) -> list[BudgetRow]:
    """Return what each budget of ``budgets`` (bytes) would hold."""
    pools = _group_layers(layouts, spec.top_k)
    smallest = fixed.total_bytes + _least_expert_bytes(pools)
    total_experts = sum(pool.num_experts for pool in pools)
    rows = []
    for ram_bytes in budgets:
        fits = ram_bytes >= smallest
        num_slots = sum(_grant_slots(pools, ram_bytes - fixed.total_bytes, None)) if fits else 0
        share = num_slots / total_experts if total_experts else float(fits)
        rows.append(BudgetRow(ram_bytes, fits, num_slots, share, smallest))
    return rows


def _group_layers(layouts: Mapping[int, ExpertLayout], top_k: int) -> list[_Pool]:
    """Return one pool per slot size, in the order of its first layer."""
    by_size: dict[int, list[ExpertLayout]] = {}
    for _, layout in sorted(layouts.items()):
        by_size.setdefault(layout.slot_bytes, []).append(layout)
    return [
        _Pool(
            slot_bytes=slot_bytes,
            layers=tuple(layout.layer_idx for layout in group),
            num_experts=sum(layout.num_experts for layout in group),
            min_slots=min(top_k, max(layout.num_experts for layout in group)),
        )
        for slot_bytes, group in by_size.items()
    ]


def _least_expert_bytes(pools: Sequence[_Pool]) -> int:
    return sum(pool.min_slots * pool.slot_bytes for pool in pools)


def _grant_slots(pools: Sequence[_Pool], room_bytes: int, expert_cap: int | None) -> list[int]:
    """Return the slots of each pool: the least, then one at a time to the pool with the smallest share.

    Stops at the first grant that does not fit: skipping it for a smaller slot of another pool would
    use a few bytes more, but then a larger budget could take that slot away again.
    """
    slots = [pool.min_slots for pool in pools]
    room_bytes -= _least_expert_bytes(pools)
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


def _refuse_what_cannot_fit(
    fixed: FixedCosts, pools: Sequence[_Pool], ram_bytes: int, expert_cap: int | None
) -> None:
    least_experts = sum(pool.min_slots for pool in pools)
    if expert_cap is not None and expert_cap < least_experts:
        raise BudgetError(
            f"experts={expert_cap} is fewer than one token needs in one layer: the least is {least_experts} "
            f"({len(pools)} sizes of experts); ask for that many or for a larger percentage"
        )
    expert_bytes = _least_expert_bytes(pools)
    smallest = fixed.total_bytes + expert_bytes
    if ram_bytes >= smallest:
        return
    raise BudgetError(
        f"ram={ram_bytes / GIB:.2f} GiB ({ram_bytes} bytes) cannot hold the model: "
        f"libraries {fixed.base_bytes / GIB:.2f} + dense weights {fixed.dense_bytes / GIB:.2f} + "
        f"KV cache ({fixed.context_tokens} tokens) {fixed.kv_bytes / GIB:.2f} + "
        f"workspace {fixed.workspace_bytes / GIB:.2f} + "
        f"at least {least_experts} experts {expert_bytes / GIB:.2f} = {smallest / GIB:.2f} GiB; "
        f"the smallest ram that would do is {_gib_rounded_up(smallest)} GiB ({smallest} bytes), "
        "or lower context"
    )


def _gib_rounded_up(num_bytes: int) -> str:
    """Print GiB so that the figure typed back is enough."""
    hundredths = -(-num_bytes * 100 // GIB)
    return f"{hundredths // 100}.{hundredths % 100:02d}"
