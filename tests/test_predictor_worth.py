"""Which predictor is the best to run depends on what a read costs."""

from __future__ import annotations

import pytest

from moe_offload.planning.predictor_worth import LINK_BYTES_PER_S, best_predictor, saved_us

FITTED = ("hybrid", "learned")


def held_out(expert_bytes):
    measured = {"cross_layer_gate": (0.80, 10.0), "hybrid": (0.88, 20.0), "learned": (0.90, 80.0)}
    rows = {
        name: {"ahead": {"1": {"recall": recall}}, "predict_us": [cost, cost]}
        for name, (recall, cost) in measured.items()
    }
    return {"tokens": 1000, "expert_bytes": expert_bytes, **rows}


@pytest.mark.parametrize(
    ("expert_bytes", "best", "best_fitted"),
    [
        (50e3, "cross_layer_gate", "hybrid"),
        (200e3, "hybrid", "hybrid"),
        (3e6, "learned", "learned"),
    ],
)
def test_the_larger_the_experts_the_more_a_prediction_may_cost(expert_bytes, best, best_fitted):
    report = held_out(expert_bytes)
    assert best_predictor(report, 4, ("cross_layer_gate", *FITTED)) == best
    assert best_predictor(report, 4, FITTED) == best_fitted
    assert best_predictor(report, 4, ("oracle",)) is None


def test_a_perfect_predictor_saves_the_reads_less_its_own_time():
    assert saved_us(1.0, 5.0, 4, LINK_BYTES_PER_S * 1e-6) == pytest.approx(2.0 - 5.0)
