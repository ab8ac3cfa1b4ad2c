"""Put a device above RAM: plan its memory, open it, pin what copies come from, measure what experts cost."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from moe_offload.config import DeviceChoice, RuntimeConfig, gib
from moe_offload.errors import ConfigError
from moe_offload.planning.correction import RunningCorrection
from moe_offload.planning.cost_model import DEVICE_ALIGNMENT, aligned
from moe_offload.planning.dense_prompts import PromptCosts
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.expert_costs import RunningCosts
from moe_offload.planning.placement import plan_device
from moe_offload.planning.plans import DevicePlan, PoolPlan
from moe_offload.residency.accelerator import Device, memory_of, open_device
from moe_offload.residency.device_tier import DeviceTier
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.runtime.device_costs import SlotsToMeasure, measure_costs
from moe_offload.runtime.device_placement import place_on_device
from moe_offload.runtime.executor import ExpertExecutor
from moe_offload.runtime.hybrid import HybridLayer
from moe_offload.runtime.hybrid_layers import HybridLayers
from moe_offload.runtime.native_step import NativeStep
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.expert_format import ExpertKey
from moe_offload.storage.expert_store import ExpertStore
from moe_offload.storage.io import Arena


def plan_vram(checkpoint: Checkpoint, config: RuntimeConfig, bytes_per_element: int) -> DevicePlan | None:
    """Return where the device's memory goes; None without one.

    Args:
        bytes_per_element: of a cached number, and of a weight that is not packed.

    Raises:
        BudgetError: too little for one token's experts.
    """
    if config.device is None or not checkpoint.experts.layouts:
        return None
    vram_bytes, context_bytes = memory_of(config.device)
    return place_on_device(checkpoint, config, vram_bytes, context_bytes, bytes_per_element)


def attach_device(
    executors: Mapping[int, ExpertExecutor],
    checkpoint: Checkpoint,
    config: RuntimeConfig,
    plan: DevicePlan,
    ram: ExpertCache,
    store: ExpertStore,
    arena: Arena,
    speeds: RunningCorrection,
    native_step: NativeStep | None,
) -> HybridLayers:
    """Give the executors their share on the device; before anything was read into RAM's slots.

    Layers in a format that the device has no kernel for stay on the CPU, and their part of the device's
    memory goes to the others.

    Args:
        speeds: the run's, which the scheduler asks and every step corrects.

    Raises:
        ConfigError: the device has a kernel for no layer.
    """
    assert config.device is not None
    device, plan, lacking = _open(config.device, plan, executors, checkpoint)
    try:
        _pin(device, arena)
        ram.unpin = device.unpin
        served = {i: executor for i, executor in executors.items() if i not in lacking}
        kernels = {i: device.make_kernel(executor.kernel.native) for i, executor in served.items()}
        top_k, layouts = checkpoint.spec.top_k, checkpoint.experts.layouts
        tier = DeviceTier(device, plan, layouts, ram, store, lambda: make_policy(config.policy), top_k=top_k)
        slots = _slots_to_measure(plan, ram, store, arena, device)
        costs = _measured_costs(device, plan, served, kernels, slots, speeds)
        tier.start_counting()
        layers = HybridLayers(tier, ram, config.scheduler, costs, top_k)
        layers.left_to_cpu = _say_left_to_cpu(device.name, lacking)
        for layer_idx, executor in served.items():
            executor.hybrid = HybridLayer(layers, layer_idx, executor.kernel, kernels[layer_idx])
        if native_step is not None and plan.dense is not None and not plan.dense.is_empty:
            address = device.address + aligned(plan.expert_bytes)
            native_step.use_device(device, plan.dense, address, _prompt_costs(config.device, layers, served))
            assert native_step.dense is not None
            layers.describe_dense = native_step.dense.describe
    except BaseException:
        device.close()
        raise
    return layers


def _open(
    choice: DeviceChoice, plan: DevicePlan, executors: Mapping[int, ExpertExecutor], checkpoint: Checkpoint
) -> tuple[Device, DevicePlan, dict[int, str]]:
    """Return the device, the plan for what it has kernels for, and the layers left out with their formats."""
    device = open_device(choice, aligned(plan.expert_bytes) + plan.dense_bytes + DEVICE_ALIGNMENT)
    try:
        lacking = _formats_without_kernel(device, executors)
        if not lacking:
            return device, plan, lacking
        plan = _plan_without(lacking, checkpoint, plan)
    except BaseException:
        device.close()
        raise
    device.close()
    return open_device(choice, plan.expert_bytes), plan, lacking


def _measured_costs(
    device: Device,
    plan: DevicePlan,
    served: Mapping[int, ExpertExecutor],
    kernels: Mapping[int, Any],
    slots: Mapping[int, SlotsToMeasure],
    speeds: RunningCorrection,
) -> dict[int, RunningCosts]:
    """Return what an expert costs on either side, by layer; layers of one pool share it."""
    costs: dict[int, RunningCosts] = {}
    for pool in plan.pools:
        layer_idx = pool.layers[0]
        size = f" of {pool.slot_bytes} bytes" if len(plan.pools) > 1 else ""
        measured = measure_costs(device, served[layer_idx].kernel, kernels[layer_idx], slots[layer_idx])
        if plan.dense is not None and not plan.dense.is_empty:  # rows stay there, and nobody waits for them
            measured = replace(measured, gpu_start_s=0.0)
        costs |= dict.fromkeys(pool.layers, RunningCosts(measured, speeds, size))
    return costs


def _prompt_costs(
    choice: DeviceChoice, layers: HybridLayers, served: Mapping[int, ExpertExecutor]
) -> PromptCosts | None:
    """Return what prompts' dense layers are judged by; None where they were asked for."""
    if choice.dense == "on":
        return None
    layer_idx = min(served)
    layout = served[layer_idx].kernel.layout
    num_weights = sum(matrix.rows * matrix.cols for matrix in layout.matrices)
    return PromptCosts(layers.costs[layer_idx], num_weights, layers.tier.cache.expert_bytes(layer_idx))


