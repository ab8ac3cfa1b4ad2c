"""What each predictor says, on inputs whose answer is known by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from moe_offload.planning.prediction import Forecast
from moe_offload.predictors.exact import EarlyRouters, Oracle, TokenLookahead, token_tables
from moe_offload.predictors.fitted import Hybrid, LowRankGate
from moe_offload.predictors.history import (
    DECAY,
    Frequency,
    History,
    PreviousToken,
    Static,
    Transition,
    past_of,
)
from moe_offload.predictors.residual_gate import MeanOutputGate, ResidualGate, SharedExpertGate
from moe_offload.predictors.routers import RouterScores, distances, probabilities, threshold
from moe_offload.runtime.predictor_inputs import first_gate_of

HIDDEN_SIZE, NUM_EXPERTS, TOP_K = 6, 5, 2
LAYERS = (1, 3, 4)
CHOICE = np.array([[4, 1]]), np.array([[0.75, 0.25]], np.float32)


class Router(nn.Module):
    """Softmax, then top-k."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN_SIZE, generator=generator))

    def forward(self, x):
        logits = x @ self.weight.T
        weights, expert_ids = logits.softmax(-1).topk(TOP_K)
        return logits, weights, expert_ids


class Norm(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.rand(HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed)) + 0.5
        )


ROUTERS = {layer_idx: Router(layer_idx) for layer_idx in LAYERS}
NORMS = {layer_idx: Norm(layer_idx) for layer_idx in LAYERS}


def best(forecast: Forecast, count: int = TOP_K) -> set[int]:
    return set(np.argsort(-forecast.probabilities)[:count].tolist())


def choice_of(layer_idx: int, router_input: torch.Tensor) -> set[int]:
    return set(ROUTERS[layer_idx](router_input)[2][0].tolist())


def test_history_of_a_prompt_is_that_of_its_tokens_one_by_one():
    generator = np.random.default_rng(0)
    ids = np.stack([generator.permutation(NUM_EXPERTS)[:TOP_K] for _ in range(7)])
    weights = generator.random((7, TOP_K)).astype(np.float32)
    whole, single = History(1, NUM_EXPERTS), History(1, NUM_EXPERTS)
    whole.observe(0, ids, weights)
    for token in range(7):
        single.observe(0, ids[token : token + 1], weights[token : token + 1])
    np.testing.assert_allclose(whole.frequency, single.frequency, rtol=1e-5)
    np.testing.assert_array_equal(whole.previous, single.previous)


def test_a_fit_sees_the_past_that_a_run_will_see():
    generator = np.random.default_rng(1)
    ids = np.stack([generator.permutation(NUM_EXPERTS)[:TOP_K] for _ in range(9)])
    weights = generator.random((9, TOP_K)).astype(np.float32)
    one_hot, weighted = np.zeros((2, 9, NUM_EXPERTS), np.float32)
    np.put_along_axis(one_hot, ids, 1.0, axis=1)
    np.put_along_axis(weighted, ids, weights, axis=1)
    previous, frequency = past_of(one_hot, weighted, np.array([0, 4]))
    history = History(1, NUM_EXPERTS)
    for token in range(9):
        if token in (0, 4):
            history.new_sequence()
        np.testing.assert_array_equal(previous[token], history.previous[0])
        np.testing.assert_allclose(frequency[token], history.frequency[0], rtol=1e-5, atol=1e-7)
        history.observe(0, ids[token : token + 1], weights[token : token + 1])


def test_frequency_is_the_decayed_share_of_tokens():
    predictor = Frequency(LAYERS, NUM_EXPERTS)
    for _ in range(2):
        predictor.observe(3, *CHOICE)
    (forecast,) = predictor.predict(1, None, *CHOICE)
    wanted = (1 - DECAY) * (1 + DECAY)
    np.testing.assert_allclose(forecast.probabilities, [0, wanted, 0, 0, wanted], rtol=1e-6)


def test_the_previous_token_is_repeated_heavy_experts_first_until_a_new_sequence():
    predictor = PreviousToken(LAYERS, NUM_EXPERTS, top_k=TOP_K, depth=2)
    predictor.observe(3, *CHOICE)
    near, far = predictor.predict(1, None, *CHOICE)
    assert (near.layer_idx, far.layer_idx) == (3, 4)
    assert near.probabilities.argmax() == 4 and best(near) == {1, 4}
    assert not far.probabilities.any()  # nothing was seen of layer 4
    predictor.new_sequence()
    assert not predictor.predict(1, None, *CHOICE)[0].probabilities.any()


def test_static_says_the_same_before_and_after_a_router():
    shares = {i: np.full(NUM_EXPERTS, i / 10, np.float32) for i in LAYERS}
    predictor = Static(shares, depth=1)
    assert [forecast.layer_idx for forecast in predictor.begin_step(None)] == [1]
    assert predictor.predict(3, None, *CHOICE)[0] == Forecast(4, shares[4])
    assert predictor.predict(4, None, *CHOICE) == []


