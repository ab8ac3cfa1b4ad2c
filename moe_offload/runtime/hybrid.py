"""One layer's step on device and CPU together: who computes what, at the same time, the same bits.

The scheduler chooses for each expert: on the device where it is, on the device after a copy, or on the
CPU. Launch and copies are under way before the CPU begins its share; the host waits for the device once,
at the end. Both sides leave unweighted rows in their places, and the caller sums them by ascending expert
id: so the choice changes the time and never a bit. What fails on the device is computed again here.
"""

from __future__ import annotations

import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moe_offload._native import DecodeStep, DeviceInputs, DeviceKernel
from moe_offload.errors import DeviceError
from moe_offload.expert_ops import ExpertKernel
from moe_offload.planning.device_trials import DeviceTrials, may_gain
from moe_offload.planning.expert_costs import RunningCosts
from moe_offload.planning.gain_switch import GainSwitch
from moe_offload.planning.impact import by_impact
from moe_offload.planning.prefetch_plan import Guess
from moe_offload.planning.scheduler import SCHEDULERS, Choice
from moe_offload.planning.token_moves import Scheduler, TokenMoves, divide
from moe_offload.residency.accelerator import wait_launch
from moe_offload.residency.device_tier import DeviceTier
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.guessed_reads import Likely
from moe_offload.residency.prefetch import Prefetcher
from moe_offload.residency.slot_reads import ON_ITS_WAY
from moe_offload.stats import DeviceStats


class StepRows(Protocol):
    """A step of one layer: experts ascending, pairs (token, expert) grouped by them; n experts, P pairs.

    Attributes:
        weights: (n,) the router's, summed over tokens.
        pair_offsets: (n + 1,)
        pair_tokens: (P,)
        num_tokens: T
        hidden_address: of (T, H) float32; stays until the step ends.
        rows_address: of (P, H) float32, where all rows go.
        step: of the one token under way in native code, else None.
    """

    expert_ids: list[int]
    weights: list[float]
    pair_offsets: list[int]
    pair_tokens: list[int]
    num_tokens: int
    hidden_address: int
    rows_address: int

    @property
    def step(self) -> DecodeStep | None: ...

    def compute(self, positions: list[int], addresses: list[int]) -> None:
        """Put the rows of some experts, by position, in their places, on the CPU."""


@dataclass
class HybridCounters:
    """Of all layers."""

    cpu_s: float = 0.0  # the CPU's share of steps
    device_wait_s: float = 0.0  # the host had nothing left to do and waited for the device
    cpu_experts: int = 0
    device_experts: int = 0
    copied_experts: int = 0  # of these, copied for the step
    redone_experts: int = 0  # on the CPU, after the device failed
    stayed_s: float = 0.0  # of the device, for rows that stayed there


