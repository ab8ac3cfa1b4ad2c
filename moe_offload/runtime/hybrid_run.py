"""One token's layers on device and CPU in one native call, where nothing has to be read.

What hybrid_step.py does layer by layer, from tables: where experts are (the caches keep those), what the
scheduler does with so many of them on the device, and which slots are free for copies. Both caches learn of
the layers afterwards; where the free slots do not suffice they learn of those so far, and it goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_offload import _native
from moe_offload._native import DecodeStep
from moe_offload.errors import DeviceError
from moe_offload.planning.expert_costs import RunningCosts
from moe_offload.runtime.executor import ExpertExecutor
from moe_offload.runtime.hybrid import HybridLayer
from moe_offload.storage.expert_format import ExpertKey

MOST_COPIES = 64  # of a pool, between two looks at who has to leave for them

# layer, ids, weights, ids on the device, (id, slot) of those copied there, CPU seconds, whether rows stayed
Done = tuple[int, list[int], list[float], list[int], list[tuple[int, int]], float, bool]


class HybridRun:
    """Runs of layers of ``step``.

    Args:
        executors: by layer index, None for a layer without experts; at least one has a share on a device.
        top_k: by layer index.
    """

    def __init__(
        self, step: DecodeStep, executors: Sequence[ExpertExecutor | None], top_k: Mapping[int, int]
    ) -> None:
        self._step, self._executors, self._top_k = step, executors, top_k
        self._hybrid = {
            i: e.hybrid for i, e in enumerate(executors) if e is not None and e.hybrid is not None
        }
        self._layers = next(iter(self._hybrid.values())).layers
        self._tier, self._ram = self._layers.tier, self._layers.ram
        self._native = _native.TokenRun(step, self._tier.source.device)
        self._groups: dict[tuple[int, int], list[int]] = {}  # by costs and top_k: layers that move alike
        for layer_idx in self._hybrid:
            alike = id(self._layers.costs[layer_idx]), top_k[layer_idx]
            self._groups.setdefault(alike, []).append(layer_idx)
        self._moves: dict[int, list[int]] = {}  # by a group's first layer, as native code has them
        for layer_idx, executor in enumerate(executors):
            if executor is not None:
                self._describe(layer_idx, executor, self._hybrid.get(layer_idx))

    def _describe(self, layer_idx: int, executor: ExpertExecutor, hybrid: HybridLayer | None) -> None:
        in_ram = self._ram.resident_table(layer_idx).ctypes.data
        on_device = 0 if hybrid is None else self._tier.cache.resident_table(layer_idx).ctypes.data
        device_kernel = None if hybrid is None else hybrid.device_kernel
        self._native.set_layer(layer_idx, executor.kernel.native, device_kernel, on_device, in_ram)
        if hybrid is not None:
            pool = next(k for k, plan in enumerate(self._tier.cache.plans) if layer_idx in plan.layers)
            matrix_bytes = [matrix.num_bytes for matrix in executor.kernel.layout.matrices]
            self._native.set_copies(layer_idx, pool, *self._ram.slots_of(layer_idx), matrix_bytes)

    @property
    def is_possible(self) -> bool:
        """Whether the device is used, and nobody watches single launches."""
        return self._tier.is_on and self._layers.span is None

    def run(self, first: int, cached: list[tuple[int, int]], capacity: int, num_tokens: int) -> int:
        """Compute the layers from ``first`` on.

        Returns:
            The layer that stopped it, its attention computed and its experts not; or the number of layers.
        """
        self._tier.absorb()
        is_attended = False
        while True:
            for group in self._groups.values():
                self._tell_moves(group)
            before = self._tier.device_counters()
            free = self._tier.cache.free_slots(MOST_COPIES)
            frozen = self._layers.is_frozen
            stopped = self._native.run(first, cached, capacity, num_tokens, frozen, free, is_attended)
            num_copied = self._account(before)
            failure = self._native.failure
            if failure is not None:
                self._hybrid[stopped].failed(DeviceError(failure[0], int(failure[1])))
            if not num_copied or not self._native.lacks_slots:
                return stopped
            first, is_attended = stopped, True  # what had to leave for those copies has left

    def _tell_moves(self, group: Sequence[int]) -> None:
        moves = self._layers.moves(group[0], self._top_k[group[0]])
        if self._moves.get(group[0]) is not moves:
            for layer_idx in group:
                self._native.set_moves(layer_idx, moves)
            self._moves[group[0]] = moves

    def _account(self, before: dict[str, float]) -> int:
        """Tell caches, counters and costs of the layers that were computed; returns how many were copied."""
        done = self._native.done()
        if not done:
            return 0
        missed, num_missed = list[ExpertKey](), 0
        wants_misses = self._tier.wants_misses
        for layer_idx, ids, weights, on_device, copied, _, _ in done:
            self._ram.used_residents(layer_idx, ids, weights, len(ids) - len(on_device))
            if layer_idx in self._hybrid:
                num_hits = len(on_device) - len(copied)
                self._tier.cache.used(layer_idx, ids, weights, num_hits, copied)
                num_missed += len(ids) - len(on_device)
                if wants_misses and len(on_device) < len(ids):
                    missed += [ExpertKey(layer_idx, i) for i in ids if i not in on_device]
            executor = self._executors[layer_idx]
            assert executor is not None
            executor.on_layer_done(layer_idx)
        now = self._tier.device_counters()
        num_copied = self._count(done, {name: now[name] - before[name] for name in now})
        self._tier.ran_on_cpu(missed, num_missed)
        return num_copied

    def _count(self, done: list[Done], device: dict[str, float]) -> int:
        counters, costs_of = self._layers.counters, self._layers.costs
        counters.device_wait_s += self._native.wait_s
        cpu: dict[int, tuple[RunningCosts, float, float]] = {}  # by costs: expected and measured seconds
        device_expected_s = copies_expected_s = 0.0
        worked, num_copied = False, 0
        for layer_idx, ids, _, on_device, copied, cpu_s, stayed in done:
            counters.cpu_s += cpu_s
            if layer_idx not in costs_of:
                continue
            counters.device_experts += len(on_device)
            counters.cpu_experts += len(ids) - len(on_device)
            costs = costs_of[layer_idx]
            counters.copied_experts += len(copied)
            one_cpu_s, one_gpu_s, copy_s = costs.of_one_token()
            num_copied, copies_expected_s = num_copied + len(copied), copies_expected_s + copy_s * len(copied)
            _, expected_s, measured_s = cpu.get(id(costs), (costs, 0.0, 0.0))
            more_s = one_cpu_s * (len(ids) - len(on_device))
            cpu[id(costs)] = costs, expected_s + more_s, measured_s + cpu_s
            worked = worked or bool(on_device)
            device_expected_s += 0.0 if stayed else one_gpu_s * len(on_device)
        for costs, expected_s, measured_s in cpu.values():
            costs.saw_cpu(expected_s, measured_s)
            costs.saw_gpu(device_expected_s, device["compute_seconds"])
            if num_copied:
                costs.saw_copies(copies_expected_s, device["busy_seconds"])
        if self._step.away is not None:
            self._layers.count_stayed(next(iter(self._hybrid)), *self._step.away.take_rows_done())
        if worked:
            self._tier.worked()
        return num_copied
