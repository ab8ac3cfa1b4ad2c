"""Counters of a run: what was found in memory, what was read, what was waited for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
    evictions: int = 0
    slots_given_back: int = 0
    decode_steps: int = 0
    decode_s: float = 0.0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    window_hit_rate: float | None = None  # residents alone, over the last events that are kept
    belady_hit_rate: float | None = None  # what no eviction policy could exceed there, without prefetch
    prefetch_state: str = ""  # what the prefetcher does, and why
    profile: str = ""  # which figures and settings of the machine are in use
    peak_bytes: int = 0
    ram_bytes: int = 0

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
        if self.belady_hit_rate is None or self.window_hit_rate is None:
            return None
        return self.belady_hit_rate - self.window_hit_rate

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
        }
        return {name: value for name, value in figures.items() if isinstance(value, int | float)}
