"""One token's layers on device and CPU in one native call, where nothing has to be read.

What hybrid_step.py does layer by layer, from tables: where experts are (the caches keep those), what the
scheduler does with so many of them on the device, and which slots are free for copies. Both caches learn of
the layers afterwards; where the free slots do not suffice they learn of those so far, and it goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

from moe_offload import _native
from moe_offload._native import DecodeStep
from moe_offload.errors import DeviceError
from moe_offload.planning.expert_costs import RunningCosts
from moe_offload.planning.token_moves import Scheduler
from moe_offload.runtime.executor import ExpertExecutor
from moe_offload.runtime.hybrid import HybridLayer
from moe_offload.storage.expert_format import ExpertKey

CPU_TOKENS = 8  # after so many without the device costs are corrected, and the scheduler asked again
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
        self._asked: dict[int, list[int]] = {}  # by a group's first layer: what the scheduler said last
        self._moves: dict[int, list[int]] = {}  # likewise, as native code has them
        self._told: Scheduler | None = None  # whose moves those are
        self._tokens_seen = 0  # by the CPU alone, since costs were corrected
        self._copies: dict[int, bool] = {}  # alike: whether they may ask for a copy
        self._worth: dict[int, list[bool]] = {}  # by layer: HybridLayers.are_worth
        self._missed: list[ExpertKey] = []  # of the layers that are being told of
        by_costs = {id(self._layers.costs[i]): _Sum(self._layers.costs[i]) for i in self._hybrid}
        self._sums, self._sum_of = (
            list(by_costs.values()),
            {i: by_costs[id(self._layers.costs[i])] for i in self._hybrid},
        )
        with_experts = [executor for executor in executors if executor is not None]
        self._are_alike = len(self._sums) == 1 and len(with_experts) == len(self._hybrid)
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
        # While nothing may be replaced, what has arrived would take a resident's place.
        self._tier.cache.show_arrived(shown=not self._layers.is_frozen)
        is_attended = False
        while True:
            if self._layers.scheduler is not self._told or self._tokens_seen == 0:
                for group in self._groups.values():
                    self._tell_moves(group)
                self._told = self._layers.scheduler
            free = self._tier.cache.free_slots(MOST_COPIES) if any(self._copies.values()) else []
            stopped = self._native.run(first, cached, capacity, num_tokens, free, is_attended)
            num_copied = self._account()
            failure = self._native.failure
            if failure is not None:
                self._hybrid[stopped].failed(DeviceError(failure[0], int(failure[1])))
            if not num_copied or not self._native.lacks_slots:
                return stopped
            first, is_attended = stopped, True  # what had to leave for those copies has left

    def _tell_moves(self, group: Sequence[int]) -> None:
        moves = self._layers.moves(group[0], self._top_k[group[0]])
        if self._asked.get(group[0]) is moves:
            return
        self._asked[group[0]] = moves
        worth = self._layers.are_worth(group[0], self._top_k[group[0]])
        self._worth |= dict.fromkeys(group, worth)
        if self._moves.get(group[0]) != moves:  # costs move often, what is done about them seldom
            for layer_idx in group:
                self._native.set_moves(layer_idx, moves)
            self._moves[group[0]] = moves
            self._copies[group[0]] = max(moves) > 0

    def _account(self) -> int:
        """Tell caches, counters and costs of the layers that were computed; returns how many were copied."""
        self._missed = []
        for each in self._sums:
            each.clear()
        last = self._booked_in_one()
        if last is None:
            last = self._booked_by_layer()
        if last < 0:
            return 0
        executor = self._executors[last]
        assert executor is not None
        executor.on_layer_done(last)  # of the last one: all were done before anybody could be told
        num_copied = self._count()
        self._tier.ran_on_cpu(self._missed)
        return num_copied

    def _booked_in_one(self) -> int | None:
        """Tell both caches of all layers at once, which costs as much as telling them of one.

        Returns:
            The last layer, -1 where there was none; None: each has to be told alone, and nothing was.
        """
        tier, ram = self._tier, self._ram
        if not self._are_alike:
            return None
        steps, on_device, num_there, num_home, num_copied, cpu_s = self._native.together()
        if not steps:
            return -1
        if num_copied or not tier.cache.books_in_one(steps, on_device):
            return None
        if not ram.booked_in_one(steps, on_device):
            return None
        tier.cache.used_in_one(steps, num_there)
        part = self._sums[0]
        part.cpu_s, part.on_device, part.at_home = cpu_s, num_there, num_home
        part.on_cpu = sum([len(ids) for _, ids, _ in steps]) - num_there
        if part.on_cpu and tier.wants_misses:
            has_room = tier.has_room
            for (layer_idx, ids, _), there in zip(steps, on_device or repeat(()), strict=False):
                self._note_missed(layer_idx, ids, there, has_room)
        return steps[-1][0]

    def _booked_by_layer(self) -> int:
        """Tell both caches of one layer after the other; returns the last, -1 where there was none."""
        cache, last = self._tier.cache, -1
        wants_misses, has_room = self._tier.wants_misses, self._tier.has_room
        for last, ids, weights, on_device, copied, cpu_s, stayed in self._native.done():
            num_there = len(on_device)
            self._ram.used_residents(last, ids, weights, len(ids) - num_there, on_device)
            part = self._sum_of.get(last)
            if part is None:
                self._layers.counters.cpu_s += cpu_s
                continue
            cache.used_natively(last, ids, weights, on_device, copied)
            if wants_misses:
                self._note_missed(last, ids, on_device, has_room)
            part.on_cpu += len(ids) - num_there
            part.cpu_s += cpu_s
            part.on_device += num_there
            part.at_home += 0 if stayed else num_there
            part.copied += len(copied)
        return last

    def _note_missed(self, layer_idx: int, ids: Sequence[int], there: Sequence[int], has_room: bool) -> None:
        """Remember what of a layer was not on the device, where one more there would have paid."""
        if has_room or self._worth[layer_idx][len(there)]:
            self._missed += [ExpertKey(layer_idx, i) for i in ids if i not in there]

    def _count(self) -> int:
        """Bring counters and costs up to date; returns how many were copied."""
        num_on_device, num_copied = 0, 0
        counters = self._layers.counters
        for part in self._sums:
            num_on_device, num_copied = num_on_device + part.on_device, num_copied + part.copied
            self._tier.stats.misses += part.on_cpu
            counters.cpu_s += part.cpu_s
            counters.cpu_experts += part.on_cpu
            part.seen_experts += part.on_cpu
            part.seen_s += part.cpu_s
        self._tokens_seen += 1
        if self._step.away is not None:
            self._layers.count_stayed(next(iter(self._hybrid)), *self._step.away.take_rows_done())
        if num_on_device:
            counters.device_wait_s += self._native.wait_s
            counters.device_experts += num_on_device
            counters.copied_experts += num_copied
            self._tier.worked()
        if num_on_device or self._tokens_seen >= CPU_TOKENS:
            for part in self._sums:
                self._see(part)
            self._tokens_seen = 0
        return num_copied

    def _see(self, part: _Sum) -> None:
        """Correct costs; what device and link did is not known apart by costs."""
        costs = part.costs
        one_cpu_s, one_gpu_s, copy_s, start_s = costs.of_one_token()
        costs.saw_cpu(one_cpu_s * part.seen_experts, part.seen_s)
        if part.on_device:
            costs.saw_gpu(one_gpu_s * part.at_home, self._native.device_s)
            costs.saw_copies(copy_s * part.copied, self._native.link_s)
            costs.saw_start(start_s * self._native.num_starts, self._native.start_s)
        part.seen_experts, part.seen_s = 0, 0.0


@dataclass(slots=True)
class _Sum:
    """Of the layers of one call whose experts cost alike; counts are of experts."""

    costs: RunningCosts
    cpu_s: float = 0.0
    on_cpu: int = 0
    on_device: int = 0
    at_home: int = 0  # of those on the device: their rows came home
    copied: int = 0
    seen_experts: int = 0  # on the CPU, of calls by which costs were not corrected yet
    seen_s: float = 0.0

    def clear(self) -> None:
        self.cpu_s, self.on_cpu, self.on_device, self.at_home, self.copied = 0.0, 0, 0, 0, 0
