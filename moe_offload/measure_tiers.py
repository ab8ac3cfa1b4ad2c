"""What each tier gives, alone and while the others work: for `tune`, on the model's own experts.

Every measurement is the code that the runtime runs, takes medians, and ends with its share of a time
budget: a slow disk makes it coarser, never longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from moe_offload import ops
from moe_offload.config import MIB
from moe_offload.expert_bench import (
    LEAST_RUNS,
    READ_DEPTH,
    ExpertBench,
    median_of,
    reads_in_background,
    timed,
    work_in_background,
)
from moe_offload.expert_ops import Activation, ExpertKernel
from moe_offload.measure import COLS, main_format
from moe_offload.planning.time_budget import TimeBudget
from moe_offload.planning.tuning import thread_counts
from moe_offload.profile_schema import Curve, ExpertTime, Figure
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.expert_format import (
    DIRECT_IO_ALIGNMENT_BYTES,
    ExpertLayout,
    GgmlType,
    row_bytes,
)
from moe_offload.storage.expert_store import WAIT_S
from moe_offload.storage.io import DirectReader

DEPTHS = (1, 2, 4, 8, 16)
READ_SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
TOKEN_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
BUSY_TOKEN_COUNTS = (1, 8, 64)
LEAST_LATENCY_S = 1e-7  # what a stop-watch can tell
SLEEP_S = 0.01  # after which the pool's workers sleep
WHILE_READING, WHILE_BUSY = "while experts were read from the disk", "while the CPU multiplied"


def ram_by_threads(weights: torch.Tensor, budget: TimeBudget, busy: ExpertBench | None = None) -> Curve:
    """Return bytes per second that 1 ... all threads read together; the pool is as before afterwards.

    Args:
        busy: whose experts are read from the disk meanwhile.
    """
    before, points = ops.num_threads(), []
    counts = sorted(thread_counts(ops.usable_cores()))
    try:
        for count, share in zip(counts, budget.shares(len(counts)), strict=True):
            ops.set_num_threads(count)
            with _reads_beside(busy) as keep_reading:

                def read(keep_reading: Callable[[], None] = keep_reading) -> float:
                    keep_reading()
                    return ops.read_bandwidth(weights)

                points.append((float(count), median_of(read, share)))
    finally:
        ops.set_num_threads(before)
    note = f"reading {weights.numel() // MIB} MiB" + (f", {WHILE_READING}" if busy else "")
    return Curve(tuple(points), "measured", note)


@contextmanager
def _reads_beside(bench: ExpertBench | None) -> Iterator[Callable[[], None]]:
    """Yield what keeps experts of ``bench`` being read; nothing does without one."""
    if bench is None:
        yield lambda: None
        return
    with reads_in_background(bench, True) as keep_reading:
        yield keep_reading


def products(checkpoint: Checkpoint, weights: torch.Tensor) -> Callable[[], object]:
    """Return what keeps the CPU busy: one token's product with 16 MiB of the model's main format."""
    ggml_type = main_format(checkpoint)
    rows = min(weights.numel(), 16 * MIB) // row_bytes(ggml_type, COLS)
    packed, x = weights[: rows * row_bytes(ggml_type, COLS)], torch.randn(1, COLS)
    return lambda: ops.linear(x, packed, ggml_type, rows, COLS)


def kernel_by_threads(checkpoint: Checkpoint, weights: torch.Tensor, budget: TimeBudget) -> dict[int, float]:
    """Return bytes of weights per second of one token's matrix product, by number of threads."""
    ggml_type = main_format(checkpoint)
    rows = weights.numel() // row_bytes(ggml_type, COLS)
    packed, x = weights[: rows * row_bytes(ggml_type, COLS)], torch.randn(1, COLS)
    before, result = ops.num_threads(), {}
    counts = thread_counts(ops.usable_cores())
    try:
        for count, share in zip(counts, budget.shares(len(counts)), strict=True):
            ops.set_num_threads(count)
            seconds = median_of(timed(lambda: ops.linear(x, packed, ggml_type, rows, COLS)), share)
            result[count] = packed.numel() / seconds
    finally:
        ops.set_num_threads(before)
    return result


