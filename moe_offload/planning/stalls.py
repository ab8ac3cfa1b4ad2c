"""What a decoded token pays for experts that are not at hand, with and without reading ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from moe_offload.planning.cost_model import TokenBytes
from moe_offload.planning.machine_speed import DecoderShape, MachineSpeed, Overheads, ReadAhead
from moe_offload.planning.prefetch_plan import WASTE_TARGET


def _step_overhead_s(overheads: Overheads, shape: DecoderShape, stalled: float) -> float:
    """Return what a token costs beside bytes, ``stalled`` of its layers waiting for misses."""
    if shape.is_native:
        layers_s = shape.num_layers * overheads.native_layer_s + overheads.forward_s
    else:
        layers_s = shape.num_layers * overheads.modules_layer_s
    return layers_s + stalled * overheads.stalled_layer_s + overheads.token_s


def independent_misses(top_k: int, hit_rate: float) -> list[float]:
    """Return the probabilities that 0, 1, ... of a layer's experts miss."""
    return [
        comb(top_k, misses) * (1 - hit_rate) ** misses * hit_rate ** (top_k - misses)
        for misses in range(top_k + 1)
    ]


def thinned(shares: Sequence[float], recall: float) -> list[float]:
    """Return the shares of steps with 0, 1, ... misses that nobody guessed, each guessed by itself."""
    left = [0.0] * len(shares)
    for misses, share in enumerate(shares):
        for missed, chance in enumerate(independent_misses(misses, recall)):
            left[missed] += share * chance
    return left


@dataclass(frozen=True, slots=True)
class Stalls:
    """What a token pays beside bytes that are at hand."""

    token: TokenBytes
    machine: MachineSpeed
    shape: DecoderShape
    experts_s: float

    @property
    def read_s(self) -> float:
        """Of one expert among those that are read together."""
        uses = max(1, self.shape.moe_layers * self.shape.top_k)
        return self.token.expert_bytes / uses / self.machine.disk_bytes_per_s

    def of(self, shares: Sequence[float]) -> tuple[float, float]:
        """Return the overhead and the expected waiting of a token, by its layers' misses."""
        layers, top_k = self.shape.moe_layers, self.shape.top_k
        stalled = layers * (1 - shares[0])
        overhead_s = _step_overhead_s(self.machine.overheads, self.shape, stalled)
        expert_s = self.experts_s / max(1, layers * top_k)
        latency_s, read_s = self.machine.disk_latency_s, self.read_s
        expected = sum(
            share * _layer_stall_s(misses, top_k, latency_s, read_s, expert_s)
            for misses, share in enumerate(shares)
            if misses
        )
        return overhead_s, layers * expected

    def plain_s(self, shares: Sequence[float], ram_s: float, disk_s: float) -> float:
        """Return a token's seconds where nothing is read ahead."""
        overhead_s, stall_s = self.of(shares)
        return max(ram_s + overhead_s + stall_s, disk_s)

    def disk_s(self, hit_rate: float) -> float:
        """Return how long the disk reads a token's misses."""
        return (1 - hit_rate) * self.token.expert_bytes / self.machine.disk_bytes_per_s

    def verified_ahead_s(
        self, shares: Sequence[float], ahead: ReadAhead, ram_s: float, disk_s: float
    ) -> float:
        """Return ``ahead_s`` as far as real runs bear it out: never a greater gain than theirs.

        What arithmetic has faster than they were, where they ran, reading ahead costs elsewhere, too.
        """
        reckoned_s = self.ahead_s(shares, ahead, ram_s, disk_s)
        if ahead.seen is None:
            return reckoned_s
        there = independent_misses(self.shape.top_k, ahead.seen.hit_rate), self.disk_s(ahead.seen.hit_rate)
        runs_s = self.plain_s(there[0], ram_s, there[1]) / ahead.seen.speedup
        more_s = max(0.0, runs_s - self.ahead_s(there[0], ahead, ram_s, there[1]))
        return max(reckoned_s + more_s, self.plain_s(shares, ram_s, disk_s) / ahead.seen.speedup)

    def ahead_s(self, shares: Sequence[float], ahead: ReadAhead, ram_s: float, disk_s: float) -> float:
        """Return a token's seconds where each layer's guessed misses are read during the layer before.

        Guesses are asked for by who computes, wrong ones, too, and take their share of the disk. As many are
        asked for as begin to be read while a layer computes (``plan_reads``), the rest are found missing.
        What has not arrived by then is waited for; while a layer waits for its own misses, no guess advances.
        """
        missed = sum(misses * share for misses, share in enumerate(shares))
        wanted = missed * (ahead.recall + WASTE_TARGET / (1 - WASTE_TARGET))
        overheads, layers = self.machine.overheads, self.shape.moe_layers
        watched_s = max(0.0, overheads.python_layer_s - overheads.native_layer_s) + ahead.layer_s

        def layer_s(overhead_s: float, asked: float) -> float:
            beside_s = layers * (watched_s + asked * self.machine.submit_s)
            return (ram_s + overhead_s + beside_s) / max(1, self.shape.num_layers)

        asked = min(wanted, layer_s(self.of(shares)[0], wanted) / self.read_s + 1)
        found = ahead.recall * (asked / wanted if wanted else 1.0)
        overhead_s, stall_s = self.of(thinned(shares, found))
        window_s = layer_s(overhead_s, asked)
        reading_s = min(1.0, asked) * self.machine.disk_latency_s + asked * self.read_s
        late_s = layers * max(0.0, reading_s - window_s)
        busy_s = window_s * max(1, self.shape.num_layers)
        return max(busy_s + stall_s + late_s, disk_s / (1 - WASTE_TARGET))


def _layer_stall_s(misses: int, top_k: int, latency_s: float, read_s: float, expert_s: float) -> float:
    """Return what a layer waits: until the last miss is there and computed, all others behind its reading."""
    arrived_s = latency_s + misses * read_s
    return max(0.0, arrived_s + expert_s - top_k * expert_s)
