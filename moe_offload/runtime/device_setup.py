"""Put a device above RAM: plan its memory, open it, pin what copies come from, measure what experts cost."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from moe_offload.config import DevicePlan, PoolPlan, RuntimeConfig, gib
from moe_offload.errors import ConfigError
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.expert_costs import RunningCosts
from moe_offload.planning.placement import plan_device
from moe_offload.residency.accelerator import Device, memory_of, open_device
from moe_offload.residency.device_tier import DeviceTier
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.runtime.device_costs import SlotsToMeasure, measure_costs
from moe_offload.runtime.executor import ExpertExecutor
from moe_offload.runtime.hybrid import HybridLayer, HybridLayers
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.expert_format import ExpertKey
from moe_offload.storage.expert_store import ExpertStore
from moe_offload.storage.io import Arena


def plan_vram(checkpoint: Checkpoint, config: RuntimeConfig) -> DevicePlan | None:
    """Return where the device's memory goes; None without one.

    Raises:
        BudgetError: too little for one token's experts.
    """
    if config.device is None or not checkpoint.experts.layouts:
        return None
    vram_bytes, context_bytes = memory_of(config.device)
    return plan_device(
        checkpoint.spec, checkpoint.experts.layouts, vram_bytes=vram_bytes, context_bytes=context_bytes
    )


def attach_device(
    executors: Mapping[int, ExpertExecutor],
    checkpoint: Checkpoint,
    config: RuntimeConfig,
    plan: DevicePlan,
    ram: ExpertCache,
    store: ExpertStore,
    arena: Arena,
) -> HybridLayers:
    """Give the executors their share on the device; before anything was read into RAM's slots."""
    assert config.device is not None
    device = open_device(config.device, plan.expert_bytes)
    try:
        _check_kernels(device, executors)
        _pin(device, arena)
        kernels = {i: device.make_kernel(executor.kernel.native) for i, executor in executors.items()}
        tier = DeviceTier(
            device,
            plan,
            checkpoint.experts.layouts,
            ram,
            store,
            lambda: make_policy(config.policy),
            top_k=checkpoint.spec.top_k,
        )
        costs: dict[int, RunningCosts] = {}
        ram_address, vram_address = arena.address, device.address
        for ram_pool, pool in zip(ram.plans, plan.pools, strict=True):
            layer_idx, kernel = pool.layers[0], executors[pool.layers[0]].kernel
            slots = _slots(store, ram_address, vram_address, layer_idx, ram_pool, pool)
            shared = RunningCosts(measure_costs(device, kernel, kernels[layer_idx], slots))
            costs |= dict.fromkeys(pool.layers, shared)
            ram_address, vram_address = ram_address + ram_pool.num_bytes, vram_address + pool.num_bytes
        tier.start_counting()
        layers = HybridLayers(tier, ram, config.scheduler, costs)
        for layer_idx, executor in executors.items():
            executor.hybrid = HybridLayer(layers, layer_idx, executor.kernel, kernels[layer_idx])
    except BaseException:
        device.close()
        raise
    return layers


def _check_kernels(device: Device, executors: Mapping[int, ExpertExecutor]) -> None:
    """Refuse formats that the device cannot compute.

    Raises:
        ConfigError: names them.
    """
    lacking = {
        matrix.ggml_type.name
        for executor in executors.values()
        if not device.has_kernel(executor.kernel.native)
        for matrix in executor.kernel.layout.matrices
    }
    if lacking:
        raise ConfigError(
            f"{device.name} has no kernels for experts in {', '.join(sorted(lacking))}: run without device="
        )


def _pin(device: Device, arena: Arena) -> None:
    pinned_bytes = device.pin(arena.address, arena.num_bytes)
    if pinned_bytes < arena.num_bytes:
        print(
            f"moe-offload: note: the system pins {gib(pinned_bytes)} of {gib(arena.num_bytes)} of RAM's "
            "slots; copies from the rest are slower",
            file=sys.stderr,
        )


def _slots(
    store: ExpertStore, ram: int, vram: int, layer_idx: int, ram_pool: PoolPlan, pool: PoolPlan
) -> SlotsToMeasure:
    def addresses(slot: int) -> tuple[int, ...]:
        return store.addresses(ExpertKey(layer_idx, 0), slot)

    num_slots = min(ram_pool.num_slots, pool.num_slots)
    return SlotsToMeasure(ram, vram, pool.slot_bytes, num_slots, addresses)