def test_transition_is_the_mean_of_the_chosen_experts_rows():
    table = np.arange(25, dtype=np.float32).reshape(5, 5) / 25
    predictor = Transition(LAYERS, NUM_EXPERTS, {(1, 3): table})
    (forecast,) = predictor.predict(1, None, *CHOICE)
    np.testing.assert_allclose(forecast.probabilities, (table[4] + table[1]) / 2, rtol=1e-6)


def test_a_residual_gate_hands_the_later_router_the_residual_under_the_later_norm():
    residual = torch.randn(1, HIDDEN_SIZE, generator=torch.Generator().manual_seed(5))
    rms = residual.square().mean().sqrt()
    here = residual / rms * NORMS[1].weight
    later = residual / rms * NORMS[3].weight
    forecasts = ResidualGate(ROUTERS, NORMS, depth=1).predict(1, here, *CHOICE)
    wanted = probabilities(RouterScores(ROUTERS[3])(later), TOP_K)
    np.testing.assert_allclose(forecasts[0].probabilities, wanted[0], rtol=1e-4)


def test_a_shared_experts_output_moves_the_residual_in_its_own_units():
    residual = torch.randn(1, HIDDEN_SIZE, generator=torch.Generator().manual_seed(6))
    output = torch.randn(1, HIDDEN_SIZE, generator=torch.Generator().manual_seed(7))
    rms = float(residual.square().mean().sqrt())
    gate = SharedExpertGate(
        ROUTERS, NORMS, shared_experts={1: lambda x: output}, residual_rms={1: rms}, depth=1
    )
    (forecast,) = gate.predict(1, residual / rms * NORMS[1].weight, *CHOICE)
    moved = (residual + output) / rms * NORMS[3].weight
    wanted = probabilities(RouterScores(ROUTERS[3])(moved), TOP_K)
    np.testing.assert_allclose(forecast.probabilities, wanted[0], rtol=1e-3)


def test_mean_outputs_are_added_by_weight():
    table = np.zeros((NUM_EXPERTS + 1, NUM_EXPERTS), np.float32)
    table[4, 2], table[1, 2], table[-1, 0] = 40.0, 8.0, -100.0
    gate = MeanOutputGate(ROUTERS, NORMS, mean_scores={(1, 3): table}, depth=1)
    added = gate.correction(1, 3, *CHOICE)
    np.testing.assert_allclose(added, [[-100.0, 0, 0.75 * 40 + 0.25 * 8, 0, 0]])
    (forecast,) = gate.predict(1, torch.zeros(1, HIDDEN_SIZE), *CHOICE)
    assert forecast.probabilities.argmax() == 2 and forecast.probabilities.argmin() == 0


def test_a_low_rank_map_that_is_exact_predicts_the_choice():
    generator = np.random.default_rng(2)
    down, up = generator.normal(size=(2, HIDDEN_SIZE, 2)).astype(np.float32)
    shift = generator.normal(size=HIDDEN_SIZE).astype(np.float32)
    gate = LowRankGate(ROUTERS, {(1, 3): (down, np.ascontiguousarray(up.T), shift)}, depth=1)
    for x in torch.randn(20, 1, HIDDEN_SIZE, generator=torch.Generator().manual_seed(3)):
        later = x + x @ torch.from_numpy(down @ up.T) + torch.from_numpy(shift)
        assert best(gate.predict(1, x, *CHOICE)[0]) == choice_of(3, later)


def test_the_hybrid_reads_each_feature_where_the_fit_put_it():
    """One row of the table at a time is not zero: input 2, the choice of expert 4, 1, previous, frequency."""
    rows = HIDDEN_SIZE + 3 * NUM_EXPERTS + 1
    x = torch.arange(HIDDEN_SIZE, dtype=torch.float32)[None]
    previous = HIDDEN_SIZE + NUM_EXPERTS + 1
    for row, wanted in {
        2: 2.0, HIDDEN_SIZE + 4: 0.75, HIDDEN_SIZE + NUM_EXPERTS: 1.0, previous + 1: 0.25,
        previous + NUM_EXPERTS + 1: 1 - DECAY,
    }.items():  # fmt: skip
        table = np.zeros((rows, NUM_EXPERTS), np.float32)
        table[row] = [0, 0, 0, 1, 0]
        hybrid = Hybrid(LAYERS, NUM_EXPERTS, HIDDEN_SIZE, {(1, 3): table}, top_k=TOP_K)
        hybrid.observe(3, *CHOICE)
        (forecast,) = hybrid.predict(1, x, *CHOICE)
        scores = np.array([[0, 0, 0, wanted, 0]], np.float32)
        np.testing.assert_allclose(forecast.probabilities, probabilities(scores, TOP_K)[0], rtol=1e-5)