class HybridLayers:
    """What the layers share: the tiers, the scheduler, what experts cost, counters."""

    def __init__(
        self, tier: DeviceTier, ram: ExpertCache, scheduler: str, costs: dict[int, RunningCosts], top_k: int
    ) -> None:
        self.tier, self.ram, self.scheduler_name, self.top_k = tier, ram, scheduler, top_k
        self.costs = costs  # by layer index; layers of one size share theirs
        self._moves = {id(shared): TokenMoves(shared) for shared in costs.values()}
        self.counters = HybridCounters()
        self.left_to_cpu = ""  # which layers the device has no kernel for
        self.describe_dense: Callable[[], str] | None = None  # of dense layers that run there, too
        self.switch = GainSwitch(begins_on=False) if scheduler == "hybrid" else None
        self._trials = DeviceTrials()
        self._ahead: Prefetcher | None = None
        self._may_gain = self._can_gain()
        # What timeline.py watches: the CPU's spans (layer, experts, begin, end), and the launches' layers
        # and experts by ticket.
        self.span: Callable[[int, Sequence[int], float, float], None] | None = None
        self.launched: dict[int, tuple[int, Sequence[int]]] | None = None
        tier.replaces = scheduler != "static_split" and not self.is_frozen

    @property
    def is_frozen(self) -> bool:
        """Whether nothing is copied and nothing replaced: what is on the device now is a static split."""
        return self.switch is not None and not self.switch.is_on

    @property
    def scheduler(self) -> Scheduler:
        return SCHEDULERS["static_split" if self.is_frozen else self.scheduler_name]

    def moves(self, layer_idx: int, count: int) -> list[int]:
        """Return what the scheduler does with ``count`` experts of one token (token_moves.py)."""
        return self._moves[id(self.costs[layer_idx])].of(self.scheduler, count)

    def rank(self, likely: Sequence[Likely], guesses: Sequence[Guess]) -> list[Guess]:
        """Return guesses in the order of the time that they save on the device (impact.py).

        Args:
            likely: what the next layers will probably use, the guesses among them.
        """
        expected = {layer_idx: 0.0 for _, layer_idx, _, _ in likely}
        for _, layer_idx, expert_id, probability in likely:
            if self.tier.cache.resident_table(layer_idx)[expert_id, 0] > ON_ITS_WAY:
                expected[layer_idx] += probability
        moves = {i: self._moves[id(self.costs[i])] for i in expected}
        savings = {i: moves[i].savings(self.scheduler, self.top_k) for i in expected}
        return by_impact(guesses, expected, savings)

    def let_prefetch(self, prefetcher: Prefetcher) -> None:
        """Let ``prefetcher`` fill the device from now on: ours only once a trial has shown that it pays."""
        self._ahead = prefetcher
        if self.switch is not None:
            prefetcher.switch = GainSwitch(begins_on=False)
        prefetcher.turn_to(self.tier.cache, self.tier.link_counters, self.rank, self.copies_ahead)

    def copies_ahead(self) -> bool:
        """Whether the next step may copy for layers to come."""
        assert self._ahead is not None
        return self._trials.copies_ahead(self.switch, self._ahead.switch, self._may_gain)

    def are_worth(self, layer_idx: int, count: int) -> list[bool]:
        """Return, by how many of a token's ``count`` experts ran on the device, whether one more pays."""
        if self.scheduler_name != "hybrid":  # the others are compared as they were published
            return [True] * (count + 1)
        savings = self._moves[id(self.costs[layer_idx])].savings(SCHEDULERS["hybrid"], count)
        return [saved_s > 0.0 for saved_s in savings] + [False]

    def _can_gain(self) -> bool:
        scheduler = SCHEDULERS[self.scheduler_name]
        return any(
            may_gain(moves.savings(scheduler, self.top_k), moves.costs.of_one_token()[0])
            for moves in self._moves.values()
        )

    def use(self, scheduler: str, switch: GainSwitch) -> None:
        """Go on with another scheduler, between steps; ``switch``: for "hybrid", what it has learned."""
        self.scheduler_name = scheduler
        self.switch = switch if scheduler == "hybrid" else None
        self.tier.replaces = scheduler != "static_split" and not self.is_frozen

    def step_done(self, seconds: float) -> None:
        """Take note of a decode step's time: what is slower than a static split is not done.

        Only once the device is filled: before, a static split would be judged by what it lacks.
        """
        needs = 0 if self._ahead is None else self._ahead.take_needs()
        if not self.tier.is_on or not self.tier.is_filled:
            return
        self._may_gain = self._can_gain()
        ahead = None if self._ahead is None else self._ahead.switch
        self._trials.record(self.switch, ahead, seconds, needs, self._may_gain)
        if self.switch is not None:
            self.tier.replaces = self.switch.is_on

    def count_stayed(self, layer_idx: int, num_experts: int, seconds: float) -> None:
        """Take note of rows that stayed on the device, of experts like this layer's."""
        if num_experts:
            costs = self.costs[layer_idx]
            costs.saw_gpu(costs.of_one_token()[1] * num_experts, seconds)
            self.counters.stayed_s += seconds

    def stats(self) -> DeviceStats:
        """Return the device's counters so far."""
        tier, counters, native = self.tier, self.counters, self.tier.device_counters()
        peaks = [tier.cache.expert_bytes(i) / costs.measured.copy_s for i, costs in self.costs.items()]
        return DeviceStats(
            device_hits=tier.stats.hits + tier.stats.prefetch_hits,
            device_misses=tier.stats.misses,
            device_experts=counters.device_experts,
            cpu_experts=counters.cpu_experts,
            copied_experts=counters.copied_experts,
            redone_experts=counters.redone_experts,
            prefetched_bytes=tier.stats.prefetch_useful_bytes + tier.stats.prefetch_late_bytes,
            prefetch_late_device_bytes=tier.stats.prefetch_late_bytes,
            prefetch_wasted_device_bytes=tier.stats.prefetch_wasted_bytes,
            link_bytes=int(native["bytes_copied"]),
            link_busy_s=native["busy_seconds"],
            link_peak_bytes_per_s=max(peaks),
            device_compute_s=native["compute_seconds"] + counters.stayed_s,
            device_copy_wait_s=native["waiting_seconds"],
            cpu_expert_s=counters.cpu_s,
            host_wait_s=counters.device_wait_s,
            vram_bytes=tier.plan.vram_bytes,
            vram_slot_bytes=tier.cache.slot_bytes,
            device_state=self.describe(),
        )

    def describe(self) -> str:
        """Return which device, which scheduler, and whether it pays."""
        state = f"{self.tier.device.name}, {self.scheduler_name}"
        if self.describe_dense is not None:
            state = f"{state}, {self.describe_dense()}"
        if not self.tier.is_on:
            state += f": off: {self.tier.off_reason}"
        elif self.switch is not None:
            state += f" {self.switch.describe('a static split')}"
        return f"{state}; {self.left_to_cpu}" if self.left_to_cpu else state


