"""Start a model where its last run ended, and keep what this run learns when it is closed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from moe_offload.planning.prefetch_switch import PrefetchSwitch
from moe_offload.residency import warm_start
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.runtime.offload import OffloadHandle
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.checkpoint_key import cache_folder, checkpoint_key


def start_warm(handle: OffloadHandle, cache: ExpertCache, checkpoint: Checkpoint, policy: str) -> None:
    """Begin with the checkpoint's kept state, where there is one; ``handle.close`` keeps the new one."""
    if not warm_start.enabled or not handle.plan.pools:
        return
    key = checkpoint_key(checkpoint)
    path = cache_folder("warm") / f"{key}.npz"
    num_experts = {i: layout.num_experts for i, layout in checkpoint.experts.layouts.items()}
    state = warm_start.read_state(path, key, num_experts)
    if state is not None:
        warm_start.begin_warm(cache, state, policy)
        handle.started_warm = True
    switch = None if handle.prefetcher is None else handle.prefetcher.switch
    if not isinstance(switch, PrefetchSwitch):
        handle.before_close = partial(_keep, cache, policy, path, key)
        return
    setting = _setting(handle, sum(num_experts.values()))
    if state is not None and state.prefetching is not None and state.prefetching[0] == setting:
        switch.begin_with(state.prefetching[1])
    handle.before_close = partial(_keep, cache, policy, path, key, switch, setting)


def _setting(handle: OffloadHandle, num_experts: int) -> str:
    """Return what decides whether prefetching pays: the share of experts in memory, and who predicts."""
    share = sum(pool.num_slots for pool in handle.plan.pools) / num_experts
    return f"{5 * round(20 * share)}% of the experts, {handle.predictor}"


def _keep(
    cache: ExpertCache,
    policy: str,
    path: Path,
    key: str,
    switch: PrefetchSwitch | None = None,
    setting: str = "",
) -> None:
    found = None if switch is None else switch.findings
    state = warm_start.state_of(cache, policy, None if found is None else (setting, found))
    if any(heat.any() for heat in state.heat.values()):  # a model that never ran has learned nothing
        warm_start.write_state(path, key, state)
