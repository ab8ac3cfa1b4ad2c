"""What tune measures of the tiers: every figure is there and possible, and a time budget is kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe_offload import expert_bench, ops
from moe_offload.config import DEMO_MODEL, MIB
from moe_offload.expert_bench import READ_DEPTH, ExpertBench, median_of, reads_in_background
from moe_offload.measure import measure_machine, random_weights
from moe_offload.measure_tiers import (
    BUSY_TOKEN_COUNTS,
    DEPTHS,
    TOKEN_COUNTS,
    disk_by_depth,
    disk_by_size,
    disk_latency_s,
    expert_times,
    kernel_by_threads,
    pool_latencies,
    ram_by_threads,
    together,
)
from moe_offload.planning.time_budget import TimeBudget
from moe_offload.storage.checkpoint import Checkpoint, open_checkpoint


class Clock:
    """A clock that a step moves: tests wait for nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.01  # whoever looks at the clock has done something
        return self.now


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(DEMO_MODEL)


@pytest.fixture
def bench(checkpoint: Checkpoint) -> Iterator[ExpertBench]:
    with expert_bench.expert_bench(checkpoint) as bench:
        yield bench


def budget(seconds: float = 0.5) -> TimeBudget:
    return TimeBudget(seconds, Clock())


def test_memory_and_kernels_by_threads(checkpoint: Checkpoint) -> None:
    threads, weights = ops.num_threads(), random_weights(4 * MIB)
    curve = ram_by_threads(weights, budget())
    assert [count for count, _ in curve.points] == sorted(kernel_by_threads(checkpoint, weights, budget()))
    assert min(rate for _, rate in curve.points) > 0 and curve.source == "measured"
    assert ops.num_threads() == threads, "the pool is as it was"


def test_the_disk_by_size_and_depth(bench: ExpertBench) -> None:
    by_depth, by_size = disk_by_depth(bench, budget()), disk_by_size(bench, budget())
    assert [depth for depth, _ in by_depth.points] == list(DEPTHS)
    assert len(by_size.points) >= 2 and by_size.points[0][0] == 64 << 10
    assert min(rate for _, rate in (*by_depth.points, *by_size.points)) > 0
    assert disk_latency_s(bench, budget()) > 0


def test_experts_by_tokens_alone_and_busy(bench: ExpertBench) -> None:
    (alone,), (busy,) = (expert_times(bench, budget(), busy=busy) for busy in (False, True))
    assert [tokens for tokens, _ in alone.curve.points] == list(TOKEN_COUNTS) and not alone.busy
    assert [tokens for tokens, _ in busy.curve.points] == list(BUSY_TOKEN_COUNTS) and busy.busy
    assert (alone.format, alone.hidden_size, alone.moe_intermediate_size) == ("Q4_0", 256, 128)


def test_while_both_work_both_are_counted(bench: ExpertBench) -> None:
    read_before = bench.store.reader.counters()["bytes_read"]
    kernel, disk = together(bench, random_weights(4 * MIB), budget())
    assert kernel > 0 and disk > 1 and bench.store.reader.counters()["bytes_read"] > read_before


def test_reads_in_the_background_end_with_it(bench: ExpertBench) -> None:
    with reads_in_background(bench, True) as keep_reading:
        keep_reading()
        assert len(bench.store._keys) == READ_DEPTH
    assert not bench.store._keys


def test_the_pool_answers() -> None:
    figures = pool_latencies(budget())
    assert 0 < figures["launch_latency"].value < 0.1 and figures["sync_latency"].value > 0


def test_a_budget_is_cut_into_shares_and_kept() -> None:
    clock = Clock()
    whole = TimeBudget(10.0, clock)
    spent = []
    for share in whole.shares(4):
        calls = 0
        while not share.is_over:
            calls += 1
        spent.append(calls)
    assert whole.spent_s == pytest.approx(10.0, abs=0.3) and min(spent) > 0.8 * max(spent)
    assert whole.is_over and whole.share(0.5).seconds == pytest.approx(0.0, abs=1e-9)


def test_a_slow_step_is_not_repeated_for_ever() -> None:
    clock, calls = Clock(), []

    def slow() -> float:
        clock.now += 60.0
        calls.append(1)
        return 60.0

    assert median_of(slow, TimeBudget(1.0, clock)) == 60.0
    assert len(calls) == 2, "once to warm up, once to know"


def test_a_quick_look_at_the_machine_takes_little_memory(checkpoint: Checkpoint) -> None:
    speed = measure_machine(checkpoint, weights_bytes=2 * MIB)
    assert min(speed.ram_bytes_per_s, speed.disk_bytes_per_s, speed.macs_per_s or 0) > 0