def _formats_without_kernel(device: Device, executors: Mapping[int, ExpertExecutor]) -> dict[int, str]:
    """Return the layers that the device cannot compute, and their experts' formats.

    Raises:
        ConfigError: it can compute none.
    """
    lacking = {
        i: "/".join(sorted({matrix.ggml_type.name for matrix in executor.kernel.layout.matrices}))
        for i, executor in executors.items()
        if not has_kernel(device, executor)
    }
    if len(lacking) == len(executors):
        formats = ", ".join(sorted(set(lacking.values())))
        raise ConfigError(f"{device.name} has no kernels for experts in {formats}: run without device=")
    return lacking


def has_kernel(device: Device, executor: ExpertExecutor) -> bool:
    """Whether the device can compute a layer's experts."""
    return device.has_kernel(executor.kernel.native)


def _plan_without(lacking: Mapping[int, str], checkpoint: Checkpoint, plan: DevicePlan) -> DevicePlan:
    layouts = {i: layout for i, layout in checkpoint.experts.layouts.items() if i not in lacking}
    return plan_device(checkpoint.spec, layouts, vram_bytes=plan.vram_bytes, context_bytes=plan.context_bytes)


def _say_left_to_cpu(device_name: str, lacking: Mapping[int, str]) -> str:
    """Tell the user which layers the CPU computes alone, and why; returns it, "" for none."""
    if not lacking:
        return ""
    formats = ", ".join(sorted(set(lacking.values())))
    layers = f"layer{'s' * (len(lacking) > 1)} {', '.join(map(str, sorted(lacking)))}"
    said = f"the experts of {layers} stay on the CPU: {device_name} has no kernel for {formats}"
    print(f"moe-offload: note: {said}", file=sys.stderr)
    return said


def _slots_to_measure(
    plan: DevicePlan, ram: ExpertCache, store: ExpertStore, arena: Arena, device: Device
) -> dict[int, SlotsToMeasure]:
    """Return where each pool's slots begin on both sides, by the pool's first layer."""
    found: dict[int, SlotsToMeasure] = {}
    ram_slots, vram_address = _first_slots(ram, arena.address), device.address
    for pool in plan.pools:
        layer_idx = pool.layers[0]
        ram_address, ram_pool = ram_slots[layer_idx]
        num_slots = min(ram_pool.num_slots, pool.num_slots)
        addresses = partial(store.addresses, ExpertKey(layer_idx, 0))
        found[layer_idx] = SlotsToMeasure(ram_address, vram_address, pool.slot_bytes, num_slots, addresses)
        vram_address += pool.num_bytes
    return found


def _first_slots(ram: ExpertCache, address: int) -> dict[int, tuple[int, PoolPlan]]:
    """Return for each layer the address of its pool in RAM, and the pool."""
    found: dict[int, tuple[int, PoolPlan]] = {}
    for pool in ram.plans:
        found |= dict.fromkeys(pool.layers, (address, pool))
        address += pool.num_bytes
    return found


def _pin(device: Device, arena: Arena) -> None:
    pinned_bytes = device.pin(arena.address, arena.num_bytes)
    if pinned_bytes < arena.num_bytes:
        print(
            f"moe-offload: note: the system pins {gib(pinned_bytes)} of {gib(arena.num_bytes)} of RAM's "
            "slots; copies from the rest are slower",
            file=sys.stderr,
        )
