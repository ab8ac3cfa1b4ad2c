"""What is admitted, in which order; and a switch that finds out what pays."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.planning.gain_switch import (
    AGREEING_PROBES,
    BLOCK_STEPS,
    LEAST_PROBES,
    LEAST_STEPS,
    GainSwitch,
)
from moe_offload.planning.prefetch_plan import (
    HIGHEST,
    LOWEST,
    WASTE_TARGET,
    Guess,
    Threshold,
    break_even,
    plan_reads,
)
from moe_offload.residency.prefetch_pace import Pace
from moe_offload.storage.expert_format import ExpertKey

GUESSES = st.lists(
    st.builds(
        Guess,
        st.builds(ExpertKey, st.integers(0, 5), st.integers(0, 15)),
        st.floats(0, 1),
        st.integers(1, 100),
        st.integers(1, 4),
    ),
    max_size=12,
    unique_by=lambda guess: guess.key,
)


@settings(deadline=None)
@given(GUESSES, st.integers(0, 200), st.integers(0, 100), st.floats(0, 1))
def test_a_plan_fills_a_window_and_leaves_out_nothing_that_begins_in_it(
    guesses: list[Guess], queued_bytes: int, window_bytes: int, threshold: float
) -> None:
    keys = plan_reads(guesses, queued_bytes=queued_bytes, window_bytes=window_bytes, threshold=threshold)
    of = {guess.key: guess for guess in guesses}
    assert len(set(keys)) == len(keys) and set(keys) <= set(of)
    order = [(of[key].windows, -of[key].probability) for key in keys]
    assert order == sorted(order), "earliest deadline first, then the more probable"
    total = queued_bytes
    for key in keys:
        assert of[key].probability >= threshold
        assert total <= window_bytes, "begins before the next layer has routed"
        total += of[key].num_bytes
    left_out = {guess for guess in guesses if guess.probability >= threshold} - {of[key] for key in keys}
    assert not left_out or total > window_bytes
    assert all((g.windows, -g.probability) >= order[-1] for g in left_out if order)


def test_an_unmeasured_link_admits_by_probability_alone() -> None:
    guesses = [Guess(ExpertKey(1, i), i / 10, 1 << 30, 1) for i in range(10)]
    keys = plan_reads(guesses, queued_bytes=1e12, window_bytes=math.inf, threshold=0.6)
    assert [key.expert_id for key in keys] == [9, 8, 7, 6]


def test_break_even_rises_as_reads_get_shorter() -> None:
    """A read of 1 ms holds a demand up by an eighth of it; asking costs 20 us."""
    assert break_even(1e-3, 2e-5) == pytest.approx((125 + 20) / (1000 + 125))
    assert break_even(1e-4, 2e-5) > break_even(1e-3, 2e-5)
    assert break_even(1e-3, 2e-5, 1.0) == pytest.approx((1000 + 20) / (1000 + 1000)), "a read for a read"
    assert break_even(1e-9, 2e-5) == break_even(0.0, 2e-5) == HIGHEST


def test_the_link_is_busy_for_as_long_as_what_steps_need_takes() -> None:
    """Ten layers of 1 ms and a stall of 2 ms in which 6 MB were needed, at 1 GB/s: half of the time."""
    now = itertools.count(0.0, 1e-3)
    pace = Pace(None, None, lambda: next(now))
    pace.bytes_per_s, needed, stalled_s = 1e9, 0, 0.0
    pace.look(0.0)
    for _ in range(40):
        for _ in range(10):
            pace.look(0.0)
        needed, stalled_s = needed + 6_000_000, stalled_s + 2e-3
        pace.measure_needs(needed, stalled_s)
    assert pace.busy_share == pytest.approx(0.5, abs=0.01)


@given(st.floats(0.02, 0.9))
def test_the_threshold_settles_where_no_more_than_the_target_is_wasted(precision_slope: float) -> None:
    """Guesses above a threshold t are wrong with (1 - t) * slope, as calibrated ones are."""
    threshold, read, wasted = Threshold(), 0, 0
    shares = []
    for _ in range(100):
        share = (1 - threshold.value) * precision_slope
        read, wasted = read + 10**6, wasted + int(share * 10**6)
        threshold.update(read, wasted, lowest=0.0)
        shares.append(share)
        assert LOWEST <= threshold.value <= HIGHEST
    assert sum(shares[50:]) / 50 <= max(WASTE_TARGET, 0.05 * precision_slope) + 0.05 * precision_slope


def test_the_threshold_stands_still_while_nothing_is_read() -> None:
    threshold = Threshold()
    before = threshold.value
    threshold.update(0, 0, lowest=0.0)
    assert threshold.value == before


def run(
    switch: GainSwitch,
    num_steps: int,
    on_s: float,
    off_s: float,
    noise: float,
    *,
    miss_s: float = 0.0,
    seed: int = 0,
) -> int:
    """Return how many of the steps were on; a step misses 0 to 20 experts, of ``miss_s`` each."""
    generator, count = random.Random(seed), 0
    for _ in range(num_steps):
        count += switch.is_on
        needs = generator.randint(0, 20)
        step_s = (on_s if switch.is_on else off_s) * generator.uniform(1 - noise, 1 + noise)
        switch.record(step_s + needs * miss_s, needs)
    return count


def test_a_first_trial_takes_turns_and_leaves_out_what_follows_a_turn() -> None:
    switch, seen = GainSwitch(), []
    for step in range(2 * BLOCK_STEPS * LEAST_PROBES):
        seen.append(switch.is_on)
        switch.record(100.0 if step % BLOCK_STEPS == 0 else (1.08 if switch.is_on else 1.0))
    order = [True, False, False, True] * (LEAST_PROBES // 2)
    assert seen == [on for on in order for _ in range(BLOCK_STEPS)]
    assert switch.gain == pytest.approx(-0.08) and not switch.decision and not switch.is_on


def test_a_first_trial_is_short_where_every_probe_agrees() -> None:
    switch, num_off = GainSwitch(), 0
    for _ in range(2 * BLOCK_STEPS * AGREEING_PROBES):
        num_off += not switch.is_on
        switch.record(1.0 if switch.is_on else 1.08)
    assert num_off == BLOCK_STEPS * AGREEING_PROBES and not switch.is_trying
    assert switch.gain == pytest.approx(0.08 / 1.08) and switch.decision and switch.is_on


def test_a_probe_that_confirms_what_is_done_ends_early() -> None:
    switch, num_off = GainSwitch(), []
    for _ in range(400):
        num_off.append(not switch.is_on)
        switch.record(1.0 if switch.is_on else 1.05)
    first_trial = 2 * BLOCK_STEPS * AGREEING_PROBES
    assert sum(num_off[:first_trial]) == BLOCK_STEPS * AGREEING_PROBES
    probes = [len(steps) for is_off, steps in groups(num_off[first_trial:]) if is_off]
    assert len(probes) >= 3 and sum(probes) <= len(probes) * BLOCK_STEPS
    assert 1 + LEAST_STEPS in probes, "where the block without it comes second"


def groups(values: list[bool]) -> list[tuple[bool, list[bool]]]:
    return [(key, list(group)) for key, group in itertools.groupby(values)]


def test_probes_that_disagree_are_followed_by_more() -> None:
    switch = GainSwitch()
    for step in range(2 * BLOCK_STEPS * AGREEING_PROBES):
        slower_s = 1.08 if step < 2 * BLOCK_STEPS else 0.92
        switch.record(1.0 if switch.is_on else slower_s)
    assert switch.is_trying


@pytest.mark.parametrize(("on_s", "expected"), [(0.8, True), (0.95, True), (1.06, False), (1.5, False)])
def test_it_keeps_what_is_faster_and_spends_little_on_finding_out(on_s: float, expected: bool) -> None:
    switch = GainSwitch()
    run(switch, 64, on_s, 1.0, noise=0.05)
    count = run(switch, 2000, on_s, 1.0, noise=0.05)
    assert switch.decision is expected
    assert (count if expected else 2000 - count) > 0.93 * 2000


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("on_s", "expected"), [(0.9, True), (1.1, False)])
def test_what_a_step_missed_is_not_blamed_on_it(on_s: float, expected: bool, seed: int) -> None:
    """Misses change a step's time ten times as much as what is judged does."""
    switch = GainSwitch()
    run(switch, 300, on_s, 1.0, noise=0.02, miss_s=0.1, seed=seed)
    assert switch.decision is expected
    assert switch.gain == pytest.approx((1.0 - on_s) / 2.0, abs=0.03)  # of a step of 2: 1 and 10 misses


