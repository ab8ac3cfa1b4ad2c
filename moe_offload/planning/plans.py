"""What placement answered: where the budgets of RAM and of a device go, in bytes; frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_offload.config import STAGING_PER_TOP_K, gib


@dataclass(frozen=True)
class DensePlan:
    """Which dense layers run on an accelerator, and what they take there, in bytes.

    The last layers of the model, so that a token crosses to the device once; the head if it fits.
    """

    num_layers: int  # of the model
    first_layer: int  # this one and all behind it; num_layers: none
    has_head: bool
    weight_bytes: int
    kv_bytes: int  # of context_tokens
    workspace_bytes: int
    context_tokens: int
    reason: str = ""  # why it is not all of the model

    @property
    def is_empty(self) -> bool:
        """Whether nothing of it runs there."""
        return self.first_layer == self.num_layers

    @property
    def held_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    def describe(self) -> str:
        """Return which layers, and why not more."""
        why = f" ({self.reason})" if self.reason else ""
        if self.is_empty:
            return f"dense layers on the CPU{why}"
        head = " and the head" if self.has_head else ""
        layers = f"{self.num_layers - self.first_layer} of {self.num_layers} dense layers"
        return f"{layers}{head} on the device{why}"


@dataclass(frozen=True)
class DevicePlan:
    """Where an accelerator's memory goes, in bytes. RAM holds dense weights and key/value cache as well."""

    vram_bytes: int
    context_bytes: int  # the driver's own
    workspace_bytes: int  # inputs, intermediates and rows of one prefill chunk
    pools: tuple[PoolPlan, ...]
    exclusive: bool = True  # what is here leaves RAM first
    dense: DensePlan | None = None  # None: nothing but experts

    @property
    def expert_bytes(self) -> int:
        return expert_bytes(self.pools)

    @property
    def dense_bytes(self) -> int:
        """Return what dense weights, keys and values take."""
        return 0 if self.dense is None else self.dense.held_bytes

    def describe(self) -> str:
        """Return where the memory goes, in one line."""
        parts = [
            f"driver {gib(self.context_bytes)}",
            f"workspace {gib(self.workspace_bytes)}",
            _describe_experts(self.pools),
        ]
        if self.dense is not None:
            sizes = f"{gib(self.dense.weight_bytes)}, keys and values {gib(self.dense.kv_bytes)}: "
            parts.append(("" if self.dense.is_empty else sizes) + self.dense.describe())
        return f"{gib(self.vram_bytes)} at most: {', '.join(parts)}"


@dataclass(frozen=True)
class PoolPlan:
    """Slots of one byte size, shared by the layers whose experts have that size.

    Of ``num_slots`` slots, ``num_staging`` are kept for reads in flight: a step's misses and
    prefetched experts land there, and a slot becomes staging when its expert is evicted. Zero
    staging means that every expert of the layers has a slot of its own.
    """

    slot_bytes: int
    layers: tuple[int, ...]
    num_experts: int  # over all the layers
    num_slots: int
    num_staging: int
    staging_per_top_k: float = STAGING_PER_TOP_K  # what num_staging was asked to be

    @property
    def num_bytes(self) -> int:
        return self.slot_bytes * self.num_slots


@dataclass(frozen=True)
class PlacementPlan:
    """Where the budget goes, in bytes. The parts add up to ``total_bytes`` <= ``ram_bytes``."""

    ram_bytes: int
    base_bytes: int  # interpreter and libraries, measured
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int  # activations of one prefill chunk, logits, reader buffers
    context_tokens: int
    pools: tuple[PoolPlan, ...]

    @property
    def expert_bytes(self) -> int:
        return expert_bytes(self.pools)

    @property
    def total_bytes(self) -> int:
        return self.base_bytes + self.dense_bytes + self.kv_bytes + self.workspace_bytes + self.expert_bytes

    def describe(self) -> str:
        """Return where the budget goes, in one line."""
        parts = [
            f"libraries {gib(self.base_bytes)}",
            f"dense weights {gib(self.dense_bytes)}",
            f"key/value cache {gib(self.kv_bytes)} for {self.context_tokens} tokens",
            f"workspace {gib(self.workspace_bytes)}",
            _describe_experts(self.pools),
        ]
        return f"{gib(self.ram_bytes)} at most; planned {gib(self.total_bytes)}: {', '.join(parts)}"


def expert_bytes(pools: Sequence[PoolPlan]) -> int:
    """Return what all slots take."""
    return sum(pool.num_bytes for pool in pools)


def _describe_experts(pools: Sequence[PoolPlan]) -> str:
    slots, experts = (sum(getattr(pool, name) for pool in pools) for name in ("num_slots", "num_experts"))
    return f"experts {gib(expert_bytes(pools))} ({slots} of {experts})"
