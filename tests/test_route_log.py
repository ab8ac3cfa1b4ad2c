"""The bounded log of routes, and the distance to Belady that follows from it."""

from __future__ import annotations

import json

import pytest
import torch

import moe_offload
from moe_offload import cli
from moe_offload.planning.eviction import make_policy
from moe_offload.replay import belady_hit_rate, replay
from moe_offload.residency.route_log import CHUNK_EVENTS, RouteLog
from moe_offload.storage.expert_format import ExpertKey


def make_log(max_bytes: int = 1 << 20) -> tuple[RouteLog, list[ExpertKey], list[int]]:
    residents: list[ExpertKey] = []
    counters = [0, 0]
    log = RouteLog(lambda: residents, lambda: (counters[0], counters[1]), {0: 8, 3: 8}, max_bytes)
    return log, residents, counters


def test_events_come_back_as_they_were_with_who_was_there_before() -> None:
    log, residents, counters = make_log()
    residents[:] = [ExpertKey(3, 1)]
    counters[:] = [5, 9]
    log.add(0, [2, 5])
    residents.append(ExpertKey(0, 2))
    log.add(3, [1, 6, 7], [300, 1, 2])
    log.add(0, [1])
    log.add(3, [0, 4, 7], None, [7, 0])
    events, (before,) = log.events()
    assert events == [
        (0, [2, 5], None, []),
        (3, [1, 6, 7], [300, 1, 2], []),
        (0, [1], None, []),
        (3, [0, 4, 7], None, [0, 7]),
    ]
    assert (before.keys(), before.hits, before.needs) == ([ExpertKey(3, 1)], 5, 9)


def test_each_chunk_knows_where_the_tier_above_stood() -> None:
    log, residents, counters = make_log(max_bytes=1)
    above, served = [ExpertKey(3, 4)], [0, 0]
    log.watch_above(lambda: above, lambda: (served[0], served[1]))
    for number in range(CHUNK_EVENTS):
        log.add(0, [number % 8])
    above[:], served[:] = [ExpertKey(0, 6)], [7, 8]
    residents[:], counters[:] = [ExpertKey(0, 5)], [1, 2]
    log.add(3, [4])
    events, marks = log.events()
    assert events == [(3, [4], None, [])]
    assert [(mark.keys(), mark.hits, mark.needs) for mark in marks] == [
        ([ExpertKey(0, 5)], 1, 2),
        ([ExpertKey(0, 6)], 7, 8),
    ]


def test_steps_noted_together_are_noted_as_one_by_one_and_only_where_no_chunk_ends() -> None:
    log, residents, counters = make_log()
    residents[:], counters[:] = [ExpertKey(3, 1)], [5, 9]
    assert log.add_steps([(0, [2, 5], [0.5, 0.5]), (3, [1], None)])
    events, (before,) = log.events()
    assert events == [(0, [2, 5], None, []), (3, [1], None, [])]
    assert (before.keys(), before.hits, before.needs) == ([ExpertKey(3, 1)], 5, 9)
    for number in range(CHUNK_EVENTS - 2):
        log.add(0, [number % 8])
    assert not log.add_steps([(0, [1], None), (3, [4], None)])
    assert len(log.events()[0]) == CHUNK_EVENTS


def test_old_chunks_are_dropped_and_the_rest_starts_at_its_own_chunk() -> None:
    log, residents, counters = make_log(max_bytes=3 * 2 * 4 * CHUNK_EVENTS)
    for number in range(5 * CHUNK_EVENTS):
        counters[:] = [number, number]
        residents[:] = [ExpertKey(0, number // CHUNK_EVENTS)]
        log.add(0, [number % 8])
    events, (before,) = log.events()
    first = 5 * CHUNK_EVENTS - len(events)
    assert CHUNK_EVENTS <= len(events) <= 3 * CHUNK_EVENTS
    assert events[0] == (0, [first % 8], None, [])
    assert (before.keys(), before.hits) == ([ExpertKey(0, first // CHUNK_EVENTS)], first)


def test_heat_counts_tokens_and_fades() -> None:
    log, _, _ = make_log()
    log.add(3, [1, 2], [10, 30])
    log.add(3, [2])
    log.pack()
    assert log.heat[3].tolist() == [0, 10, 31, 0, 0, 0, 0, 0]
    for _ in range(CHUNK_EVENTS):
        log.add(0, [0])
    assert 0 < log.heat[3][1] < 10 and log.heat[0][0] == CHUNK_EVENTS


@pytest.fixture(scope="module")
def model():
    model = moe_offload.from_pretrained(experts="25%", ram="8GiB", context=256, prefetch=False)
    yield model
    model.offload.close()


def test_a_runs_distance_to_belady_is_that_of_its_recorded_trace(model) -> None:
    """The same run measured two ways: by the log that the cache keeps, and by replaying its trace file."""
    prompt = moe_offload.load_tokenizer(None)(
        "The old bridge over the river was measured in the spring", return_tensors="pt"
    )
    with model.offload.trace() as recorder:
        model.generate(**prompt, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    stats = model.offload.stats(belady=True)
    trace = recorder.trace()
    plan, expert_bytes = model.offload.plan, dict.fromkeys(trace.layers, 1)
    assert (
        stats.window_hit_rate
        == replay(trace, plan.pools, lambda: make_policy("horizon"), expert_bytes).hit_rate
    )
    assert stats.belady_hit_rate == pytest.approx(belady_hit_rate(trace, plan.pools, expert_bytes))
    assert stats.below_belady is not None and 0 < stats.below_belady < 0.5


def test_a_window_that_begins_in_the_middle_of_a_run_is_still_bounded_by_belady(model) -> None:
    prompt = moe_offload.load_tokenizer(None)("A list of words", return_tensors="pt")
    log = model.offload.cache.log
    log._max_bytes = 1  # keep one chunk
    torch.manual_seed(0)
    model.generate(**prompt, max_new_tokens=200, min_new_tokens=200, do_sample=True)
    stats = model.offload.stats(belady=True)
    assert len(log.events()[0]) < 200 * 12
    assert 0 < stats.below_belady < 0.5


def test_the_command_line_prints_the_account(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "generate",
        "--raw",
        "--prompt",
        "Once upon a time there was",
        "--experts",
        "25%",
        "--ram",
        "8GiB",
    ]
    assert cli.main([*command, "--max-new-tokens", "12", "--stats"]) == 0
    account = capsys.readouterr().err
    names = {line.split()[0]: line.split(maxsplit=1)[1] for line in account.splitlines() if " " in line}
    for name in ("hit_rate", "prefetch_accuracy", "bytes_read", "stall_s", "belady_hit_rate", "below_belady"):
        assert json.loads(names[name].strip()) is not None, name
    assert names["prefetch_state"].split()[0].rstrip(":") in ("on", "off")


def test_where_every_expert_has_a_slot_no_policy_does_better() -> None:
    model = moe_offload.from_pretrained(experts="all", ram="8GiB", context=64)
    prompt = moe_offload.load_tokenizer(None)("A list of words", return_tensors="pt")
    model.generate(**prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    stats = model.offload.stats(belady=True)
    model.offload.close()
    assert stats.window_hit_rate is not None and stats.below_belady == 0.0
