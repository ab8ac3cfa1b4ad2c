"""Which settings are tried, and that only what is faster beyond noise is chosen."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_offload.planning.correction import MOST_STEP, SMOOTHING, RunningCorrection
from moe_offload.planning.cost_model import TokenBytes
from moe_offload.planning.paired_runs import RunPlan, paired_gain, plan_runs, worth_a_duel
from moe_offload.planning.tuning import (
    NO_PREDICTOR,
    Choice,
    DividedHits,
    Division,
    Predictability,
    TuningFacts,
    ranked,
    thread_counts,
    to_verify,
    token_s,
)
from moe_offload.planning.tuning_device import DeviceFacts

FACTS = TuningFacts(
    token=TokenBytes(dense_bytes=400, expert_bytes=800, kv_bytes=0),
    num_layers=4,
    ram_bytes_per_s={2: 100.0, 1: 60.0},
    disk_bytes_per_s=50.0,
    hit_rate={"horizon": 0.75, "lru": 0.5},
    predictors={"gate": Predictability({1: 0.8, 2: 0.5}, predict_s=0.05)},
)
DEFAULTS = Choice(2, "horizon", "gate")


def test_a_token_by_hand() -> None:
    # A layer: 300 bytes at 100/s are 3 s; its misses are 50 bytes, 1 s, beside 1.5 s of experts at hand.
    assert token_s(Choice(2, "horizon", NO_PREDICTOR), FACTS) == pytest.approx(4 * 3.0)
    # Half of the experts: 2 s of misses beside 1 s of experts at hand.
    assert token_s(Choice(2, "lru", NO_PREDICTOR), FACTS) == pytest.approx(4 * (3.0 + 2.0 - 1.0))
    # Four fifths predicted: 0.4 s + 0.2 s of surprises hide behind the 1 s at hand; the asking costs.
    assert token_s(Choice(2, "lru", "gate"), FACTS) == pytest.approx(4 * 3.05)
    # Of what misses only a tenth: 1.8 s of surprises and 0.9 s of what is in their way, 1 s of it hidden.
    harder = Predictability({1: 0.8}, predict_s=0.05, missed_recall={1: 0.1})
    facts = replace(FACTS, predictors={"gate": harder})
    assert token_s(Choice(2, "lru", "gate"), facts) == pytest.approx(4 * (3.05 + 1.7))


def with_device(**changes: float) -> TuningFacts:
    known = {"expert_s": 1.0, "copy_s": 10.0, "step_s": 0.0, **changes}
    device = DeviceFacts(top_k=2, hit_rate={"horizon": 0.5, "lru": 0.0}, **known)  # type: ignore[arg-type]
    return TuningFacts(**{**FACTS.__dict__, "device": device})


def test_a_token_on_a_device_by_hand() -> None:
    # Two experts of 1 s on either side: both on one side 2 s, one on each 1 s, 1.5 s on average, and 1 s of
    # other weights; the second of misses in RAM hides behind them.
    split = Choice(2, "horizon", NO_PREDICTOR, scheduler="static_split")
    assert token_s(split, with_device()) == pytest.approx(4 * (1.0 + 1.5))
    # Half a second for a launch: 2, 1.5 and 2.5 s.
    assert token_s(split, with_device(step_s=0.5)) == pytest.approx(4 * (1.0 + 1.875))
    assert token_s(split, FACTS) == pytest.approx(4 * 3.0), "no device, no share for it"


def test_schedulers_are_ranked_by_the_link() -> None:
    schedulers = ["hybrid", "static_split", "on_demand"]

    def order(facts: TuningFacts) -> list[str | None]:
        ranking = ranked(facts, [2], [1], schedulers)
        return [c.scheduler for c in ranking if c.policy == "horizon" and not c.prefetch]

    assert order(with_device()) == ["hybrid", "static_split", "on_demand"], "copies take 10 s"
    assert order(with_device(copy_s=0.01, expert_s=0.01))[-1] == "static_split", "it lets the CPU do half"
    by_setting = to_verify(
        Choice(2, "horizon", "gate", 1, "hybrid"), ranked(with_device(), [2, 1], [1], schedulers), 6
    )
    assert len({choice.scheduler for choice in by_setting}) > 1


def test_divisions_of_the_slots_are_ranked_by_what_they_hit_and_what_they_leave_to_guesses() -> None:
    more, less = Division(ram_staging=1.0), Division(ram_staging=4.0)
    divided = {("lru", more): DividedHits(0.6, 0.0), ("lru", less): DividedHits(0.3, 0.0)}
    facts = TuningFacts(**{**FACTS.__dict__, "divided": divided})
    plain = Choice(2, "lru", NO_PREDICTOR)
    wider, tighter = (replace(plain, ram_staging=division.ram_staging) for division in (more, less))
    assert token_s(wider, facts) < token_s(plain, facts) < token_s(tighter, facts)
    order = ranked(facts, [2], [1])
    assert {wider, tighter} <= set(order) and order.index(wider) < order.index(tighter)
    assert wider in to_verify(plain, [plain, wider], 8), "a neighbour like any other"
    assert "ram_staging 1" in wider.describe() and "staging" not in plain.describe()
    # With slots for half a step's guesses, half of them are late however good they are.
    scarce = TuningFacts(**{**FACTS.__dict__, "divided": {("lru", more): DividedHits(0.2, 0.0)}})
    known = replace(FACTS.predictors["gate"], predict_s=0.0)
    scarce = replace(scarce, predictors={"gate": known})
    guess = Choice(2, "lru", "gate", ram_staging=1.0)
    assert token_s(guess, scarce) > token_s(
        replace(guess, ram_staging=2.0), replace(scarce, hit_rate={"lru": 0.2})
    )


def test_the_ranking_knows_that_prediction_is_useless_where_nothing_is_waited_for() -> None:
    best = ranked(FACTS, [2, 1], [1, 2])[0]
    assert best == Choice(2, "horizon", NO_PREDICTOR)
    starved = TuningFacts(**{**FACTS.__dict__, "hit_rate": {"horizon": 0.5, "lru": 0.5}})
    assert ranked(starved, [2, 1], [1, 2])[0] == Choice(2, "horizon", "gate", 1)


def test_defaults_and_neighbours_are_always_verified() -> None:
    ranking = ranked(FACTS, [2, 1], [1, 2])
    chosen = to_verify(DEFAULTS, ranking, most=5)
    assert chosen[0] == DEFAULTS and chosen[1] == ranking[0]
    assert Choice(1, "horizon", NO_PREDICTOR) in chosen and Choice(2, "lru", NO_PREDICTOR) in chosen
    assert to_verify(DEFAULTS, ranking, most=1) == [DEFAULTS]
    assert to_verify(DEFAULTS, [], most=5) == [DEFAULTS]
    assert len(set(to_verify(DEFAULTS, ranking, most=99))) == len(to_verify(DEFAULTS, ranking, most=99))


def test_a_gain_needs_more_than_one_round() -> None:
    assert paired_gain([2.0], [1.0]).speedup == pytest.approx(2.0)
    assert not paired_gain([2.0], [1.0]).is_clear
    assert paired_gain([2.0, 2.02, 1.98], [1.0, 1.0, 1.0]).is_clear
    assert not paired_gain([1.0, 1.001, 1.0], [0.999, 0.999, 1.0]).is_clear, "0.1% is no gain"


def test_a_drift_that_both_sides_share_is_no_noise() -> None:
    slow_down = [1.0, 1.5, 2.2, 3.1]
    gain = paired_gain(slow_down, [seconds / 1.1 for seconds in slow_down])
    assert gain.is_clear and gain.low == pytest.approx(1.1)


def test_noise_alone_seldom_beats_the_defaults() -> None:
    chooser = random.Random(0)
    false_alarms = 0
    for _ in range(1000):
        runs = [[math.exp(chooser.gauss(0, 0.1)) for _ in range(6)] for _ in range(2)]
        false_alarms += paired_gain(*runs).is_clear
    assert false_alarms <= 15  # 0.5% expected, on one side


def test_who_goes_into_the_duel() -> None:
    fast, slow = Choice(1, "lru", NO_PREDICTOR), Choice(1, "horizon", NO_PREDICTOR)
    times = {DEFAULTS: [2.0, 2.0], fast: [1.5, 1.6], slow: [2.5, 2.5]}
    assert worth_a_duel(times, DEFAULTS) == fast
    assert worth_a_duel({DEFAULTS: [2.0], slow: [2.5]}, DEFAULTS) is None
    assert worth_a_duel({DEFAULTS: [2.0]}, DEFAULTS) is None


@pytest.mark.parametrize(
    ("left_s", "plan"),
    [
        (1.0, RunPlan(8, 0, 0)),  # a run of 8 tokens takes 0.8 s
        (5.0, RunPlan(8, 2, 0)),  # six runs: the duel at once
        (12.0, RunPlan(8, 3, 3)),  # fifteen: three candidates in three rounds, and the duel
        (42.0, RunPlan(10, 6, 3)),
        (1e6, RunPlan(64, 6, 3)),
    ],
)
def test_runs_are_planned_by_the_time_there_is(left_s: float, plan: RunPlan) -> None:
    assert plan_runs(step_s=0.1, left_s=left_s, most_tokens=64, most_candidates=6) == plan
    assert plan_runs(step_s=0.1, left_s=left_s, most_tokens=64, most_candidates=1).candidates == 0


def test_threads_worth_measuring() -> None:
    assert [thread_counts(n) for n in (1, 2, 3, 8)] == [[1], [2, 1], [3, 2, 1], [8, 7, 4, 1]]


def test_a_correction_starts_at_what_was_expected_and_follows_what_is_measured() -> None:
    running = RunningCorrection({"disk": 100.0, "never": math.inf})
    assert running.get("disk") == 100.0 and running.factor("disk") == 1.0 and running.get("layer") == math.inf
    for _ in range(200):
        running.measure("disk", 50.0)
    assert running.get("disk") == pytest.approx(50.0) and running.factor("disk") == pytest.approx(0.5)
    assert running.corrected("disk", 10.0) == pytest.approx(5.0) and running.corrected("layer", 3.0) == 3.0
    assert running.measure("layer", 7.0) == 7.0
    assert running.as_dict()["disk"] == {
        "expected": 100.0,
        "estimate": pytest.approx(50.0),
        "measurements": 200,
    }
    running.note("layer", 9.0)
    assert running.as_dict()["layer"] == {"expected": None, "estimate": 9.0, "measurements": 2}


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=20))
def test_a_correction_stays_a_positive_number_and_moves_by_bounded_steps(values: list[float]) -> None:
    running = RunningCorrection({"disk": 1.0})
    before = 1.0
    for value in values:
        now = running.measure("disk", value)
        assert 0 < now < math.inf and now / before >= MOST_STEP**-SMOOTHING * 0.999
        assert now / before <= MOST_STEP**SMOOTHING * 1.001
        before = now
