"""What tune's cost model goes by: the tiers as measured, hit rates and recall on the model's own text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from moe_offload.config import PoolPlan
from moe_offload.header_costs import bytes_per_token
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.tuning import TuningFacts
from moe_offload.planning.tuning_device import DeviceFacts
from moe_offload.replay import replay
from moe_offload.runtime.tuning_run import HISTORIES, Text, TuningRun
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.trace import RoutingTrace
from moe_offload.tune_tiers import Tiers

POLICIES = ("horizon", "ewma", "lru", "lfu", "class_lru", "least_stale")
DEFAULT_POLICY, DEFAULT_PREDICTOR = "horizon", "auto"

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
        hit_rate = _hit_rates(checkpoint, trace, plan.pools, POLICIES)
        say("asking predictors", 0.0)
        predictors = run.predictability((DEFAULT_PREDICTOR, *HISTORIES), text, trace)
    return TuningFacts(
        token=bytes_per_token(checkpoint, 0),
        num_layers=checkpoint.spec.num_hidden_layers,
        ram_bytes_per_s=tiers.kernel_by_threads,
        disk_bytes_per_s=tiers.disk_busy or tiers.disk,
        hit_rate=hit_rate,
        predictors=predictors,
        device=_device_facts(run, tiers, trace, list(hit_rate)),
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
    sizes = {i: layout.expert_bytes for i, layout in checkpoint.experts.layouts.items()}
    return {name: replay(trace, pools, partial(make_policy, name), sizes).hit_rate for name in policies}
