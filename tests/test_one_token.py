"""Forecasts for one token, made natively: the same as those that numpy makes, ranked and cut off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moe_offload._native import Lookahead
from moe_offload.predictors.cross_layer_gate import CrossLayerGate
from moe_offload.predictors.fitted import Hybrid
from moe_offload.predictors.one_token import FIRST
from moe_offload.predictors.routers import Curve

LAYERS, NUM_EXPERTS, HIDDEN_SIZE, TOP_K = (1, 2, 4), 12, 20, 3
THRESHOLD = 0.3


class Router(nn.Module):
    """Top-k by logits, as transformers' routers answer."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        weight = torch.randn(NUM_EXPERTS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> Any:
        logits = torch.nn.functional.linear(hidden, self.weight)
        weights, ids = logits.softmax(-1).topk(TOP_K)
        return logits, weights, ids


def make_gate(dtype: torch.dtype) -> CrossLayerGate:
    routers = {layer_idx: Router(layer_idx, dtype) for layer_idx in LAYERS}
    return CrossLayerGate(routers, depth=2, curves={(1, 2): Curve(2.0, -0.3)})


def make_hybrid(embed: Any = None) -> Hybrid:
    rng = np.random.default_rng(0)
    features = HIDDEN_SIZE + 3 * NUM_EXPERTS + 1
    pairs = [(1, 2), (1, 4), (2, 4)]
    tables = {pair: rng.normal(size=(features, NUM_EXPERTS)).astype(np.float32) for pair in pairs}
    first = {i: rng.normal(size=(features - NUM_EXPERTS, NUM_EXPERTS)).astype(np.float32) for i in LAYERS[:2]}
    curves = {(1, 4): Curve(3.0, 0.2), (FIRST, 2): Curve(1.5, 0.1)}
    return Hybrid(
        LAYERS, NUM_EXPERTS, HIDDEN_SIZE, tables, top_k=TOP_K, depth=2, first_tables=first, embed=embed,
        curves=curves,
    )  # fmt: skip


def some_token(seed: int) -> tuple[torch.Tensor, list[int], list[float]]:
    rng = np.random.default_rng(seed)
    hidden = torch.from_numpy(rng.normal(size=(1, HIDDEN_SIZE)).astype(np.float32))
    return hidden, rng.permutation(NUM_EXPERTS)[:TOP_K].tolist(), [0.5, 0.3, 0.2]


def ranked(forecasts: Any) -> list[tuple[int, int, int]]:
    return [
        (windows, layer_idx, expert_id)
        for windows, (layer_idx, chances) in enumerate(forecasts, start=1)
        for expert_id in np.argsort(-chances, kind="stable").tolist()
        if chances[expert_id] >= THRESHOLD
    ]


@pytest.mark.parametrize(
    "make", [make_hybrid, lambda: make_gate(torch.float32), lambda: make_gate(torch.bfloat16)]
)
def test_one_token_is_forecast_as_by_the_predictor_itself(make: Any) -> None:
    """Over some tokens, so that the past counts; history is one for both, kept by either."""
    natively, by_numpy = make(), make()
    found = 0
    tokens = [(layer_idx, *some_token(10 * seed + layer_idx)) for seed in range(6) for layer_idx in LAYERS]
    for layer_idx, _, ids, weights in tokens:
        natively.one_token.observe(layer_idx, ids, weights)
        by_numpy.observe(layer_idx, np.array([ids]), np.array([weights], np.float32))
    for layer_idx, hidden, ids, weights in tokens:
        likely = natively.one_token.likely(layer_idx, hidden.data_ptr(), ids, weights, THRESHOLD)
        arrays = np.array([ids]), np.array([weights], np.float32)
        forecasts = by_numpy.predict(layer_idx, hidden, *arrays)
        assert [entry[:3] for entry in likely] == ranked(forecasts)
        expected = [forecasts[windows - 1].probabilities[i] for windows, _, i, _ in likely]
        np.testing.assert_allclose([entry[3] for entry in likely], expected, rtol=1e-5)
        found += len(likely)
    assert found > 20


def test_chances_become_the_share_of_guesses_that_came_true() -> None:
    """Guesses of a twentieth of the chances are counted together, those of each distance apart."""
    gate, prior = make_gate(torch.float32), 8
    hidden, ids, weights = some_token(0)
    assert gate.one_token is not None

    def chances() -> tuple[dict[int, float], dict[int, float]]:
        likely = gate.one_token.likely(1, hidden.data_ptr(), ids, weights, 0.0)
        near, far = ({i: chance for ahead, _, i, chance in likely if ahead == n} for n in (1, 2))
        return near, far

    before, far = chances()
    chosen = [max(before, key=before.__getitem__)]
    gate.one_token.observe(2, chosen, [1.0])
    gate.one_token.observe(2, [], [])  # of what was not guessed again nothing is learned
    after, far_after = chances()
    assert far_after == far
    learned = {i: chance for i, chance in before.items() if chance >= 0.05}
    assert 3 < len(learned) < len(before)
    for i, chance in before.items():
        alike = [j for j in learned if int(20 * before[j]) == int(20 * chance)]
        used = sum(j in chosen for j in alike)
        assert after[i] == pytest.approx((used + prior * chance) / (len(alike) + prior), rel=1e-5)