def disk_by_depth(
    bench: ExpertBench, budget: TimeBudget, beside: Callable[[], object] | None = None
) -> Curve:
    """Return bytes per second of whole experts, by how many are read at the same time.

    Args:
        beside: what the CPU repeats meanwhile.
    """
    with work_in_background(beside):
        points = [
            (float(depth), _expert_reads(bench, depth, share))
            for depth, share in zip(DEPTHS, budget.shares(len(DEPTHS)), strict=True)
        ]
    note = f"experts of {_expert_bytes(bench)} bytes, in random order" + (f", {WHILE_BUSY}" if beside else "")
    return Curve(tuple(points), "measured", note)


def _expert_bytes(bench: ExpertBench) -> int:
    return max(layout.expert_bytes for layout in bench.checkpoint.experts.layouts.values())


def _expert_reads(bench: ExpertBench, depth: int, budget: TimeBudget) -> float:
    tickets: list[int] = []
    started, num_bytes = bench.clock(), 0
    for number in range(1 << 30):
        if len(tickets) == depth:
            bench.store.wait(tickets.pop(0))
        if number >= 2 * depth and budget.is_over:
            break
        key = bench.next_key()
        tickets.append(bench.store.read(key, bench.slot(number % depth), speculative=False))
        num_bytes += bench.store.expert_bytes(key)
    for ticket in tickets:
        bench.store.wait(ticket)
    return num_bytes / (bench.clock() - started)


def disk_by_size(bench: ExpertBench, budget: TimeBudget, beside: Callable[[], object] | None = None) -> Curve:
    """Return bytes per second of reads at random places of the model's file, by their size.

    Args:
        beside: what the CPU repeats meanwhile.
    """
    with work_in_background(beside):
        points = _reads_by_size(bench, budget)
    note = f"{READ_DEPTH} reads in flight" + (f", {WHILE_BUSY}" if beside else "")
    return Curve(tuple(points), "measured", note)