class HybridLayer:
    """One layer's experts on both sides."""

    def __init__(
        self, layers: HybridLayers, layer_idx: int, kernel: ExpertKernel, device_kernel: DeviceKernel
    ) -> None:
        self.layers, self.layer_idx = layers, layer_idx
        self.kernel, self.device_kernel = kernel, device_kernel

    @property
    def is_on(self) -> bool:
        return self.layers.tier.is_on

    def is_worth(self, num_on_device: int, num_on_cpu: int) -> bool:
        """Whether one more of a token's experts on the device would have paid."""
        return self.layers.are_worth(self.layer_idx, num_on_device + num_on_cpu)[num_on_device]

    def choose(self, rows: StepRows, there: Sequence[bool], room: int) -> tuple[list[int], list[int]]:
        """Return who runs on the device at once, at most ``room``, and who after a copy."""
        if rows.num_tokens == 1:
            resident, to_copy = self._choose_for_one(rows.expert_ids, there)
            return resident[:room], to_copy
        num_tokens = np.diff(np.array(rows.pair_offsets))
        on_gpu: Choice = np.array(there, np.bool_)
        in_ram: Choice = np.array(self.layers.ram.are_resident(self.layer_idx, rows.expert_ids), np.bool_)
        work = self.layers.costs[self.layer_idx].work(num_tokens, on_gpu, in_ram)
        choice = self.layers.scheduler(work).on_gpu
        chosen = [(i, is_there) for i, is_there, on in zip(rows.expert_ids, there, choice, strict=True) if on]
        return [i for i, is_there in chosen if is_there][:room], [i for i, is_there in chosen if not is_there]

    def _choose_for_one(self, ids: Sequence[int], there: Sequence[bool]) -> tuple[list[int], list[int]]:
        """The same from the scheduler's answers for one token (csrc/hybrid: TokenRun::divide)."""
        in_ram = self.layers.ram.are_resident(self.layer_idx, ids)
        division = divide(there, in_ram, self.layers.moves(self.layer_idx, len(ids)))
        return [ids[i] for i in division.on_device], [ids[i] for i in division.copied]

    def launch_to_stay(
        self, rows: StepRows, expert_ids: list[int], addresses: list[int], after: list[int]
    ) -> int:
        """Queue one token's rows behind dense layers on the device, where they stay.

        Returns:
            The launch that waits for copies; 0 where none has to be waited for.
        """
        assert rows.step is not None
        positions = [bisect_left(rows.expert_ids, i) for i in expert_ids]
        if not any(after):
            rows.step.device_rows(self.device_kernel, positions, addresses)
            return 0
        count = len(expert_ids)
        return self.layers.tier.device.launch(
            self.device_kernel,
            self.kernel.native,
            None,
            expert_ids,
            addresses,
            range(count + 1),
            [0] * count,
            after,
            rows.step.away,
            rows.step.leave_rows(positions),
        )

    def launch(
        self,
        rows: StepRows,
        inputs: DeviceInputs,
        expert_ids: list[int],
        addresses: list[int],
        after: list[int],
    ) -> int:
        """Queue some experts' rows on the device; returns the launch."""
        offsets, tokens = [0], list[int]()
        for expert_id in expert_ids:
            tokens += rows.pair_tokens[pairs_of(rows, expert_id)]
            offsets.append(len(tokens))
        launch = self.layers.tier.device.launch(
            self.device_kernel, self.kernel.native, inputs, expert_ids, addresses, offsets, tokens, after
        )
        if self.layers.launched is not None:
            self.layers.launched[launch] = self.layer_idx, expert_ids
        return launch

    def upload(self, rows: StepRows) -> DeviceInputs:
        """Put a step's inputs on the device."""
        hidden_size = self.kernel.layout.hidden_size
        return self.layers.tier.device.upload(rows.hidden_address, rows.num_tokens, hidden_size)

    def collect(self, rows: StepRows, launch: int, expert_ids: list[int]) -> DeviceError | None:
        """Wait for a launch and put its rows in their places; returns why it failed."""
        device, started = self.layers.tier.device, time.perf_counter()
        wait_launch(device, launch)
        places = [pair for i in expert_ids for pair in _range(pairs_of(rows, i))]
        failure = device.collect(launch, rows.rows_address, places)
        self.layers.counters.device_wait_s += time.perf_counter() - started
        return None if failure is None else DeviceError(failure[0], int(failure[1]))

    def compute(self, rows: StepRows, expert_ids: list[int], addresses: list[int]) -> float:
        """Compute some experts' rows on the CPU; returns the seconds."""
        started = time.perf_counter()
        rows.compute([bisect_left(rows.expert_ids, i) for i in expert_ids], addresses)
        ended = time.perf_counter()
        if self.layers.span is not None:
            self.layers.span(self.layer_idx, expert_ids, started, ended)
        return ended - started

    def failed(self, error: DeviceError) -> None:
        """Take note of a failure between steps, and tell the user what changes."""
        note = self.layers.tier.failed(error)
        if note:
            print(f"moe-offload: note: {note}", file=sys.stderr)


def pairs_of(rows: StepRows, expert_id: int) -> slice:
    """Return the pairs of an expert of the step."""
    position = bisect_left(rows.expert_ids, expert_id)
    return slice(rows.pair_offsets[position], rows.pair_offsets[position + 1])


def _range(pairs: slice) -> range:
    return range(pairs.start, pairs.stop)
