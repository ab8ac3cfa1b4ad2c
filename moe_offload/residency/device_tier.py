"""The experts in a device's memory: a cache over the one in RAM, filled by copies over the link.

Book-keeping is ExpertCache's, as for RAM over disk. Here is what differs: an expert that misses runs on
the CPU and is copied only when it missed before (or while slots are free), a few copies at a time, behind
those that a step waits for; and a device may fail, after which RAM and the CPU go on alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from moe_offload.errors import DeviceError
from moe_offload.planning.admission import SecondMiss, most_under_way
from moe_offload.planning.eviction import EvictionPolicy
from moe_offload.planning.plans import DevicePlan
from moe_offload.residency.accelerator import Device, DeviceFault
from moe_offload.residency.device_source import DeviceSource
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.slot_entry import Entry, ExpertSource, SlotState
from moe_offload.residency.slot_pool import RoutedStep
from moe_offload.stats import OffloadStats
from moe_offload.storage.expert_format import ExpertKey, ExpertLayout

MOST_FAILURES = 8  # in a row, then the device is left alone
SHARE_TO_GIVE_BACK = 8  # one part in so many of the slots, where a launch found no memory


class DeviceCache(ExpertCache):
    """An ExpertCache whose hints are taken only where their bytes are in RAM."""

    ram: ExpertCache
    keeps_log = False
    _num_shown = 0  # by show_arrived
    _staged: Sequence[Entry] = []  # what it looked at then, if all of that had arrived

    def prefetch(self, keys: Iterable[ExpertKey], *, after_layer: int | None = None) -> None:
        super().prefetch([key for key in keys if self.ram.is_resident(key)], after_layer=after_layer)

    def show_arrived(self, *, shown: bool) -> None:
        """Let native code use what has arrived before a step asked for it, or no more; between steps."""
        if not shown and not self._num_shown:
            return
        staged = list[Entry]()
        for pool in self._pools:
            staged += pool.staged.values()
        if shown and staged == self._staged:  # a token's time is short, and nearly always nothing came
            return
        self._num_shown = sum(pool.show_arrived(shown=shown) for pool in self._pools)
        self._staged = staged if shown and self._num_shown == len(staged) else []

    def used_natively(
        self,
        layer_idx: int,
        expert_ids: Sequence[int],
        weights: Sequence[float],
        here: Sequence[int],
        copied: Sequence[tuple[int, int]],
    ) -> None:
        """Count a layer as ``used`` does; those ``here`` that were shown become residents by it.

        Args:
            here: the experts that ran on the device, ``copied`` among them.
        """
        pool = self._pool_of[layer_idx]
        if not copied and not self._num_shown:  # nearly always
            self.stats.hits += len(here)
            return pool.routed(layer_idx, expert_ids, weights)
        arrived = pool.admit_arrived(layer_idx, here) if self._num_shown else 0
        self.stats.prefetch_hits += arrived
        self.used(layer_idx, expert_ids, weights, len(here) - len(copied) - arrived, copied)
        if arrived:
            self._evict_excess(pool)

    def books_in_one(self, steps: Sequence[RoutedStep], here: Sequence[Sequence[int]]) -> bool:
        """Whether ``used_in_one`` may be called: nothing that arrived becomes a resident by these layers.

        Args:
            here: by step, the experts that ran on the device; nothing where none did.
        """
        if len(self._pools) != 1:
            return False
        if not here or not self._num_shown:
            return True
        by_layer = {layer_idx: ids for (layer_idx, _, _), ids in zip(steps, here, strict=True)}
        return not any(key.expert_id in by_layer.get(key.layer_idx, ()) for key in self._pools[0].staged)

    def used_in_one(self, steps: list[RoutedStep], num_here: int) -> None:
        """Count layers that nobody came or left between, ``num_here`` of whose experts ran on the device."""
        self.stats.hits += num_here
        self._pools[0].routed_steps(steps)

    @property
    def num_residents(self) -> int:
        """How many experts are here, or about to be."""
        return sum(len(pool.residents) + len(pool.warming) for pool in self._pools)

    def num_under_way(self, layer_idx: int) -> int:
        """Return how many copies are queued or under way, for the pool of a layer."""
        pool = self._pool_of[layer_idx]
        in_flight = [entry for entry in pool.staged.values() if entry.state is SlotState.IN_FLIGHT]
        return sum(not pool.store.done(entry.ticket) for entry in in_flight)


class DeviceTier:
    """``cache`` of a device, above ``ram``.

    Attributes:
        stats: of the device's cache; a miss is an expert that had to be copied or ran on the CPU.
        off_reason: why the device is not used any more; empty while it is.
        replaces: whether misses are copied for later steps also where another expert has to leave.
    """

    def __init__(
        self,
        device: Device,
        plan: DevicePlan,
        layouts: Mapping[int, ExpertLayout],
        ram: ExpertCache,
        store: ExpertSource,
        policy_factory: Callable[[], EvictionPolicy],
        *,
        top_k: int,
    ) -> None:
        self.device, self.plan, self.ram = device, plan, ram
        self.stats = OffloadStats(ram_bytes=plan.vram_bytes)
        self.source = DeviceSource(device, ram, store, layouts)
        self.cache = DeviceCache(
            plan.pools, layouts, self.source, device, policy_factory, self.stats, top_k=top_k
        )
        self.cache.ram = ram
        self._second_miss = SecondMiss(sum(pool.num_slots for pool in plan.pools))
        self._link_looked_at = time.perf_counter(), 0.0  # when, and its busy seconds by then
        self.replaces = True
        self.off_reason = ""
        self._failures = 0
        self._layers = [pool.layers[0] for pool in plan.pools]
        self._first_layer = {i: pool.layers[0] for pool in plan.pools for i in pool.layers}
        self._counters_at_load = dict.fromkeys(device.counters(), 0.0)
        ram.put_below(self.cache, self.cache.finish_reads, exclusive=plan.exclusive)

    @property
    def is_on(self) -> bool:
        return not self.off_reason

    def link_counters(self) -> tuple[int, float]:
        """Return the bytes copied so far, and the seconds in which something was being copied."""
        now = self.device.counters()
        return int(now["bytes_copied"]), now["busy_seconds"]

    def start_counting(self) -> None:
        """Leave out of the counters what was done so far."""
        self._counters_at_load = self.device.counters()

    @property
    def is_filled(self) -> bool:
        """Whether no slot is left for a miss, or every expert is there."""
        return not self.has_room or self.cache.has_every_expert

    @property
    def num_residents(self) -> int:
        """How many experts the device has."""
        return self.cache.num_residents

    def device_counters(self) -> dict[str, float]:
        """Return the native counters since the model was loaded: without what was measured before."""
        now = self.device.counters()
        return {name: value - self._counters_at_load[name] for name, value in now.items()}

    @property
    def has_room(self) -> bool:
        """Whether some pool has a slot for a miss."""
        return any(map(self.cache.has_room, self._layers))

    @property
    def wants_misses(self) -> bool:
        """Whether what missed may be copied: something may leave, or there is room."""
        return self.replaces or self.has_room

    def ran_on_cpu(self, keys: Sequence[ExpertKey]) -> None:
        """Copy some of the misses that the CPU computed, those worth it; between steps.

        Args:
            keys: none where nobody ``wants_misses``.
        """
        if not keys:
            return
        with_room = {i for i in self._layers if self.cache.has_room(i)}
        pool_of = self._first_layer
        worth = [key for key in keys if pool_of[key.layer_idx] in with_room or self._was_missed_before(key)]
        if worth:
            self._copy_for_later(worth)

    def _was_missed_before(self, key: ExpertKey) -> bool:
        return self.replaces and self._second_miss.admits(key)

    def _copy_for_later(self, keys: Sequence[ExpertKey]) -> None:
        most = self._most_under_way(keys[0].layer_idx)
        left = {i: most - self.cache.num_under_way(i) for i in self._layers}
        for key in keys:
            pool = self._first_layer[key.layer_idx]
            has_room = self.cache.has_room(pool)
            if left[pool] <= 0:
                if not has_room:
                    self._second_miss.remember(key)
            elif self.ram.is_resident(key):
                left[pool] -= 1
                (self.cache.preload if has_room else self.cache.prefetch)([key])

    def _most_under_way(self, layer_idx: int) -> int:
        """Return how many copies for later may be under way, by what the link did since the last look."""
        num_bytes, busy_s = self.link_counters()
        now, (then, busy_then_s) = time.perf_counter(), self._link_looked_at
        self._link_looked_at = now, busy_s
        copy_s = self.cache.expert_bytes(layer_idx) * busy_s / max(1, num_bytes)
        return most_under_way(now - then - (busy_s - busy_then_s), copy_s)

    def fill(self, layer_idx: int, expert_ids: Iterable[int]) -> None:
        """Copy experts that a prompt used, the most used first, where slots are free: the layer's share."""
        self.cache.preload_share(
            layer_idx, [i for i in expert_ids if self.ram.is_resident(ExpertKey(layer_idx, i))]
        )

    def hold_only(self, keys: Sequence[ExpertKey]) -> None:
        """Have these experts alone, as far as RAM has their bytes; between steps, waits for copies."""
        self.cache.keep_only(keys)
        self.cache.preload([key for key in keys if self.ram.is_resident(key)])
        self.cache.finish_reads()
        self.absorb()

    def worked(self) -> None:
        """Take note of a step on the device that went well."""
        self._failures = 0

    def failed(self, error: DeviceError) -> str:
        """Take note of a failure, between steps; returns what is done about it, for the user, or ""."""
        self._failures += 1
        if error.fault == DeviceFault.LOST or self._failures >= MOST_FAILURES:
            self.leave(str(error))
            return f"{error}; the CPU goes on alone"
        if error.fault == DeviceFault.NO_MEMORY:
            given = self.cache.give_back(self.cache.slot_bytes // SHARE_TO_GIVE_BACK)
            if not given:
                self.leave(str(error))
            return f"{error}; {given} bytes of its slots were given back"
        return ""

    def leave(self, reason: str) -> None:
        """Use the device no more."""
        if self.is_on:
            self.off_reason = reason
            self.ram.stand_alone()

    def recover(self) -> None:
        """Make the books agree after an interrupt, wherever it came; before RAM's; never blocks."""
        self.source.forget_holds()
        if self.is_on:
            self.cache.recover()

    def absorb(self) -> None:
        """Make residents of what was copied meanwhile, as long as there is room."""
        if self.cache.is_warming:
            self.cache.absorb()

    def close(self) -> None:
        """End copies and launches, free the memory. Idempotent."""
        self.leave("the model was closed")
        self.device.close()