def test_nothing_is_learned_of_what_was_asked_before_any_router() -> None:
    """The token that was expected may not be the one that came."""
    predictor, embedding = make_hybrid(), some_token(3)[0]
    assert predictor.one_token is not None
    before = predictor.one_token.native.likely(FIRST, 2, embedding.data_ptr(), [], [], 0.0)
    predictor.one_token.native.chosen(1, [0, 1, 2])
    assert predictor.one_token.native.likely(FIRST, 2, embedding.data_ptr(), [], [], 0.0) == before


def test_the_first_layers_are_forecast_from_the_embedding() -> None:
    embedding = some_token(3)[0]
    predictor = make_hybrid(embed=lambda ids: embedding)
    token_ids = np.array([5])
    hidden = predictor.first_input(token_ids)
    assert hidden is not None and predictor.one_token is not None
    likely = predictor.one_token.likely(FIRST, hidden.data_ptr(), [], [], THRESHOLD)
    assert [entry[:3] for entry in likely] == ranked(predictor.begin_step(token_ids)) != []


def test_the_depth_may_change_between_calls() -> None:
    gate = make_gate(torch.float32)
    hidden, ids, weights = some_token(0)
    assert gate.one_token is not None
    gate.order.depth = 1
    near = gate.one_token.likely(1, hidden.data_ptr(), ids, weights, 0.0)
    assert {layer_idx for _, layer_idx, *_ in near} == {2}
    gate.order.depth = 2
    both = gate.one_token.likely(1, hidden.data_ptr(), ids, weights, 0.0)
    assert {layer_idx for _, layer_idx, *_ in both} == {2, 4} and both[: len(near)] == near


def test_who_has_a_slot_is_left_out_as_the_tables_say_at_each_call() -> None:
    gate = make_gate(torch.float32)
    hidden, ids, weights = some_token(0)
    assert gate.one_token is not None
    everyone = gate.one_token.likely(1, hidden.data_ptr(), ids, weights, 0.0)
    tables = {2: np.zeros((NUM_EXPERTS, 3), np.uint64), 9: np.ones((NUM_EXPERTS, 3), np.uint64)}
    gate.one_token.leave_out(tables)
    assert gate.one_token.likely(1, hidden.data_ptr(), ids, weights, 0.0) == everyone
    tables[2][[3, 5], 0] = 1 << 40  # only the first column counts
    tables[2][7, 1:] = 1
    left = [entry for entry in everyone if entry[1:3] not in [(2, 3), (2, 5)]]
    assert gate.one_token.likely(1, hidden.data_ptr(), ids, weights, 0.0) == left != everyone
    gate.one_token.leave_out({})
    assert gate.one_token.likely(1, hidden.data_ptr(), ids, weights, 0.0) == everyone
    for table in (np.zeros((NUM_EXPERTS, 3), np.int64), np.zeros(NUM_EXPERTS, np.uint64)):
        with pytest.raises(ValueError, match="uint64"):
            gate.one_token.leave_out({2: table})


def test_what_does_not_fit_is_refused() -> None:
    history = np.zeros((3, NUM_EXPERTS), np.float32)
    lookahead = Lookahead(HIDDEN_SIZE, history, history.copy(), 0.9)
    for weight, top_k, row in [
        (np.zeros((NUM_EXPERTS, HIDDEN_SIZE + 1), np.float32), TOP_K, 0),
        (np.zeros((NUM_EXPERTS, HIDDEN_SIZE), np.float32), NUM_EXPERTS, 0),
        (np.zeros((NUM_EXPERTS, HIDDEN_SIZE), np.float32), TOP_K, 3),
        (np.zeros((NUM_EXPERTS + 1, HIDDEN_SIZE), np.float32), TOP_K, 0),
    ]:
        with pytest.raises(ValueError, match="do not fit"):
            lookahead.add(1, 2, weight, None, top_k, 1.0, 0.0, row)
    with pytest.raises(ValueError, match="out of range"):
        lookahead.observe(0, [NUM_EXPERTS], [1.0])
    with pytest.raises(ValueError, match="no row 3"):
        lookahead.observe(3, [0], [1.0])
    with pytest.raises(ValueError, match=r"both be \(L, E\)"):
        Lookahead(HIDDEN_SIZE, history, history[:2].copy(), 0.9)
