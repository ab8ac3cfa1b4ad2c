"""One token's layers on device and CPU in one native call, where nothing has to be read or copied.

What hybrid_step.py does layer by layer, from tables: where experts are (the caches keep those), and what the
scheduler does with so many of them on the device. Both caches learn of the layers afterwards.
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
        for group in self._groups.values():
            self._tell_moves(group)
        computed_s = self._tier.device_counters()["compute_seconds"]
        stopped = self._native.run(first, cached, capacity, num_tokens, self._layers.is_frozen)
        self._account(computed_s)
        failure = self._native.failure
        if failure is not None:
            self._hybrid[stopped].failed(DeviceError(failure[0], int(failure[1])))
        return stopped

    def _tell_moves(self, group: Sequence[int]) -> None:
        moves = self._layers.moves(group[0], self._top_k[group[0]])
        if self._moves.get(group[0]) is not moves:
            for layer_idx in group:
                self._native.set_moves(layer_idx, moves)
            self._moves[group[0]] = moves

    def _account(self, computed_s: float) -> None:
        """Tell caches, counters and costs of the layers that were computed."""
        done = self._native.done()
        if not done:
            return
        missed, num_missed = list[ExpertKey](), 0
        wants_misses = self._tier.wants_misses
        for layer_idx, ids, weights, on_device, _, _ in done:
            self._ram.used_residents(layer_idx, ids, weights, len(ids) - len(on_device))
            if layer_idx in self._hybrid:
                self._tier.cache.used_residents(layer_idx, ids, weights, len(on_device))
                num_missed += len(ids) - len(on_device)
                if wants_misses and len(on_device) < len(ids):
                    missed += [ExpertKey(layer_idx, i) for i in ids if i not in on_device]
            executor = self._executors[layer_idx]
            assert executor is not None
            executor.on_layer_done(layer_idx)
        self._count(done, self._tier.device_counters()["compute_seconds"] - computed_s)
        self._tier.ran_on_cpu(missed, num_missed)

    def _count(
        self, done: list[tuple[int, list[int], list[float], list[int], float, bool]], device_s: float
    ) -> None:
        counters, costs_of = self._layers.counters, self._layers.costs
        counters.device_wait_s += self._native.wait_s
        cpu: dict[int, tuple[RunningCosts, float, float]] = {}  # by costs: expected and measured seconds
        device_expected_s = 0.0
        worked = False
        for layer_idx, ids, _, on_device, cpu_s, stayed in done:
            counters.cpu_s += cpu_s
            if layer_idx not in costs_of:
                continue
            counters.device_experts += len(on_device)
            counters.cpu_experts += len(ids) - len(on_device)
            costs = costs_of[layer_idx]
            one_cpu_s, one_gpu_s, _ = costs.of_one_token()
            _, expected_s, measured_s = cpu.get(id(costs), (costs, 0.0, 0.0))
            more_s = one_cpu_s * (len(ids) - len(on_device))
            cpu[id(costs)] = costs, expected_s + more_s, measured_s + cpu_s
            worked = worked or bool(on_device)
            device_expected_s += 0.0 if stayed else one_gpu_s * len(on_device)
        for costs, expected_s, measured_s in cpu.values():
            costs.saw_cpu(expected_s, measured_s)
            costs.saw_gpu(device_expected_s, device_s)
        if self._step.away is not None:
            self._layers.count_stayed(next(iter(self._hybrid)), *self._step.away.take_rows_done())
        if worked:
            self._tier.worked()
