"""What tune measures of a device, on the emulated one, whose link is known."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_offload import _native, expert_bench, tune
from moe_offload.config import DEMO_MODEL, MIB
from moe_offload.device import load_profile
from moe_offload.errors import ConfigError
from moe_offload.expert_bench import ExpertBench
from moe_offload.measure_device import TOKEN_COUNTS, measure_device
from moe_offload.planning.profile_speed import profile_speed
from moe_offload.planning.time_budget import TimeBudget
from moe_offload.profile_schema import FIGURES
from moe_offload.profile_write import write_profile
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.tune_profile import assemble
from moe_offload.tune_stage import Stage
from moe_offload.tune_tiers import measure_all

LINK_BYTES_PER_S, TO_HOST_BYTES_PER_S, LATENCY_S = 200e6, 50e6, 1e-4


@pytest.fixture(scope="module")
def bench() -> Iterator[ExpertBench]:
    with expert_bench.expert_bench(open_checkpoint(DEMO_MODEL)) as bench:
        yield bench


def budget() -> TimeBudget:
    """Ends at once: every measurement is made the least number of times."""
    return TimeBudget(0.5, itertools.count(0.0, 0.01).__next__)


def test_link_experts_and_latencies(bench: ExpertBench) -> None:
    device = _native.EmulatedDevice(
        4 * MIB, LINK_BYTES_PER_S, LATENCY_S, to_host_bytes_per_s=TO_HOST_BYTES_PER_S
    )
    try:
        found = measure_device(device, bench, budget())
    finally:
        device.close()
    link, gpu = found.figures["link"], found.figures["gpu"]
    # A throttled link may be slower than it says where the machine is busy, never faster.
    assert 0 < link["to_device_bandwidth"].value <= 1.05 * LINK_BYTES_PER_S
    assert 0 < link["to_device_bandwidth_busy"].value <= 1.05 * LINK_BYTES_PER_S
    assert 0 < link["to_host_bandwidth"].value <= 1.05 * TO_HOST_BYTES_PER_S
    assert 0 < link["to_host_bandwidth_busy"].value <= 1.05 * TO_HOST_BYTES_PER_S
    assert link["latency"].value >= LATENCY_S
    assert gpu["vram"].value == 4 * MIB
    assert min(gpu[name].value for name in ("read_bandwidth", "launch_latency", "sync_latency")) > 0
    time, busy = found.expert_times
    assert (time.busy, busy.busy) == (False, True)
    assert min(gpu[f"{name}_latency_busy"].value for name in ("launch", "sync")) > 0
    assert [tokens for tokens, _ in time.curve.points] == list(TOKEN_COUNTS)
    assert time.curve.points[-1][1] > 0 and (time.format, time.hidden_size) == ("Q4_0", 256)
    assert all(set(figures) <= set(FIGURES[section]) for section, figures in found.figures.items())


def test_a_device_without_room_for_an_expert_is_refused(bench: ExpertBench) -> None:
    device = _native.EmulatedDevice(4096, LINK_BYTES_PER_S, LATENCY_S)
    try:
        with pytest.raises(ConfigError, match="and an expert takes"):
            measure_device(device, bench, budget())
    finally:
        device.close()


def test_a_profile_holds_both_sides(tmp_path: Path) -> None:
    device = _native.EmulatedDevice(4 * MIB, LINK_BYTES_PER_S, LATENCY_S)
    checkpoint = open_checkpoint(DEMO_MODEL)
    try:
        tiers = measure_all(checkpoint, budget(), lambda what, share: None, device=device)
    finally:
        device.close()
    default = tune.default_choice(checkpoint)
    profile = assemble("both", "test", "key", tiers, [Stage("all", default, default)], 1.0)
    write_profile(tmp_path / "both.toml", profile)
    again = load_profile(tmp_path / "both.toml")
    assert again.has("gpu") and again.has("link")
    measured_s = tiers.figures["model"]["submit_time"].value
    assert measured_s > 0 and profile_speed(again).submit_s == pytest.approx(measured_s, rel=1e-3)
    assert {time.device for time in again.expert_times} == {"cpu", device.name}
