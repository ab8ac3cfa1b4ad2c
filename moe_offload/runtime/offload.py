"""The handle on a loaded model: its resources, counters, caches and their end of life."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_offload.config import DECODE_STEP_MAX_TOKENS, ModelSpec
from moe_offload.errors import ConfigError
from moe_offload.planning.correction import RunningCorrection
from moe_offload.planning.plans import PlacementPlan
from moe_offload.profile_store import ProfileInUse
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.huge_pages import HugePages
from moe_offload.residency.memory import MemoryGuard, peak_bytes
from moe_offload.residency.prefetch import Prefetcher
from moe_offload.runtime.belady_window import find_distances
from moe_offload.runtime.context_room import ContextRoom
from moe_offload.runtime.footprint import CLOSED, cache_bytes
from moe_offload.runtime.hybrid_layers import HybridLayers
from moe_offload.runtime.kv_cache import KVCache
from moe_offload.runtime.loaded_models import live_handles
from moe_offload.runtime.timeline import recorded_timeline
from moe_offload.runtime.torch_defaults import float32_on_cpu
from moe_offload.stats import OffloadStats
from moe_offload.storage.expert_store import ExpertStore

if TYPE_CHECKING:
    from moe_offload.runtime.native_step import NativeStep
    from moe_offload.runtime.recorder import RoutingRecorder


class OffloadHandle:
    """``model.offload``: what was planned, what happened, and ``close()``.

    Attributes:
        plan: where the budget went.
        spec: the checkpoint's shape.
        room: tokens of key/value cache, budgeted and used.
        on_prefill: called with (tokens done, tokens in all) while a prompt runs.
        profile: of the machine, and how it was found.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: PlacementPlan,
        cache: ExpertCache | None,
        stats: OffloadStats,
        guard: MemoryGuard,
        store: ExpertStore,
        close_resources: Callable[[], None],
    ) -> None:
        self.spec, self.plan, self.cache, self.reader = spec, plan, cache, store.reader
        self._store = store
        self.on_prefill: Callable[[int, int], None] | None = None
        self._stats, self._guard, self._close_resources = stats, guard, close_resources
        self._lock = threading.RLock()
        self._owner_pid, self._closed = os.getpid(), False
        self._stepping: int | None = None  # the thread that is inside a forward
        self._chunk = (0, 0, 0)
        self.room = ContextRoom(plan.context_tokens, [("full_attention", {})] * spec.num_hidden_layers)
        self.native_step: NativeStep | None = None
        self.make_recorder: Callable[..., RoutingRecorder] | None = None
        self.prefetcher: Prefetcher | None = None
        self.hybrid: HybridLayers | None = None  # experts on a device
        self.huge_pages: HugePages | None = None  # under slots that are read into
        self.before_close: Callable[[], None] | None = None  # keeps what the run has learned
        self.started_warm = False
        self.policy = self.predictor = ""  # by name; the predictor is "none" without prefetch
        self.profile: ProfileInUse | None = None
        self.speeds = RunningCorrection()  # what is expected of disk and layers, and what was measured since
        live_handles.add(self)

    @property
    def context_tokens(self) -> int:
        """Tokens that the key/value cache was budgeted for, over the whole batch."""
        return self.plan.context_tokens

    @property
    def planned_bytes(self) -> int:
        """What this model takes at most, libraries apart."""
        return self.plan.total_bytes - self.plan.base_bytes

    def stats(self, *, belady: bool = False) -> OffloadStats:
        """Return the live counters, peak memory brought up to date.

        Args:
            belady: also find the distance to Belady's rule, by a replay of the last events that are kept
                (ROUTE_LOG_BYTES of them; some 20 us an event). With a device, its own and that of RAM,
                which serves but what the device lacks.
        """
        self._stats.peak_bytes = peak_bytes()
        if self.prefetcher is not None:
            self._stats.prefetch_state = self.prefetcher.describe()
        self._stats.policy, self._stats.predictor = self.policy, self.predictor
        self._stats.profile = "none" if self.profile is None else self.profile.describe()
        if self.hybrid is not None:
            self._stats.device = self.hybrid.stats()
        if belady and self.cache is not None:
            tier = None if self.hybrid is None else self.hybrid.tier
            find_distances(self._stats, self.cache, self.plan.pools, self.spec.num_experts, tier)
        return self._stats

    def account(self, **choices: Any) -> dict[str, Any]:
        """Return ``choices``, the plan and the counters, ready for JSON: what a trace says of its run."""
        return {
            **choices,
            "warm_start": self.started_warm,
            "profile": "none" if self.profile is None else self.profile.describe(),
            "speeds": self.speeds.as_dict(),
            "plan": asdict(self.plan),
            "stats": self.stats().as_dict(),
        }

    def trace(self, *, router_logits: bool = False, router_inputs: bool = False) -> RoutingRecorder:
        """Return a recorder of what the routers choose inside ``with model.offload.trace() as recorder:``.

        ``recorder.trace()`` is the recorded RoutingTrace; moe_offload.trace.write_trace stores it.

        Args:
            router_logits: also what the routers return for every expert (costs a second router call).
            router_inputs: also the hidden states that the routers saw.

        Raises:
            ConfigError: the model has no experts, or was closed.
        """
        self.check_usable()
        if self.make_recorder is None or self.cache is None or not self.plan.pools:
            raise ConfigError("this model has no experts, so there is no routing to record")
        return self.make_recorder(router_logits=router_logits, router_inputs=router_inputs)

    @contextmanager
    def timeline(self, path: str | Path) -> Iterator[None]:
        """Write what CPU, device and link do inside ``with`` to ``path``, in Chrome's trace format.

        Raises:
            ConfigError: no device computes beside the CPU, or the file cannot be written.
        """
        self.check_usable()
        if self.hybrid is None:
            raise ConfigError("a timeline shows the CPU beside a device: load the model with device=")
        with recorded_timeline(self.hybrid, Path(path)):
            yield

    def memory_bytes(self) -> int:
        """What experts and key/value caches may hold now: slots, touched or not, and caches alive."""
        slot_bytes = 0 if self._closed or self.cache is None else self.cache.slot_bytes
        return slot_bytes + cache_bytes(self.room.caches)

    def touched_bytes(self) -> int:
        """What of the plan is in memory for certain: dense weights and slots that hold an expert."""
        return self.plan.dense_bytes + (0 if self.cache is None else self.cache.filled_bytes)

    def close(self) -> None:
        """Give memory, threads and files back, dense weights included. Idempotent.

        A generation under way in another thread ends with a ConfigError at its next token.

        Raises:
            ConfigError: called from inside a forward of this model.
        """
        if self._closed or os.getpid() != self._owner_pid:
            return
        if self._stepping is not None and self._stepping == threading.get_ident():
            raise ConfigError("offload.close() was called inside a forward of the model; call it afterwards")
        self._closed = True
        with self._lock:
            if self.before_close is not None:
                self.before_close()
            self.make_recorder = self.native_step = self.prefetcher = None  # they hold what holds this handle
            self.before_close = None
            if self.hybrid is not None:
                self.hybrid.tier.close()
            self._close_resources()
            self.cache = None
            live_handles.discard(self)

    def check_usable(self) -> None:
        """Raise ConfigError when the model was closed, or crossed a fork (its threads did not)."""
        if self._closed:
            raise ConfigError(CLOSED)
        if os.getpid() != self._owner_pid:
            raise ConfigError(
                f"this model was loaded in process {self._owner_pid} and is used in its fork {os.getpid()}; "
                "its threads did not follow: start the child with 'spawn' and load the model there"
            )

    def check_files(self) -> None:
        """Raise CheckpointError when a file of the checkpoint was written to since it was opened."""
        self._store.check_unchanged()

    def new_cache(self, max_tokens: int | None = None, batch_size: int = 1) -> KVCache:
        """Return an empty key/value cache for ``batch_size`` sequences of up to ``max_tokens``.

        Raises:
            BudgetError: together with the caches still alive it would pass the budgeted context.
            ConfigError: the model was closed, or crossed a fork.
        """
        self.check_usable()
        return self.room.new_cache(max_tokens, batch_size)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """One generation at a time: a second thread waits for the first."""
        self.check_usable()
        with self._lock:
            self.check_usable()
            yield

    @contextmanager
    def step(
        self, num_tokens: int, token_ids: Tensor | None = None, *, is_new_text: bool = False
    ) -> Iterator[None]:
        """Surround one forward: time it, keep torch off the expert threads' cores, watch memory."""
        decoding = num_tokens <= DECODE_STEP_MAX_TOKENS
        started, stall_s = time.perf_counter(), self._stats.stall_s
        if self.cache is not None and self.cache.is_warming:
            self.cache.absorb()
        if self.prefetcher is not None:
            ids = None if token_ids is None else token_ids.reshape(-1).numpy()
            self.prefetcher.begin_step(ids, is_new_text=is_new_text)
        torch_threads = torch.get_num_threads()
        if decoding and torch_threads > 1:
            torch.set_num_threads(1)
        self._stepping = threading.get_ident()
        try:
            with float32_on_cpu():
                yield
        except BaseException as error:
            self._recover_from(error)
            raise
        finally:
            self._stepping = None
            if decoding and torch_threads > 1:
                torch.set_num_threads(torch_threads)
            if not decoding:
                self._stats.prefill_stall_s += self._stats.stall_s - stall_s
            self._count(decoding, num_tokens, time.perf_counter() - started)

    def _recover_from(self, error: BaseException) -> None:
        """Leave the caches so that the next forward runs; most errors have done so on their way up.

        An interrupt comes between any two instructions; a policy may raise in the middle of the books.
        """
        caches = [self.cache, None if self.hybrid is None else self.hybrid.tier.cache]
        midway = any(cache is not None and cache.is_midway for cache in caches)
        if not (midway or isinstance(error, KeyboardInterrupt)):
            return
        if self.prefetcher is not None:
            self.prefetcher.end_run()
        if self.hybrid is not None:
            self.hybrid.tier.recover()
        if self.cache is not None:
            self.cache.recover()

    def _count(self, decoding: bool, num_tokens: int, seconds: float) -> None:
        if decoding:
            self._stats.decode_steps += 1
            self._stats.decode_s += seconds
            if self.huge_pages is not None:
                self._stats.decode_s += self.huge_pages.step_done(seconds)
            if self.prefetcher is not None:
                self.prefetcher.step_done(seconds)
            if self.hybrid is not None and not (self.prefetcher is not None and self.prefetcher.is_trying):
                self.hybrid.step_done(seconds)
        else:
            self._stats.prefill_tokens += num_tokens
            self._stats.prefill_s += seconds

    def _relieve_memory(self) -> None:
        """Give slots back before the machine swaps."""
        if (wanted_bytes := self._guard.bytes_to_give_back()) and self.cache is not None:
            if self.prefetcher is not None:
                self.prefetcher.end_run()
            self.cache.give_back(wanted_bytes)
            self.huge_pages = None  # no memory is to be had for them

    def begin_chunk(self, start: int, num_tokens: int, total_tokens: int) -> None:
        """Note which tokens of the prompt the next layers work on."""
        self._chunk = (start, num_tokens, total_tokens)

    def layer_done(self, layer_idx: int) -> None:
        """Give memory back where others need it; report the prompt's progress, layer by layer."""
        self._relieve_memory()
        if self.cache is not None and self.cache.is_warming:
            self.cache.absorb()
        if self.on_prefill is not None:
            start, num_tokens, total_tokens = self._chunk
            share = (layer_idx + 1) / self.spec.num_hidden_layers
            self.on_prefill(start + int(num_tokens * share), total_tokens)
