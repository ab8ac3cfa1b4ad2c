"""What tune's cost model goes by: the tiers as measured, hit rates and recall on the model's own text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial

from moe_offload.header_sizes import bytes_per_token
from moe_offload.planning.eviction import EvictionPolicy, make_policy
from moe_offload.planning.plans import PoolPlan
from moe_offload.planning.slots import with_staging
from moe_offload.planning.tuning import DividedHits, Division, TuningFacts
from moe_offload.planning.tuning_device import DeviceFacts
from moe_offload.replay import missed_experts, replay
from moe_offload.residency.policy_fit import automatic_policy
from moe_offload.runtime.tuning_run import HISTORIES, Text, TuningRun
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.trace import RoutingTrace, make_trace
from moe_offload.tune_tiers import Tiers

POLICIES = ("horizon", "ewma", "lru", "lfu", "class_lru", "least_stale")
DEFAULT_POLICY, DEFAULT_PREDICTOR = "horizon", "auto"
STAGING = (1.0, 1.5, 3.0, 4.0)  # beside the default, times top_k

Say = Callable[[str, float], None]  # what is being done, and the share that is done


def tuning_facts(
    run: TuningRun, tiers: Tiers, text: Text, trace: RoutingTrace, *, has_cache: bool, say: Say
) -> TuningFacts:
    """Return what candidates are ranked by.

    Args:
        has_cache: experts may have to leave RAM, so that policies and predictors make a difference there.
    """
    checkpoint, plan = run.checkpoint, run.model.offload.plan
    hit_rate, predictors = {DEFAULT_POLICY: 1.0}, {}
    if has_cache:
        say("replaying eviction policies", 0.0)
        pools = _both(plan.pools, device_pools(run))
        hit_rate = _hit_rates(checkpoint, trace, pools, POLICIES)
        say("asking predictors", 0.0)
        missed = missed_experts(trace, pools, _maker(checkpoint, DEFAULT_POLICY), _expert_bytes(checkpoint))
        predictors = run.predictability((DEFAULT_PREDICTOR, *HISTORIES), text, trace, missed)
    device = _device_facts(run, tiers, trace, list(hit_rate))
    divided: dict[tuple[str, Division], DividedHits] = {}
    if has_cache or device is not None:
        best = max(hit_rate, key=lambda name: hit_rate[name])
        say("replaying divisions of the slots", 0.0)
        divided = _divided(run, trace, dict.fromkeys((DEFAULT_POLICY, best)), has_cache)
    return TuningFacts(
        token=bytes_per_token(checkpoint, 0),
        num_layers=checkpoint.spec.num_hidden_layers,
        ram_bytes_per_s=tiers.kernel_by_threads,
        disk_bytes_per_s=tiers.disk_busy or tiers.disk,
        hit_rate=hit_rate,
        predictors=predictors,
        device=device,
        divided=divided,
    )


def _divided(
    run: TuningRun, trace: RoutingTrace, policies: Iterable[str], has_cache: bool
) -> dict[tuple[str, Division], DividedHits]:
    """Return what policies find where one division of the slots differs from the default."""
    pools, above, checkpoint = run.model.offload.plan.pools, device_pools(run), run.checkpoint
    usual, top_k = Division(), checkpoint.spec.top_k
    others = [replace(usual, ram_staging=staging) for staging in STAGING] if has_cache else []
    if above:
        others += [replace(usual, vram_staging=staging) for staging in STAGING]
        others += [replace(usual, exclusive=False)] if has_cache else []
    found = {}
    for policy in policies:
        for division in others:
            in_ram = with_staging(pools, division.ram_staging, top_k)
            on_device = with_staging(above, division.vram_staging, top_k)
            if division.exclusive:
                in_ram = _both(in_ram, on_device)
            rates = [_hit_rates(checkpoint, trace, tier, [policy])[policy] for tier in (in_ram, on_device)]
            found[policy, division] = DividedHits(*rates)
    return found


def _both(pools: Sequence[PoolPlan], above: Sequence[PoolPlan]) -> tuple[PoolPlan, ...]:
    """Return RAM's pools with the device's residents on top: what is in one of them need not be read."""

    def on_device(pool: PoolPlan) -> int:
        shared = [other for other in above if set(other.layers) & set(pool.layers)]
        return sum(other.num_slots - other.num_staging for other in shared)

    return tuple(
        replace(pool, num_slots=min(pool.num_experts, pool.num_slots + on_device(pool))) for pool in pools
    )


def device_pools(run: TuningRun) -> Sequence[PoolPlan]:
    """Return the slots on the device; none without one."""
    hybrid = run.model.offload.hybrid
    return () if hybrid is None else hybrid.tier.plan.pools


def _device_facts(
    run: TuningRun, tiers: Tiers, trace: RoutingTrace, policies: Sequence[str]
) -> DeviceFacts | None:
    if tiers.device is None:
        return None
    return DeviceFacts(
        top_k=run.checkpoint.spec.top_k,
        expert_s=tiers.device.expert_s,
        copy_s=tiers.device.copy_s,
        step_s=tiers.device.step_s,
        hit_rate=_hit_rates(run.checkpoint, trace, device_pools(run), policies),
    )


def _hit_rates(
    checkpoint: Checkpoint, trace: RoutingTrace, pools: Sequence[PoolPlan], policies: Sequence[str]
) -> dict[str, float]:
    if not pools:
        return dict.fromkeys(policies, 0.0)
    trace = _of_layers(trace, {layer_idx for pool in pools for layer_idx in pool.layers})
    sizes = _expert_bytes(checkpoint)
    return {name: replay(trace, pools, _maker(checkpoint, name), sizes).hit_rate for name in policies}


def _expert_bytes(checkpoint: Checkpoint) -> dict[int, int]:
    return {i: layout.expert_bytes for i, layout in checkpoint.experts.layouts.items()}


def _maker(checkpoint: Checkpoint, policy: str) -> Callable[[], EvictionPolicy]:
    return partial(make_policy, automatic_policy(policy, checkpoint))


def _of_layers(trace: RoutingTrace, layers: Collection[int]) -> RoutingTrace:
    """Return what was routed in these layers: a device may have no kernel for others."""
    kept = [position for position, layer_idx in enumerate(trace.layers) if layer_idx in layers]
    if len(kept) == len(trace.layers):
        return trace
    weights = None if trace.weights is None else trace.weights[:, kept]
    served = [trace.layers[position] for position in kept]
    return make_trace(trace.experts[:, kept], num_experts=trace.num_experts, weights=weights, layers=served)
