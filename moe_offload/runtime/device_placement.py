"""Where an accelerator's memory goes, from headers alone: the one answer of the runtime and of `plan`.

Imports no torch and asks no device: what memory there is and what its driver takes is the caller's to say.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from moe_offload.config import DeviceChoice, RuntimeConfig
from moe_offload.header_costs import resolve_context
from moe_offload.header_sizes import dense_sizes
from moe_offload.planning.dense_placement import no_dense, place_dense
from moe_offload.planning.placement import plan_device
from moe_offload.planning.plans import DensePlan, DevicePlan
from moe_offload.planning.slots import with_staging
from moe_offload.runtime.native_families import native_step_reason
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.expert_format import FAST_TYPES, FLOAT_TYPES


def place_on_device(
    checkpoint: Checkpoint, config: RuntimeConfig, vram_bytes: int, context_bytes: int, bytes_per_element: int
) -> DevicePlan:
    """Divide ``vram_bytes`` of ``config.device`` among driver, workspace, dense layers and expert slots.

    Args:
        context_bytes: the driver's own.
        bytes_per_element: of a cached number, and of a weight that is not packed.

    Raises:
        BudgetError: too little for one token's experts; names the least that would do.
    """
    plan = plan_device(
        checkpoint.spec,
        checkpoint.experts.layouts,
        vram_bytes=vram_bytes,
        context_bytes=context_bytes,
        choose_dense=partial(choose_dense, checkpoint, config, bytes_per_element),
    )
    pools = with_staging(plan.pools, config.vram_staging, checkpoint.spec.top_k)
    return replace(plan, pools=pools, exclusive=config.exclusive)


def choose_dense(
    checkpoint: Checkpoint, config: RuntimeConfig, bytes_per_element: int, room_bytes: int
) -> DensePlan:
    """Return which dense layers go to the device, given the memory that is left for them."""
    assert config.device is not None
    context_tokens = resolve_context(checkpoint, config.context_tokens)
    sizes = dense_sizes(checkpoint, bytes_per_element, context_tokens, config.kv)
    reason = why_no_dense(checkpoint, config.device)
    if reason:
        return no_dense(len(sizes.layer_bytes), context_tokens, reason)
    return place_dense(sizes, context_tokens=context_tokens, room_bytes=room_bytes)


def why_no_dense(checkpoint: Checkpoint, device: DeviceChoice) -> str:
    """Return why none of the dense layers may go to the device; "" where they may."""
    if device.dense == "off":
        return "dense=off"
    if device.kind == "emulated" and device.dense != "on":
        return "an emulated device is no faster; dense=on takes it all the same"
    types = {info.ggml_type for info in checkpoint.dense.values() if len(info.shape) == 2}
    slow = sorted(t.name for t in types if t not in FAST_TYPES and t not in FLOAT_TYPES)
    if slow:
        return f"no kernel for {', '.join(slow)}"
    return native_step_reason(checkpoint.config) or ""