def test_chosen_experts_answer_by_weight_along_directions_natively_and_by_numpy():
    generator = np.random.default_rng(11)
    table, first, directions, answers = (
        generator.normal(size=size).astype(np.float32)
        for size in (
            (HIDDEN_SIZE + 3 * NUM_EXPERTS + 1, NUM_EXPERTS),
            (HIDDEN_SIZE + 2 * NUM_EXPERTS + 1, NUM_EXPERTS),
            (3, HIDDEN_SIZE),
            (NUM_EXPERTS, 3, NUM_EXPERTS),
        )
    )
    hybrid = Hybrid(
        [1, 3], NUM_EXPERTS, HIDDEN_SIZE, {(1, 3): table}, top_k=TOP_K,
        first_tables={1: first}, directions={1: directions}, answers={(1, 3): answers},
    )  # fmt: skip
    hybrid.observe(3, *CHOICE)
    ids, weights = CHOICE[0][0].tolist(), CHOICE[1][0].tolist()
    for x in torch.randn(10, 1, HIDDEN_SIZE, generator=torch.Generator().manual_seed(12)):
        features = np.zeros(len(table), np.float32)
        features[:HIDDEN_SIZE] = x[0]
        features[HIDDEN_SIZE + CHOICE[0][0]] = CHOICE[1][0]
        features[HIDDEN_SIZE + NUM_EXPERTS] = 1.0
        features[HIDDEN_SIZE + NUM_EXPERTS + 1 :] = hybrid.past_of(3)
        scores = features @ table
        for expert_id, weight in zip(ids, weights, strict=True):
            scores += weight * (directions @ x[0].numpy()) @ answers[expert_id]
        wanted = probabilities(scores[None], TOP_K)[0]
        (alone,) = hybrid.predict(1, x, *CHOICE)
        np.testing.assert_allclose(alone.probabilities, wanted, rtol=1e-3, atol=1e-5)
        twice = x.repeat(2, 1), np.repeat(CHOICE[0], 2, axis=0), np.repeat(CHOICE[1], 2, axis=0)
        (both,) = hybrid.predict(1, *twice)
        np.testing.assert_allclose(both.probabilities, 1.0 - (1.0 - wanted) ** 2, rtol=1e-3, atol=1e-5)
        natively = hybrid.one_token.likely(1, x.data_ptr(), ids, weights, 0.0)
        assert len(natively) == NUM_EXPERTS
        for _, layer_idx, expert_id, chance in natively:
            assert layer_idx == 3 and chance == pytest.approx(wanted[expert_id], rel=1e-3, abs=1e-5)


def test_answers_that_do_not_fit_a_forecast_are_refused():
    table = np.zeros((HIDDEN_SIZE + 3 * NUM_EXPERTS + 1, NUM_EXPERTS), np.float32)
    native = Hybrid([1, 3], NUM_EXPERTS, HIDDEN_SIZE, {(1, 3): table}, top_k=TOP_K).one_token.native
    directions = np.zeros((2, HIDDEN_SIZE), np.float32)
    answers = np.zeros((NUM_EXPERTS, 2, NUM_EXPERTS), np.float32)
    native.add_answers(1, 3, directions, answers)
    with pytest.raises(ValueError, match="no such forecast"):
        native.add_answers(3, 1, directions, answers)
    for wrong in (answers[:-1], answers[:, :1], answers[:, :, :-1]):
        with pytest.raises(ValueError, match="wanted"):
            native.add_answers(1, 3, directions, np.ascontiguousarray(wrong))
    with pytest.raises(ValueError, match="wanted"):
        native.add_answers(1, 3, np.ascontiguousarray(directions[:, 1:]), answers)


def test_a_batch_of_one_token_twice_is_that_token():
    """One token goes through a native call, several through numpy."""
    generator = np.random.default_rng(7)
    table = generator.normal(size=(HIDDEN_SIZE + 3 * NUM_EXPERTS + 1, NUM_EXPERTS)).astype(np.float32)
    hybrid = Hybrid(LAYERS, NUM_EXPERTS, HIDDEN_SIZE, {(1, 3): table}, top_k=TOP_K)
    hybrid.observe(3, *CHOICE)
    for x in torch.randn(10, 1, HIDDEN_SIZE):
        (alone,) = hybrid.predict(1, x, *CHOICE)
        twice = x.repeat(2, 1), np.repeat(CHOICE[0], 2, axis=0), np.repeat(CHOICE[1], 2, axis=0)
        (both,) = hybrid.predict(1, *twice)
        wanted = 1.0 - (1.0 - alone.probabilities) ** 2
        np.testing.assert_allclose(both.probabilities, wanted, rtol=1e-3, atol=1e-5)


