"""Which dense layers an accelerator computes: the last ones that fit beside one token's experts, if it pays.

Pure. A dense byte is read for every token and an expert's only sometimes, so dense layers come before
slots. The head comes first (it has no keys and values), then whole layers from the last one on, so that a
token's hidden state goes to the device once and stays there.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_offload.config import gib
from moe_offload.planning.plans import DensePlan


@dataclass(frozen=True)
class DenseSizes:
    """What dense parts take on a device, in bytes, as they lie there."""

    layer_bytes: tuple[int, ...]  # weights, by layer
    head_bytes: int  # final norm and head
    kv_bytes_per_token: tuple[int, ...]  # by layer
    workspace_bytes: int


@dataclass(frozen=True)
class DenseCosts:
    """What a token's dense part costs on either side."""

    cpu_bytes_per_s: float  # of weights and cached rows read
    device_bytes_per_s: float
    layer_s: float  # a synchronisation, and a layer's launches


def place_dense(
    sizes: DenseSizes, *, context_tokens: int, room_bytes: int, costs: DenseCosts | None = None
) -> DensePlan:
    """Return what of a model's dense part goes to a device with ``room_bytes`` for it.

    Args:
        costs: None: whatever fits goes there.
    """
    num_layers = len(sizes.layer_bytes)
    if costs is not None and not pays(sizes, costs):
        return no_dense(num_layers, context_tokens, "the CPU reads its memory as fast")
    room_bytes -= sizes.workspace_bytes
    has_head = sizes.head_bytes <= room_bytes
    weight_bytes = sizes.head_bytes if has_head else 0
    kv_bytes, first = 0, num_layers
    while first > 0:
        weights = weight_bytes + sizes.layer_bytes[first - 1]
        cached = kv_bytes + sizes.kv_bytes_per_token[first - 1] * context_tokens
        if weights + cached > room_bytes:
            break
        weight_bytes, kv_bytes, first = weights, cached, first - 1
    if first == num_layers:
        return no_dense(num_layers, context_tokens, f"no layer fits into {gib(max(0, room_bytes))}")
    reason = "" if first == 0 and has_head else f"{gib(room_bytes)} are left for them"
    return DensePlan(
        num_layers, first, has_head, weight_bytes, kv_bytes, sizes.workspace_bytes, context_tokens, reason
    )


def no_dense(num_layers: int, context_tokens: int, reason: str) -> DensePlan:
    """Return the plan of a device that computes experts alone."""
    return DensePlan(num_layers, num_layers, False, 0, 0, 0, context_tokens, reason)


def pays(sizes: DenseSizes, costs: DenseCosts) -> bool:
    """Whether the average layer's weights are read faster there, its synchronisation counted."""
    layer_bytes = sum(sizes.layer_bytes) / len(sizes.layer_bytes)
    return layer_bytes / costs.device_bytes_per_s + costs.layer_s < layer_bytes / costs.cpu_bytes_per_s
