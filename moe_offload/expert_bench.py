"""A model's own experts in memory, a reader on its file, and a stop-watch: what `tune` measures with."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from moe_offload.config import MIB
from moe_offload.planning.time_budget import Clock, TimeBudget
from moe_offload.residency.memory import available_bytes
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.expert_format import ExpertKey, ExpertLayout
from moe_offload.storage.expert_store import ExpertStore
from moe_offload.storage.io import Arena, open_reader

BENCH_BYTES = 192 * MIB  # of experts to take turns: several times a last-level cache
READ_DEPTH = 8  # reads in flight where something else is measured
LEAST_SLOTS = 16
LEAST_RUNS, MOST_RUNS = 3, 200


class ExpertBench:
    """Experts of the checkpoint in memory, a reader on its file, and kernels for its shapes.

    Attributes:
        num_slots: experts in memory at the same time, as many of each shape as there is room for.
    """

    def __init__(self, checkpoint: Checkpoint, clock: Clock = time.perf_counter) -> None:
        self.checkpoint, self.clock = checkpoint, clock
        self.keys = list(checkpoint.experts.spans)
        layouts = checkpoint.experts.layouts
        self.slot_bytes = max(layout.slot_bytes for layout in layouts.values())
        room_bytes = min(BENCH_BYTES, available_bytes() // 4)
        self.num_slots = max(LEAST_SLOTS, min(len(self.keys), room_bytes // self.slot_bytes))
        self.arena = Arena(self.num_slots * self.slot_bytes)
        self.store = ExpertStore(checkpoint.experts, checkpoint.files, open_reader())
        self.order: list[int] = np.random.default_rng(0).permutation(len(self.keys)).tolist()
        self._next = 0

    def close(self) -> None:
        """Give files, threads and memory back."""
        self.store.close()
        self.arena.close()

    def slot(self, number: int) -> int:
        """Return the address of a slot."""
        return self.arena.address + number % self.num_slots * self.slot_bytes

    def shapes(self) -> dict[tuple[str, int, int], ExpertLayout]:
        """Return one layer's layout for each (formats, hidden_size, moe_intermediate_size)."""
        found: dict[tuple[str, int, int], ExpertLayout] = {}
        for layout in self.checkpoint.experts.layouts.values():
            found.setdefault((format_name(layout), layout.hidden_size, layout.moe_intermediate_size), layout)
        return found

    def load(self, layout: ExpertLayout, most: int) -> list[NDArray[np.uint64]]:
        """Read experts of a layout's shape into the first slots; return the addresses of their matrices."""
        layouts = self.checkpoint.experts.layouts
        same = [key for key in self.keys if layouts[key.layer_idx].matrices == layout.matrices]
        for number, key in enumerate(same[: max(1, most)]):
            self.store.wait(self.store.read(key, self.slot(number), speculative=False))
        return [
            np.array([self.store.addresses(key, self.slot(number))], np.uint64)
            for number, key in enumerate(same[: max(1, most)])
        ]

    def next_key(self) -> ExpertKey:
        """Return experts in an order that no cache or read-ahead knows."""
        self._next += 1
        return self.keys[self.order[self._next % len(self.keys)]]


@contextmanager
def expert_bench(checkpoint: Checkpoint, clock: Clock = time.perf_counter) -> Iterator[ExpertBench]:
    """Open a bench and close it on the way out."""
    bench = ExpertBench(checkpoint, clock)
    try:
        yield bench
    finally:
        bench.close()


def format_name(layout: ExpertLayout) -> str:
    """Return the formats of an expert's matrices: "Q4_0", or "Q4_K+Q6_K" where they differ."""
    return "+".join(dict.fromkeys(matrix.ggml_type.name for matrix in layout.matrices))


@contextmanager
def reads_in_background(bench: ExpertBench, wanted: bool) -> Iterator[Callable[[], None]]:
    """Yield a function that keeps ``READ_DEPTH`` experts being read into the last slots; call it often."""
    tickets: list[int] = []
    first, turn = bench.num_slots - READ_DEPTH, 0

    def keep_reading() -> None:
        nonlocal turn
        while tickets and bench.store.done(tickets[0]):
            bench.store.wait(tickets.pop(0))
        while wanted and len(tickets) < READ_DEPTH:
            slot = bench.slot(first + turn % READ_DEPTH)
            tickets.append(bench.store.read(bench.next_key(), slot, speculative=False))
            turn += 1

    try:
        keep_reading()
        yield keep_reading
    finally:
        for ticket in tickets:
            bench.store.wait(ticket)


@contextmanager
def work_in_background(work: Callable[[], object] | None) -> Iterator[None]:
    """Let another thread repeat ``work``, which has begun when this yields; None: nothing is repeated."""
    if work is None:
        yield
        return
    ended, begun = threading.Event(), threading.Event()

    def repeat() -> None:
        while not ended.is_set():
            begun.set()
            work()

    worker = threading.Thread(target=repeat, daemon=True)
    worker.start()
    try:
        begun.wait()
        yield
    finally:
        ended.set()
        worker.join()


def timed(function: Callable[[], object], after: Callable[[], None] | None = None) -> Callable[[], float]:
    """Return a function that runs ``function`` and returns its seconds; ``after`` is not timed."""

    def run() -> float:
        started = time.perf_counter()
        function()
        seconds = time.perf_counter() - started
        if after is not None:
            after()
        return seconds

    return run


def median_of(measure: Callable[[], float], budget: TimeBudget) -> float:
    """Return the median of ``measure``, first call left out, until the budget's end or MOST_RUNS."""
    measure()
    values: list[float] = []
    while len(values) < LEAST_RUNS or (len(values) < MOST_RUNS and not budget.is_over):
        values.append(measure())
        if budget.is_far_over:
            break
    return statistics.median(values)
