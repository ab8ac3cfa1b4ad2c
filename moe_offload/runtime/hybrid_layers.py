"""What the layers that a device shares have in common: the tiers, the scheduler, what experts cost, trials.

One layer's step is hybrid.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_offload.planning.device_trials import DeviceTrials, may_gain
from moe_offload.planning.expert_costs import RunningCosts
from moe_offload.planning.gain_switch import GainSwitch
from moe_offload.planning.impact import by_impact
from moe_offload.planning.prefetch_plan import Guess
from moe_offload.planning.prompt_trials import PromptTrials
from moe_offload.planning.scheduler import SCHEDULERS
from moe_offload.planning.token_moves import Scheduler, TokenMoves
from moe_offload.residency.device_tier import DeviceTier
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.guessed_reads import Likely
from moe_offload.residency.prefetch import Prefetcher
from moe_offload.residency.slot_entry import ON_ITS_WAY
from moe_offload.stats import DeviceStats

SETTLED_STEPS = 16  # in which the device got no expert, though it has room


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
        self.prompts = PromptTrials() if scheduler == "hybrid" else None
        self._trials = DeviceTrials()
        self._ahead: Prefetcher | None = None
        self._may_gain = self._can_gain()
        self._residents_seen, self._steps_alike, self._has_settled = 0, 0, False
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

    @property
    def prompt_scheduler(self) -> Scheduler:
        """Who divides what streams past the device's residents (prompt_trials.py)."""
        is_static = self.prompts is not None and not self.prompts.is_on
        return SCHEDULERS["static_split" if is_static else self.scheduler_name]

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
        self.prompts = PromptTrials() if scheduler == "hybrid" else None
        self.tier.replaces = scheduler != "static_split" and not self.is_frozen

    def step_done(self, seconds: float) -> None:
        """Take note of a decode step's time: what is slower than a static split is not done.

        Only once the device is filled, or gets no more: before, a static split would be judged by what it
        lacks.
        """
        needs = 0 if self._ahead is None else self._ahead.take_needs()
        if not self.tier.is_on or not self._may_be_judged():
            return
        ahead = None if self._ahead is None else self._ahead.switch
        if ahead is not None and (self.switch is None or self.switch.decision):  # else nobody asks
            self._may_gain = self._can_gain()
        self._trials.record(self.switch, ahead, seconds, needs, self._may_gain)
        if self.switch is not None:
            self.tier.replaces = self.switch.is_on

    def _may_be_judged(self) -> bool:
        """Whether no slot is left for a miss, or has been taken for a while: a text never asks for some."""
        if not self._has_settled and not self.tier.is_filled:
            num_residents = self.tier.num_residents
            self._steps_alike = self._steps_alike + 1 if num_residents == self._residents_seen else 0
            self._residents_seen = num_residents
            self._has_settled = self._steps_alike >= SETTLED_STEPS
            return self._has_settled
        return True

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
            prompts = self.prompts.describe() if self.prompts is not None else ""
            state += f", {prompts}" if prompts else ""
        return f"{state}; {self.left_to_cpu}" if self.left_to_cpu else state
