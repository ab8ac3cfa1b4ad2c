"""Fill a skeleton with what was decided: dense weights, slots, executors, and the handle that owns them."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from moe_offload.config import MIB, RuntimeConfig
from moe_offload.errors import CheckpointError
from moe_offload.planning.cost_model import state_tokens
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.plans import DevicePlan, PlacementPlan
from moe_offload.planning.prediction import Predictor
from moe_offload.planning.prefetch_switch import PrefetchSwitch
from moe_offload.planning.prompt_chunks import longest_chunk
from moe_offload.profile_store import ProfileInUse
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.huge_pages import HugePages, why_no_huge_pages
from moe_offload.residency.memory import MemoryGuard, available_bytes
from moe_offload.residency.prefetch import Prefetcher
from moe_offload.runtime import machine_profile, skeleton
from moe_offload.runtime.context_room import ContextRoom
from moe_offload.runtime.dense_loading import load_dense
from moe_offload.runtime.device_setup import attach_device
from moe_offload.runtime.executor import ExpertExecutor
from moe_offload.runtime.expert_kernels import make_kernel
from moe_offload.runtime.footprint import release_weights, trim_heap
from moe_offload.runtime.native_families import native_step_reason
from moe_offload.runtime.native_step import NativeStep
from moe_offload.runtime.offload import OffloadHandle
from moe_offload.runtime.offloaded_class import offloaded_class
from moe_offload.runtime.predictor_choice import PredictorChoice
from moe_offload.runtime.predictor_making import make_predictor
from moe_offload.runtime.recorder import RoutingRecorder
from moe_offload.runtime.warm import start_warm
from moe_offload.stats import OffloadStats
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.expert_store import ExpertStore
from moe_offload.storage.io import Arena, DirectReader, open_reader

GUARD_RESERVE_BYTES = 256 * MIB  # below what "auto" leaves free, so that only others' growth counts
GUARD_INTERVAL_S = 0.5


@dataclass(frozen=True)
class Decided:
    """What ``from_pretrained`` has read, asked and planned before anything large is allocated."""

    checkpoint: Checkpoint
    config: RuntimeConfig
    plan: PlacementPlan
    vram_plan: DevicePlan | None
    choice: PredictorChoice
    profile: ProfileInUse | None


def load(
    model: PreTrainedModel, decided: Decided, progress: Callable[[int, int], None] | None = None
) -> None:
    """Read the dense weights into ``model``, the skeleton, and let it compute its experts from slots.

    Raises:
        CheckpointError: a tensor cannot be read; nothing stays open.
    """
    checkpoint, plan = decided.checkpoint, decided.plan
    reader = open_reader()
    arena = Arena(max(plan.expert_bytes, 4096))
    try:
        store = ExpertStore(checkpoint.experts, checkpoint.files, reader)
        load_dense(model, checkpoint, store, progress)
        skeleton.apply_generation_config(model, checkpoint)
        cache = ExpertCache(
            plan.pools,
            checkpoint.experts.layouts,
            store,
            arena,
            lambda: make_policy(decided.config.policy),
            OffloadStats(ram_bytes=plan.ram_bytes),
            top_k=checkpoint.spec.top_k,
        )
        handle = _make_handle(model, decided, cache, store, arena)
        handle.prefetcher = _make_prefetcher(model, decided, handle, cache)
        executors = _attach(model, decided, handle, handle.prefetcher, cache)
        if decided.vram_plan is not None:
            _attach_device(decided, decided.vram_plan, handle, executors, cache, store, arena)
        elif any(pool.num_staging for pool in plan.pools) and not why_no_huge_pages():
            handle.huge_pages = HugePages(arena, cache.next_slots)
        if decided.config.warm_start:
            start_warm(handle, cache, checkpoint, decided.config.policy)
    except BaseException:
        reader.close()
        arena.close()
        raise


def _make_handle(
    model: PreTrainedModel, decided: Decided, cache: ExpertCache, store: ExpertStore, arena: Arena
) -> OffloadHandle:
    checkpoint, config = decided.checkpoint, decided.config
    alive = weakref.ref(model)

    def close_resources() -> None:
        store.close()
        arena.close()
        closed = alive()
        if closed is not None:
            release_weights(closed)
            trim_heap()

    guard = MemoryGuard(
        available_bytes,
        reserve_bytes=GUARD_RESERVE_BYTES,
        interval_s=GUARD_INTERVAL_S,
        clock=time.monotonic,
    )
    handle = OffloadHandle(checkpoint.spec, decided.plan, cache, cache.stats, guard, store, close_resources)
    handle.room = ContextRoom(
        decided.plan.context_tokens,
        skeleton.cache_layer_types(model),
        config.kv,
        state_tokens(checkpoint.spec, bytes_per_element=model.config.dtype.itemsize, kv=config.kv),
    )
    handle.policy, handle.predictor = config.policy, str(decided.choice)
    handle.profile = decided.profile
    handle.speeds = machine_profile.expectations(decided.profile, checkpoint)
    return handle


def _make_prefetcher(
    model: PreTrainedModel, decided: Decided, handle: OffloadHandle, cache: ExpertCache
) -> Prefetcher:
    layers = sorted(skeleton.experts_modules(model))
    return Prefetcher(
        cache,
        _make_predictor(decided.choice, model, layers, decided.config.prefetch_depth),
        link=partial(_link_counters, handle.reader),
        switch=PrefetchSwitch(),
        speeds=handle.speeds,
    )


def _attach(
    model: PreTrainedModel,
    decided: Decided,
    handle: OffloadHandle,
    prefetcher: Prefetcher,
    cache: ExpertCache,
) -> dict[int, ExpertExecutor]:
    """Give the model its class and its handle, and every experts module its executor."""
    checkpoint, config = decided.checkpoint, decided.config
    layouts = checkpoint.experts.layouts
    executors: dict[int, ExpertExecutor] = {}
    for layer_idx, experts in skeleton.experts_modules(model).items():
        kernel = make_kernel(experts, layouts[layer_idx])
        experts.moe_offload_executor = ExpertExecutor(kernel, layer_idx, cache, prefetcher, handle.layer_done)
        executors[layer_idx] = experts.moe_offload_executor
    model_class: Any = type(model)
    model.__class__ = offloaded_class(model_class)
    model.offload = handle
    if native_step_reason(checkpoint.config) is None:
        longest = longest_chunk(checkpoint.spec, checkpoint.config, decided.plan.context_tokens)
        handle.native_step = NativeStep(model, executors, config.kv, longest)
    handle.make_recorder = partial(
        RoutingRecorder,
        executors,
        partial(skeleton.router_of, weakref.proxy(model)),
        checkpoint.spec.num_experts,
        checkpoint.path.name,
        partial(
            handle.account,
            policy=config.policy,
            prefetch=prefetcher.enabled,
            expert_bytes={str(i): layout.expert_bytes for i, layout in layouts.items()},
        ),
    )
    weakref.finalize(model, handle.close)
    return executors


def _attach_device(
    decided: Decided,
    vram_plan: DevicePlan,
    handle: OffloadHandle,
    executors: Mapping[int, ExpertExecutor],
    cache: ExpertCache,
    store: ExpertStore,
    arena: Arena,
) -> None:
    handle.hybrid = attach_device(
        executors,
        decided.checkpoint,
        decided.config,
        vram_plan,
        cache,
        store,
        arena,
        handle.speeds,
        handle.native_step,
    )
    ram_lacks_nothing = all(pool.num_staging == 0 for pool in decided.plan.pools)
    serves_all_layers = not handle.hybrid.left_to_cpu
    if ram_lacks_nothing and serves_all_layers and handle.prefetcher is not None:  # look ahead for VRAM
        handle.hybrid.let_prefetch(handle.prefetcher)


def _link_counters(reader: DirectReader) -> tuple[int, float]:
    counters = reader.counters()
    return int(counters["timed_bytes"]), counters["busy_seconds"]


def _make_predictor(
    choice: PredictorChoice, model: PreTrainedModel, layers: list[int], depth: int | None
) -> Predictor | None:
    """Return the predictor; the default goes without where a family's routers cannot be asked."""
    try:
        return make_predictor(choice, model, layers, depth=depth)
    except CheckpointError as error:
        print(f"moe-offload: nothing is read ahead: {error}", file=sys.stderr)
        return None