def _reads_by_size(bench: ExpertBench, budget: TimeBudget) -> list[tuple[float, float]]:
    reader, file_bytes = bench.store.reader, bench.store.reader.file_bytes(0)
    most = bench.arena.num_bytes // READ_DEPTH
    sizes = [size for size in READ_SIZES if size <= min(most, file_bytes)] or [DIRECT_IO_ALIGNMENT_BYTES]
    chooser, points = np.random.default_rng(1), []
    for size, share in zip(sizes, budget.shares(len(sizes)), strict=True):
        tickets: list[int] = []
        started, num_reads = bench.clock(), 0
        while num_reads < 2 * READ_DEPTH or not share.is_over:
            if len(tickets) == READ_DEPTH:
                _finish(reader, tickets.pop(0))
            page = int(chooser.integers(0, max(1, (file_bytes - size) // DIRECT_IO_ALIGNMENT_BYTES + 1)))
            region = num_reads % READ_DEPTH * size
            span = np.array([[0, page * DIRECT_IO_ALIGNMENT_BYTES, size, region]], np.int64)
            tickets.append(reader.submit(span, False, bench.arena.address))
            num_reads += 1
        for ticket in tickets:
            _finish(reader, ticket)
        points.append((float(size), num_reads * size / (bench.clock() - started)))
    return points


def _finish(reader: DirectReader, ticket: int) -> None:
    while not reader.wait(ticket, WAIT_S):
        pass
    reader.forget(ticket)


def disk_latency_s(bench: ExpertBench, budget: TimeBudget) -> float:
    """Return the median seconds of one read of a page, nothing else being read."""
    reader, file_bytes = bench.store.reader, bench.store.reader.file_bytes(0)
    chooser = np.random.default_rng(2)

    def read_page() -> float:
        page = int(chooser.integers(0, max(1, file_bytes // DIRECT_IO_ALIGNMENT_BYTES)))
        size = min(DIRECT_IO_ALIGNMENT_BYTES, file_bytes)
        span = np.array([[0, page * DIRECT_IO_ALIGNMENT_BYTES, size, 0]], np.int64)
        started = bench.clock()
        _finish(reader, reader.submit(span, False, bench.arena.address))
        return bench.clock() - started

    return median_of(read_page, budget)


def expert_times(bench: ExpertBench, budget: TimeBudget, *, busy: bool) -> list[ExpertTime]:
    """Return the CPU's seconds for one expert by its number of tokens, for each shape of the model.

    Args:
        busy: experts are being read from the disk meanwhile.
    """
    shapes = bench.shapes()
    counts = BUSY_TOKEN_COUNTS if busy else TOKEN_COUNTS
    shares = budget.shares(len(shapes) * len(counts))
    return [
        ExpertTime(
            device="cpu",
            format=name,
            hidden_size=hidden_size,
            moe_intermediate_size=intermediate_size,
            curve=_expert_curve(bench, layout, counts, shares, busy),
            busy=busy,
        )
        for (name, hidden_size, intermediate_size), layout in shapes.items()
    ]


def _expert_curve(
    bench: ExpertBench, layout: ExpertLayout, counts: Sequence[int], shares: Iterator[TimeBudget], busy: bool
) -> Curve:
    kernel = ExpertKernel(layout, Activation())
    resident = bench.load(layout, bench.num_slots - (READ_DEPTH if busy else 0))
    turn = 0
    points = []
    for count in counts:
        hidden = torch.randn(count, layout.hidden_size)
        tokens, offsets = np.arange(count, dtype=np.int32), np.array([0, count], np.int32)

        def run(
            hidden: torch.Tensor = hidden,
            offsets: NDArray[np.int32] = offsets,
            tokens: NDArray[np.int32] = tokens,
        ) -> object:
            nonlocal turn
            turn += 1
            addresses = resident[turn % len(resident)]
            return kernel.rows(hidden, np.zeros(1, np.int32), addresses, offsets, tokens)

        with reads_in_background(bench, busy) as keep_reading:
            points.append((float(count), median_of(timed(run, keep_reading), next(shares))))
    note = f"{ops.num_threads()} threads" + (", while experts were read from the disk" if busy else "")
    return Curve(tuple(points), "measured", note)


def together(bench: ExpertBench, weights: torch.Tensor, budget: TimeBudget) -> tuple[float, float]:
    """Return bytes per second of (the decode kernel, the disk) while both work."""
    ggml_type = main_format(bench.checkpoint)
    rows = min(weights.numel(), 16 * MIB) // row_bytes(ggml_type, COLS)
    part_bytes, x = rows * row_bytes(ggml_type, COLS), torch.randn(1, COLS)
    parts = max(1, weights.numel() // part_bytes)
    with reads_in_background(bench, True) as keep_reading:
        read_before = bench.store.reader.counters()["bytes_read"]
        started, turns = bench.clock(), 0
        while turns < LEAST_RUNS or not budget.is_over:
            part = turns % parts * part_bytes
            ops.linear(x, weights[part : part + part_bytes], ggml_type, rows, COLS)
            keep_reading()
            turns += 1
        elapsed_s = bench.clock() - started
        read_after = bench.store.reader.counters()["bytes_read"]
    return turns * part_bytes / elapsed_s, max(1.0, (read_after - read_before) / elapsed_s)


def pool_latencies(budget: TimeBudget, busy: ExpertBench | None = None) -> dict[str, Figure]:
    """Return what the smallest op costs, and what it costs more when the pool's workers sleep.

    Args:
        busy: whose experts are read from the disk meanwhile; the figures' names end in "_busy" then.
    """
    weights, x = torch.zeros(64 * 64, dtype=torch.float32).view(torch.uint8), torch.randn(1, 64)

    def launch() -> object:
        return ops.linear(x, weights, GgmlType.F32, 64, 64)

    shares = budget.shares(2)
    with _reads_beside(busy) as keep_reading:

        def launch_asleep() -> float:
            keep_reading()
            time.sleep(SLEEP_S)
            return timed(launch)()

        launch_s = median_of(timed(launch, keep_reading), next(shares))
        wake_s = max(0.0, median_of(launch_asleep, next(shares)) - launch_s)
    suffix, note = ("_busy", f", {WHILE_READING}") if busy else ("", "")
    return {
        f"launch_latency{suffix}": Figure(launch_s, "measured", f"a 64 x 64 product, from Python{note}"),
        f"sync_latency{suffix}": Figure(
            max(LEAST_LATENCY_S, wake_s), "measured", f"more, when the workers sleep{note}"
        ),
    }