def test_noise_alone_does_not_switch_it_off() -> None:
    """On a busy machine a step takes up to three times as long, on or off."""
    generator, wrong = random.Random(1), 0
    for _ in range(20):
        switch = GainSwitch()
        for _ in range(600):
            base_s = 0.85 if switch.is_on else 1.0
            switch.record(base_s * (1.0 + 2.0 * generator.random() ** 3))
        wrong += not switch.decision
    assert wrong <= 3


@pytest.mark.parametrize(("on_s", "expected"), [(0.85, True), (1.06, False)])
def test_a_disk_that_hesitates_does_not_decide(on_s: float, expected: bool) -> None:
    """Every eighty steps or so, eight in a row take twenty times as long, whatever is done."""
    right = 0
    for seed in range(20):
        generator, switch, left = random.Random(seed), GainSwitch(), 0
        for step in range(800):
            left = max(0, left - 1) if left or generator.random() > 1 / 80 else 8
            base_s = on_s if switch.is_on else 1.0
            switch.record(base_s * generator.uniform(0.9, 1.1) * (20.0 if left else 1.0))
            right += step >= 150 and switch.decision is expected
    assert right > 0.8 * 20 * 650


def test_it_changes_its_mind_when_the_world_does() -> None:
    switch = GainSwitch()
    run(switch, 500, 1.2, 1.0, noise=0.02)
    assert not switch.decision
    run(switch, 3000, 0.8, 1.0, noise=0.02)
    assert switch.decision and switch.gain is not None and switch.gain > 0.1


