"""Counters of a run: what was found in memory, what was read, what was waited for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


def below(most: float | None, reached: float | None) -> float | None:
    """Return how far a rate is below the most; None where one is not known."""
    return None if most is None or reached is None else most - reached


@dataclass
class DeviceStats:
    """What a device did, and what moved to it. A need is an expert of a decode step, as in OffloadStats."""

    device_hits: int = 0  # needs that were there
    device_misses: int = 0  # needs that ran on the CPU or after a copy
    device_experts: int = 0  # computed there, those of prompts included
    cpu_experts: int = 0
    copied_experts: int = 0  # for the step or prompt at hand
    redone_experts: int = 0  # on the CPU, after the device failed
    prefetched_bytes: int = 0  # copied ahead of a step, admissions among them, and then used
    prefetch_late_device_bytes: int = 0  # of these, those that a step had to wait for
    prefetch_wasted_device_bytes: int = 0
    link_bytes: int = 0
    link_busy_s: float = 0.0
    link_peak_bytes_per_s: float = 0.0  # measured at load
    device_compute_s: float = 0.0
    device_copy_wait_s: float = 0.0  # the device had nothing to compute but what was being copied
    cpu_expert_s: float = 0.0
    host_wait_s: float = 0.0  # the CPU had finished its share before the device
    vram_bytes: int = 0
    vram_slot_bytes: int = 0
    device_window_hit_rate: float | None = None  # of the device alone, over the last events that are kept
    device_belady_hit_rate: float | None = (
        None  # what no eviction policy could exceed there, without prefetch
    )
    device_state: str = ""

    @property
    def device_hit_rate(self) -> float:
        """Share of decode's needs that were on the device; 0 when there were none."""
        needs = self.device_hits + self.device_misses
        return self.device_hits / needs if needs else 0.0

    @property
    def link_bytes_per_s(self) -> float | None:
        """What the link achieved while it was busy; None before it was."""
        return self.link_bytes / self.link_busy_s if self.link_busy_s else None

    @property
    def link_share(self) -> float | None:
        """``link_bytes_per_s`` over what was measured at load."""
        achieved = self.link_bytes_per_s
        return achieved / self.link_peak_bytes_per_s if achieved and self.link_peak_bytes_per_s else None

    @property
    def device_below_belady(self) -> float | None:
        """What was lost to Belady's rule on the device; None unless it was asked for."""
        return below(self.device_belady_hit_rate, self.device_window_hit_rate)

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "device_hit_rate": self.device_hit_rate,
            "device_below_belady": self.device_below_belady,
            "link_bytes_per_s": self.link_bytes_per_s,
            "link_share": self.link_share,
        }


@dataclass
class OffloadStats:
    """Counters since load or the last ``reset``; bytes are file bytes, not padded slot bytes.

    Decode counts every (layer, expert) that a step needs once: it is a ``hit`` when it was
    resident, a ``prefetch_hit`` when a finished prefetch held it, and a ``miss`` otherwise (also
    while its prefetch is still in flight: that prefetch is ``late``).
    """

    hits: int = 0
    prefetch_hits: int = 0
    misses: int = 0
    demand_bytes: int = 0
    prefetch_useful_bytes: int = 0
    prefetch_late_bytes: int = 0
    prefetch_wasted_bytes: int = 0
    prefetch_cancelled: int = 0
    stream_bytes: int = 0  # read for prompts, past the decode cache
    warm_bytes: int = 0  # read at the start, because an earlier run had used them most
    stall_s: float = 0.0  # compute waited for reads
    prefill_stall_s: float = 0.0  # of that, for prompts
    evictions: int = 0
    slots_given_back: int = 0
    decode_steps: int = 0
    decode_s: float = 0.0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    window_hit_rate: float | None = None  # residents alone, of what RAM served of the last events kept
    belady_hit_rate: float | None = None  # what no eviction policy could exceed there, without prefetch
    policy: str = ""  # of eviction, as make_policy takes it
    predictor: str = ""  # by name; "none" without prefetch
    prefetch_state: str = ""  # what the prefetcher does, and why
    profile: str = ""  # which figures and settings of the machine are in use
    peak_bytes: int = 0
    ram_bytes: int = 0
    device: DeviceStats | None = None

    @property
    def hit_rate(self) -> float:
        """Share of decode's needs met without waiting for a demand read; 0 when there were none."""
        needs = self.hits + self.prefetch_hits + self.misses
        return (self.hits + self.prefetch_hits) / needs if needs else 0.0

    @property
    def decode_bytes(self) -> int:
        """Bytes of experts read for decode steps, speculation included."""
        prefetched = self.prefetch_useful_bytes + self.prefetch_late_bytes + self.prefetch_wasted_bytes
        return self.demand_bytes + prefetched

    @property
    def prefetch_accuracy(self) -> float:
        """Share of the prefetched bytes that a step then needed; 0 when there were none."""
        used = self.prefetch_useful_bytes + self.prefetch_late_bytes
        return used / (used + self.prefetch_wasted_bytes) if used else 0.0

    @property
    def below_belady(self) -> float | None:
        """What the policy lost to Belady's rule in hit rate; None unless it was asked for."""
        return below(self.belady_hit_rate, self.window_hit_rate)

    @property
    def bytes_read(self) -> int:
        """Bytes of experts read from storage, speculation included."""
        return self.decode_bytes + self.stream_bytes + self.warm_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return every counter and the derived figures, ready for JSON: numbers that are known."""
        figures = {
            **asdict(self),
            "hit_rate": self.hit_rate,
            "prefetch_accuracy": self.prefetch_accuracy,
            "below_belady": self.below_belady,
            "bytes_read": self.bytes_read,
            **(self.device.as_dict() if self.device is not None else {}),
        }
        return {name: value for name, value in figures.items() if isinstance(value, int | float)}
