"""Where a memory budget goes: fixed parts first, then slots for experts, or a refusal with the numbers.

Pure: ints in, a PlacementPlan out; slots.py divides what is left for experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moe_offload.config import GIB, ModelSpec, gib
from moe_offload.errors import BudgetError
from moe_offload.planning.cost_model import (
    device_workspace_bytes,
    kv_bytes,
    scale_copies_bytes,
    state_bytes,
)
from moe_offload.planning.plans import DensePlan, DevicePlan, PlacementPlan
from moe_offload.planning.slots import ExpertPool, grant_slots, group_layers, least_expert_bytes, pool_plans
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
    pools = group_layers(layouts, spec.top_k)
    _refuse_what_cannot_fit(fixed, pools, ram_bytes, expert_cap)
    slots = grant_slots(pools, ram_bytes - fixed.total_bytes, expert_cap)
    return PlacementPlan(
        ram_bytes=ram_bytes,
        base_bytes=fixed.base_bytes,
        dense_bytes=fixed.dense_bytes,
        kv_bytes=fixed.kv_bytes,
        workspace_bytes=fixed.workspace_bytes,
        context_tokens=fixed.context_tokens,
        pools=pool_plans(pools, slots, spec.top_k),
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
    pools = group_layers(layouts, spec.top_k)
    smallest = context_bytes + workspace_bytes + least_expert_bytes(pools)
    if vram_bytes < smallest:
        raise BudgetError(
            f"vram={gib(vram_bytes)} ({vram_bytes} bytes) is too small: driver {gib(context_bytes)} + "
            f"workspace {gib(workspace_bytes)} + at least {sum(pool.min_slots for pool in pools)} experts "
            f"{gib(least_expert_bytes(pools))} = {gib(smallest)}; the smallest vram that would do is "
            f"{smallest} bytes, or run without device="
        )
    dense = None if choose_dense is None else choose_dense(vram_bytes - smallest)
    room_bytes = vram_bytes - context_bytes - workspace_bytes
    if dense is not None:
        room_bytes -= dense.held_bytes + dense.workspace_bytes
        workspace_bytes += dense.workspace_bytes
    slots = grant_slots(pools, room_bytes, None)
    return DevicePlan(
        vram_bytes, context_bytes, workspace_bytes, pool_plans(pools, slots, spec.top_k), dense=dense
    )


def smallest_ram_bytes(fixed: FixedCosts, layouts: Mapping[int, ExpertLayout], top_k: int) -> int:
    """Return the least budget that would do: the fixed parts and one token's experts per pool."""
    return fixed.total_bytes + least_expert_bytes(group_layers(layouts, top_k))


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
    pools = group_layers(layouts, spec.top_k)
    smallest = fixed.total_bytes + least_expert_bytes(pools)
    total_experts = sum(pool.num_experts for pool in pools)
    rows = []
    for ram_bytes in budgets:
        fits = ram_bytes >= smallest
        num_slots = sum(grant_slots(pools, ram_bytes - fixed.total_bytes, None)) if fits else 0
        share = num_slots / total_experts if total_experts else float(fits)
        rows.append(BudgetRow(ram_bytes, fits, num_slots, share, smallest))
    return rows


def _refuse_what_cannot_fit(
    fixed: FixedCosts, pools: Sequence[ExpertPool], ram_bytes: int, expert_cap: int | None
) -> None:
    least_experts = sum(pool.min_slots for pool in pools)
    if expert_cap is not None and expert_cap < least_experts:
        raise BudgetError(
            f"experts={expert_cap} is fewer than one token needs in one layer: the least is {least_experts} "
            f"({len(pools)} sizes of experts); ask for that many or for a larger percentage"
        )
    expert_bytes = least_expert_bytes(pools)
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
