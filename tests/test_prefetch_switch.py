"""Prefetching is switched off where it clearly costs, and a tie leaves it on."""

from __future__ import annotations

import random

import pytest

from moe_offload.planning.gain_switch import BLOCK_STEPS, COUNTED_STEPS, FIRST_REST_STEPS
from moe_offload.planning.prefetch_switch import (
    ALLOWED_LOSS,
    LEFT_BY_PREFETCH,
    LONGEST_REST_ON_STEPS,
    MOST_PROBES,
    SETTLING_STEPS,
    UNCLEAR_REST_STEPS,
    Findings,
    PrefetchSwitch,
)

# Of a first trial that is not clear, and of one that is decided by the mean of its last probes.
PROBE_STEPS = SETTLING_STEPS + COUNTED_STEPS + BLOCK_STEPS
TRIAL_STEPS = MOST_PROBES * (PROBE_STEPS + UNCLEAR_REST_STEPS) + FIRST_REST_STEPS


def run(
    switch: PrefetchSwitch, num_steps: int, on_s: float, noise: float, *, seed: int = 0, carries: bool = True
) -> list[bool]:
    """Return which steps prefetched; one without takes a second.

    Args:
        noise: share of a step's time that it varies by, either way.
        carries: a step's time depends on those before, as was measured.
    """
    generator, steps, num_alike = random.Random(seed), [], BLOCK_STEPS
    for _ in range(num_steps):
        is_on = switch.is_on
        num_alike = num_alike + 1 if steps and steps[-1] is is_on else 0
        step_s = on_s if is_on else 1.0
        if carries and is_on:
            step_s *= 1.07 if num_alike == 0 else 1.02 if num_alike < SETTLING_STEPS else 1.0
        elif carries:
            step_s *= 0.95 if num_alike == 0 else 0.98 if num_alike < BLOCK_STEPS else 1.0
        switch.record(step_s * generator.uniform(1 - noise, 1 + noise))
        steps.append(is_on)
    return steps


@pytest.mark.parametrize("on_s", [0.96, 0.99, 1.0])
def test_a_tie_leaves_it_on(on_s: float) -> None:
    """Steps vary by a third: no trial can tell these apart."""
    shares = [sum(run(PrefetchSwitch(), 3000, on_s, 0.33, seed=seed)) / 3000 for seed in range(12)]
    assert sum(shares) / 12 > 0.85


def test_it_is_seldom_tried_where_it_pays() -> None:
    steps = run(PrefetchSwitch(), 6000, 0.85, 0.2)
    assert steps.count(False) < 0.015 * 6000
    assert steps[3000:].count(False) <= 2 * BLOCK_STEPS
    assert steps.count(False) >= 3 * BLOCK_STEPS, "but it is"


@pytest.mark.parametrize(("on_s", "noise"), [(1.06, 0.05), (1.10, 0.2), (1.3, 0.33)])
def test_what_costs_is_off_within_a_trial(on_s: float, noise: float) -> None:
    num_on = 0
    for seed in range(8):
        switch = PrefetchSwitch()
        run(switch, TRIAL_STEPS, on_s, noise, seed=seed)
        num_on += run(switch, 3000, on_s, noise, seed=seed + 100).count(True)
    assert num_on < 0.15 * 8 * 3000


def test_it_comes_back_when_it_pays_again_and_goes_when_it_does_not() -> None:
    switch = PrefetchSwitch()
    run(switch, 1000, 1.2, 0.1)
    assert not switch.decision
    run(switch, 1000, 0.85, 0.1)
    assert switch.decision and switch.gain is not None and switch.gain > 0.05
    run(switch, 6000, 0.85, 0.1)
    run(switch, LONGEST_REST_ON_STEPS + 20 * (PROBE_STEPS + FIRST_REST_STEPS), 1.2, 0.1)
    assert not switch.decision, "as soon as a long rest is over and its probes outweigh those before"


def test_a_loss_that_is_allowed_is_said_and_kept() -> None:
    switch = PrefetchSwitch()
    steps = run(switch, 3000, 1.01, 0.0, carries=False)
    assert switch.decision and steps.count(False) < 0.03 * 3000
    assert switch.gain == pytest.approx(LEFT_BY_PREFETCH - 0.01)
    assert ALLOWED_LOSS > 0.01


def test_the_steps_in_which_it_begins_anew_do_not_count() -> None:
    gains = []
    for first_s in (1.0, 5.0):
        switch, num_on = PrefetchSwitch(), SETTLING_STEPS
        for _ in range(400):
            num_on = num_on + 1 if switch.is_on else 0
            switch.record(1.0 if not switch.is_on or num_on > SETTLING_STEPS else first_s)
        gains.append(switch.gain)
    assert gains[0] == gains[1] == pytest.approx(LEFT_BY_PREFETCH)


@pytest.mark.parametrize(("pays", "on_s"), [(True, 0.85), (False, 1.2)])
def test_what_an_earlier_run_found_is_not_tried_at_once(pays: bool, on_s: float) -> None:
    switch = PrefetchSwitch()
    assert switch.findings is None
    switch.begin_with(Findings(pays, 1.0 - on_s))
    assert run(switch, FIRST_REST_STEPS, on_s, 0.1) == [pays] * FIRST_REST_STEPS
    assert switch.findings == (pays, 1.0 - on_s)
    steps = run(switch, 1000, on_s, 0.1)
    assert switch.decision is pays and 0 < steps.count(not pays) < 100
    run(switch, 6000, 2.0 - on_s, 0.1)
    assert switch.decision is not pays, "what is not true any more does not last"