def test_one_token_and_many_have_the_same_probabilities():
    scores = np.random.default_rng(3).normal(size=(20, NUM_EXPERTS)).astype(np.float32)
    together = distances(scores, TOP_K)
    for row, alone in zip(scores, together, strict=True):
        np.testing.assert_allclose(distances(row[None], TOP_K)[0], alone, rtol=1e-4, atol=1e-5)
    above = (scores > threshold(scores, TOP_K)).sum(axis=1)
    assert (above == TOP_K).all()
    assert (probabilities(scores[:1], NUM_EXPERTS) > 0.99).all()  # a router that takes every expert


def test_token_ids_decide_a_hash_layer_at_once_and_the_others_follow():
    table = np.array([[0, 1], [2, 3], [3, 4]])
    others = Static({i: np.full(NUM_EXPERTS, 0.4, np.float32) for i in (0, 1, 3)}, depth=2)
    predictor = TokenLookahead({0: table}, NUM_EXPERTS, others)
    forecasts = {f.layer_idx: f.probabilities.tolist() for f in predictor.begin_step(np.array([2]))}
    assert forecasts[0] == [0, 0, 0, 1, 1]
    assert set(forecasts) == {0, 1}
    assert predictor.predict(0, None, *CHOICE) == ()  # the others may not know of that layer
    assert [f.layer_idx for f in predictor.predict(1, None, *CHOICE)] == [3]


def test_the_tables_of_deepseek_v4s_hash_routers_are_found():
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter

    config = transformers.DeepseekV4Config(
        vocab_size=7, hidden_size=HIDDEN_SIZE, num_local_experts=4, num_experts_per_tok=2
    )
    router = DeepseekV4HashRouter(config)
    router.tid2eid[3] = torch.tensor([2, 1])
    with torch.no_grad():
        router.weight.normal_()
    tables = token_tables({0: router, 1: ROUTERS[1]})
    assert set(tables) == {0}
    _, _, chosen = router(torch.randn(1, HIDDEN_SIZE), torch.tensor([3]))
    (forecast,) = TokenLookahead(tables, 4).begin_step(np.array([3]))
    assert set(np.flatnonzero(forecast.probabilities)) == set(chosen[0].tolist())


def test_a_router_that_ran_early_is_believed_once():
    early = EarlyRouters(ROUTERS, NUM_EXPERTS)
    x = torch.randn(1, HIDDEN_SIZE)
    chosen = set(ROUTERS[3](x)[2][0].tolist())
    (forecast,) = early.spoken(1)
    assert forecast.layer_idx == 3 and set(np.flatnonzero(forecast.probabilities)) == chosen
    assert early.spoken(1) == []
    ROUTERS[3](x)
    assert early.spoken(3) == []  # that layer's own turn has come
    early.close()
    ROUTERS[4](x)
    assert early.spoken(1) == []


def test_the_oracle_is_right_token_after_token():
    experts = np.stack([np.random.default_rng(i).permutation(NUM_EXPERTS)[:TOP_K] for i in range(12)])
    experts = experts.reshape(4, 3, TOP_K)  # 4 tokens, 3 layers
    oracle = Oracle(LAYERS, experts, NUM_EXPERTS, depth=2)
    for token in range(4):
        (first, second) = oracle.begin_step(np.array([0]))
        assert best(first) == set(experts[token, 0]) and best(second) == set(experts[token, 1])
        (last,) = oracle.predict(3, None, *CHOICE)
        assert best(last) == set(experts[token, 2])
    with pytest.raises(ValueError, match="ids"):
        oracle.begin_step(None)


def test_the_first_gate_says_what_the_router_says_of_a_token_alone() -> None:
    """Alone it attends to itself only, and embeddings of one size leave nothing to the vocabulary's mean."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=1, intermediate_size=8, moe_intermediate_size=8,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
        )
    )  # fmt: skip
    layer, embeddings = model.model.layers[0], model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings /= embeddings.square().mean(-1, keepdim=True).sqrt()
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.uniform_(0.5, 1.5)
        layer.self_attn.v_proj.weight.mul_(20)  # so that attention counts
        seen: list[torch.Tensor] = []
        layer.mlp.gate.register_forward_hook(lambda module, args, out: seen.append(args[0]))
        table = first_gate_of(model, layer.mlp.gate)
        assert table is not None and table.shape == (8, 32)
        for token in (3, 17, 31):
            model(input_ids=torch.tensor([[token]]))
            expected = torch.nn.functional.linear(seen[-1].flatten(), layer.mlp.gate.weight)
            scores = torch.from_numpy(table) @ embeddings[token]
            cosine = torch.nn.functional.cosine_similarity(scores, expected, dim=0)
            assert cosine > 0.9999
