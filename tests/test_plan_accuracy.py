"""bench/plan_accuracy.py: what counts as within the goal, and that traced and measured text differ."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import plan_accuracy as accuracy


def case(predicted: float, measured: float) -> dict[str, dict[str, float]]:
    return {"predicted": {"tokens_per_s": predicted}, "measured": {"tokens_per_s": measured}}


def test_the_goal_is_a_share_of_decode_cases_and_prompts_are_apart() -> None:
    cases = {
        accuracy.case_key("m", "25%", 64, f"cold {i}"): case(predicted, 10.0)
        for i, predicted in enumerate([10, 11, 9, 12, 8, 10, 10, 10, 10, 12.1])
    }
    cases[accuracy.case_key("m", "25%", 64, "prefill")] = case(30.0, 10.0)
    found = accuracy.summary(cases)
    assert found["decode"]["cases"] == 10 and found["decode"]["within"] == 9 and found["met"]
    assert found["decode"]["worst_error"] == pytest.approx(0.21)
    assert found["prefill"] == {
        "cases": 1, "within": 0, "share": 0.0, "median_error": 2.0, "worst_error": 2.0,
    }  # fmt: skip
    cases[accuracy.case_key("m", "25%", 64, "warm")] = case(1.0, 10.0)
    assert not accuracy.summary(cases)["met"]


@pytest.mark.parametrize("path", [accuracy.ROOT / "moe_offload/demo/tiny-moe.gguf", Path("synthetic.gguf")])
def test_a_prediction_rests_on_other_text_than_the_measurement(path: Path) -> None:
    traced, measured = accuracy.token_ids(path, 640)
    assert len(traced) == len(measured) == 640 + accuracy.DECODED_TOKENS
    assert traced != measured
