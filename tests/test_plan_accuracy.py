"""bench/plan_accuracy.py: what counts as within the goal, and that traced and measured text differ."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import plan_accuracy as accuracy


def case(predicted: float, measured: float, pace: float = 1.0, afterwards: float = 0.0) -> Any:
    return {
        "predicted": {"tokens_per_s": predicted, "afterwards": afterwards or predicted, "pace_s": [1.0, 2.0]},
        "measured": {"tokens_per_s": measured, "pace_s": [1.0, 2 * pace]},
    }


def test_the_goal_is_a_share_of_the_cases_of_each_kind() -> None:
    cases = {
        accuracy.case_key(f"m{i}", "25%", 64, "cold"): case(predicted, 10.0)
        for i, predicted in enumerate([10, 11, 9, 12, 8, 10, 10, 10, 10, 12.1])
    }
    prompt = accuracy.case_key("m", "25%", 64, "prefill")
    cases[prompt] = case(11.0, 10.0)
    found = accuracy.summary(cases)
    assert found["decode"]["cases"] == 10 and found["decode"]["within"] == 9 and found["met"]
    assert found["decode"]["worst_error"] == pytest.approx(0.21)
    cases[prompt] = case(30.0, 10.0, pace=0.7)
    found = accuracy.summary(cases)
    assert not found["met"] and found["prefill"] == {
        "cases": 1, "within": 0, "share": 0.0, "median_error": 2.0, "worst_error": 2.0,
        "steady": {"cases": 0},
    }  # fmt: skip
    cases[prompt] = case(11.0, 10.0)
    cases[accuracy.case_key("m", "25%", 64, "warm")] = case(1.0, 10.0)
    assert not accuracy.summary(cases)["met"]


def test_what_more_memory_brings_is_held_against_what_it_was_said_to() -> None:
    cases = {
        accuracy.case_key("m", share, 64, phase): case(predicted, measured)
        for share, predicted, measured in (("12.5%", 10.0, 8.0), ("25%", 20.0, 20.0), ("100%", 40.0, 50.0))
        for phase in ("prefill", "warm")
    }
    found = accuracy.changes(cases)
    assert list(found) == ["12.5% to " + accuracy.case_key("m", "25%", 64, "warm")], "neighbours, decoding"
    (change,) = found.values()
    assert (change["predicted"], change["measured"]) == (2.0, 2.5)
    assert change["error"] == pytest.approx(-0.2)
    assert accuracy.summary(cases)["changes"]["within"] == 1


def test_the_attempt_with_the_least_change_of_the_machine_counts_not_the_truest() -> None:
    cases: dict[str, dict[str, dict[str, float]]] = {}
    true, steady, later = case(10.0, 10.0, 1.3), case(30.0, 10.0, 1.1), case(10.0, 10.0, 0.8)
    for attempt in (true, steady, later):
        accuracy.settle(cases, "key", attempt["predicted"], attempt["measured"])
    assert cases["key"]["predicted"] == steady["predicted"] and cases["key"]["attempts"] == 3
    assert accuracy.change(steady) == pytest.approx(0.1) and accuracy.change(later) == pytest.approx(0.25)
    assert accuracy.change(case(10.0, 10.0, 1.1, afterwards=5.0)) == pytest.approx(1.0)


@pytest.mark.parametrize("path", [accuracy.ROOT / "moe_offload/demo/tiny-moe.gguf", Path("synthetic.gguf")])
def test_a_prediction_rests_on_other_text_than_the_measurement(path: Path) -> None:
    traced, measured = accuracy.token_ids(path, 640)
    assert len(traced) == 3 and {len(ids) for ids in (*traced, measured)} == {640 + accuracy.DECODED_TOKENS}
    assert measured not in traced
