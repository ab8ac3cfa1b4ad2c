"""bench/plan_accuracy.py: what counts as within the goal, and that traced and measured text differ."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import plan_accuracy_report as accuracy
import plan_accuracy_runs as runs


def attempt(predicted: float, measured: float, pace: float = 1.0) -> Any:
    return {
        "predicted": {"tokens_per_s": predicted, "pace_s": [1.0, 2.0]},
        "measured": {"tokens_per_s": measured, "pace_s": [1.0, 2 * pace]},
    }


def case(predicted: float, measured: float, pace: float = 1.0) -> Any:
    one = attempt(predicted, measured, pace)
    return {**one, "rounds": [one]}


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
        "steady": {"cases": 0}, "apart": 0.0,
        "of_rounds": {"cases": 1, "within": 0, "share": 0.0, "median_error": 2.0, "worst_error": 2.0},
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


def test_a_case_is_the_median_of_all_its_rounds_however_true_one_was() -> None:
    cases: dict[str, Any] = {}
    for one in (attempt(10.0, 10.0, 1.3), attempt(30.0, 20.0, 1.1), attempt(12.0, 16.0, 0.8)):
        accuracy.settle(cases, accuracy.case_key("m", "25%", 64, "cold"), one["predicted"], one["measured"])
    (found,) = cases.values()
    assert found["predicted"]["tokens_per_s"] == 12.0 and found["measured"]["tokens_per_s"] == 16.0
    assert accuracy.error(found) == pytest.approx(-0.25) and accuracy.apart(found) == pytest.approx(1.0)
    assert accuracy.change(found) == pytest.approx(0.3), "the round during which most changed"
    decode = accuracy.summary(cases)["decode"]
    assert decode["cases"] == 1 and decode["of_rounds"]["cases"] == 3
    assert decode["of_rounds"]["within"] == 1 and decode["apart"] == pytest.approx(1.0)


@pytest.mark.parametrize("path", [runs.ROOT / "moe_offload/demo/tiny-moe.gguf", Path("synthetic.gguf")])
def test_rounds_measure_different_texts_of_one_length(path: Path) -> None:
    found = runs.texts(path, 640)
    assert len(found) >= 4 and {len(ids) for ids in found} == {640 + runs.DECODED_TOKENS}
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_loads_of_one_case_count_by_their_seconds() -> None:
    marks = [{"seconds": s, "pace_s": [s, 1.0], "hit_rate": 0.5} for s in (1.0, 3.0)]
    found = runs.mean_mark(marks, 8)
    assert found["tokens_per_s"] == pytest.approx(2 * 8 / 4.0), "not the mean of 8 and 2.67"
    assert found["pace_s"] == [2.0, 1.0] and found["hit_rate"] == 0.5
