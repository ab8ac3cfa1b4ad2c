"""A disk and an arena for cache tests: reads finish in any order, late, or never well.

The disk notes which expert's bytes every slot address holds, so that a test sees a slot that was
overwritten too early, and asserts that every read ends exactly once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_offload.errors import CheckpointError
from moe_offload.planning.plans import PoolPlan
from moe_offload.planning.slots import staging_slots
from moe_offload.storage.expert_format import ExpertKey, ExpertLayout, GgmlType, MatrixFormat, RowOrder

ARENA_ADDRESS = 1 << 20
GARBAGE = ExpertKey(-1, -1)


@dataclass
class _Read:
    key: ExpertKey
    address: int
    speculative: bool
    state: str = "queued"  # reading | done | failed | ended


class SimulatedDisk:
    """An ExpertSource whose reads begin and finish when ``advance`` says so, or somebody waits."""

    def __init__(self, layouts: Mapping[int, ExpertLayout], seed: int = 0, concurrent_reads: int = 2) -> None:
        self.layouts = layouts
        self.random = random.Random(seed)
        self.concurrent_reads = concurrent_reads
        self.reads: dict[int, _Read] = {}
        self.contents: dict[int, ExpertKey] = {}  # slot address -> whose bytes are there
        self.failing: set[ExpertKey] = set()
        self.submitted: list[ExpertKey] = []
        self.cancelled: list[ExpertKey] = []
        self.interrupt_next_wait = False

    def read(self, key: ExpertKey, slot_address: int, *, speculative: bool) -> int:
        assert slot_address not in [read.address for read in self.live()], "two reads into one slot"
        self.contents[slot_address] = GARBAGE
        ticket = len(self.reads)
        self.reads[ticket] = _Read(key, slot_address, speculative)
        self.submitted.append(key)
        return ticket

    def done(self, ticket: int) -> bool:
        assert self.reads[ticket].state != "ended", f"ticket {ticket} has ended"
        return self.reads[ticket].state in ("done", "failed")

    def wait(self, ticket: int) -> None:
        if self.interrupt_next_wait:
            self.interrupt_next_wait = False
            raise KeyboardInterrupt
        assert self.reads[ticket].state != "cancelled", f"ticket {ticket} would be waited for forever"
        while not self.done(ticket):
            self.advance()
        read, failed = self.reads[ticket], self.reads[ticket].state == "failed"
        read.state = "ended"
        if failed:
            raise CheckpointError(f"read of {read.key} failed")

    def promote(self, ticket: int) -> bool:
        self.reads[ticket].speculative = False
        return self.reads[ticket].state == "queued"

    def cancel(self, ticket: int) -> bool:
        read = self.reads[ticket]
        assert read.state != "ended", f"ticket {ticket} has ended"
        if read.state != "queued":
            return False
        read.state = "cancelled"
        self.cancelled.append(read.key)
        return True

    def forget(self, ticket: int) -> bool:
        assert self.reads[ticket].state == "cancelled", "wait forgets what it waited for"
        self.reads[ticket].state = "ended"
        return True

    def addresses(self, key: ExpertKey, slot_address: int) -> tuple[int, ...]:
        return (slot_address, slot_address + self.layouts[key.layer_idx].region_offsets[1])

    def expert_bytes(self, key: ExpertKey) -> int:
        return self.layouts[key.layer_idx].expert_bytes

    def live(self) -> list[_Read]:
        return [read for read in self.reads.values() if read.state in ("queued", "reading", "done", "failed")]

    def advance(self) -> None:
        """Begin what can begin, demand first, and finish one of the reads that have begun."""
        queued = [read for read in self.reads.values() if read.state == "queued"]
        reading = [read for read in self.reads.values() if read.state == "reading"]
        for read in sorted(queued, key=lambda read: read.speculative):
            if len(reading) < self.concurrent_reads:
                read.state = "reading"
                reading.append(read)
        if reading:
            read = self.random.choice(reading)
            read.state = "failed" if read.key in self.failing else "done"
            self.contents[read.address] = GARBAGE if read.state == "failed" else read.key


class FakeArena:
    """An arena that notes which pages were given back."""

    address = ARENA_ADDRESS

    def __init__(self) -> None:
        self.given_back: list[tuple[int, int]] = []

    def give_back(self, offset: int, num_bytes: int) -> None:
        self.given_back.append((offset, num_bytes))


def make_layouts(
    num_layers: int, num_experts: int, intermediate_sizes: Sequence[int] = (16,)
) -> dict[int, ExpertLayout]:
    """Layers that take turns in their intermediate size: one pool per size."""
    layouts = {}
    for layer_idx in range(num_layers):
        size = intermediate_sizes[layer_idx % len(intermediate_sizes)]
        matrices = (MatrixFormat(GgmlType.F32, 2 * size, 32), MatrixFormat(GgmlType.F32, 32, size))
        layouts[layer_idx] = ExpertLayout(layer_idx, num_experts, RowOrder.GATE_UP, matrices)
    return layouts


def make_pool(layouts: Mapping[int, ExpertLayout], num_slots: int, top_k: int) -> PoolPlan:
    num_experts = sum(layout.num_experts for layout in layouts.values())
    slot_bytes = max(layout.slot_bytes for layout in layouts.values())
    staging = staging_slots(num_slots, num_experts, top_k)
    return PoolPlan(slot_bytes, tuple(sorted(layouts)), num_experts, num_slots, staging)