@pytest.mark.parametrize(("begins_on", "on_s"), [(True, 0.5), (False, 2.5)])
def test_one_probe_is_enough_to_keep_what_is_far_faster(begins_on: bool, on_s: float) -> None:
    switch = GainSwitch(begins_on=begins_on)
    num_steps = BLOCK_STEPS + 1 + LEAST_STEPS
    num_on = run(switch, num_steps, on_s, 1.0, noise=0.05)
    assert num_on == (BLOCK_STEPS if begins_on else 1 + LEAST_STEPS) and not switch.is_trying
    assert switch.decision is begins_on and switch.gain is not None and (switch.gain > 0) is begins_on


def test_one_probe_changes_nothing() -> None:
    switch = GainSwitch()
    run(switch, 2 * BLOCK_STEPS, 2.5, 1.0, noise=0.05)
    assert switch.decision and switch.is_trying


def test_what_begins_off_is_switched_on_where_it_pays() -> None:
    switch = GainSwitch(begins_on=False)
    assert switch.describe() == "off until it is tried"
    run(switch, 2 * BLOCK_STEPS * LEAST_PROBES, 0.7, 1.0, noise=0.02)
    assert switch.decision and switch.is_on


def test_what_was_revoked_is_off_until_it_pays_again() -> None:
    switch = GainSwitch()
    run(switch, 2 * BLOCK_STEPS, 0.7, 1.0, noise=0.02)
    switch.revoke()
    assert not switch.is_on and not switch.is_trying
    run(switch, 200, 0.7, 1.0, noise=0.02)
    assert switch.decision


def test_what_is_off_is_not_switched_on_for_next_to_nothing() -> None:
    switch = GainSwitch()
    run(switch, 500, 1.1, 1.0, noise=0.0)
    run(switch, 6000, 0.995, 1.0, noise=0.1)
    assert not switch.decision
    run(switch, 12000, 0.95, 1.0, noise=0.1)
    assert switch.decision
