"""The horizon policy against its formula, its fit against least squares, its file against damage."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from moe_offload._native import HorizonCoefficients, HorizonForecast
from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.policies import horizon_fit
from moe_offload.planning.policies.horizon import (
    GENERIC_COEFFICIENTS,
    RATES,
    RESTORED_SHARE,
    HorizonFit,
    HorizonPolicy,
    read_fit,
)
from moe_offload.planning.policies.horizon_fit import fit_horizon
from moe_offload.replay import layer_pools, replay
from moe_offload.storage.expert_format import ExpertKey
from moe_offload.trace import make_trace, sequence_digests

NUM_LAYERS, NUM_EXPERTS, TOP_K = 4, 6, 2


def random_fit(seed=0, layers=(1, 2, 5, 6), num_before=3):
    generator = np.random.default_rng(seed)
    shape = (NUM_LAYERS, NUM_EXPERTS, len(RATES), NUM_EXPERTS)
    own = generator.normal(size=shape).astype(np.float16).astype(np.float32)
    before = generator.normal(size=(NUM_LAYERS, num_before, NUM_EXPERTS, NUM_EXPERTS))
    before = before.astype(np.float16).astype(np.float32)
    constant = generator.normal(size=(NUM_LAYERS, NUM_EXPERTS)).astype(np.float16).astype(np.float32)
    return HorizonFit(layers, own, before, constant, ("ab", "cd"), "toy")


def random_events(seed, layers, num_tokens=30):
    """Of one to three experts, as steps of several tokens have."""
    generator = np.random.default_rng(seed)
    return [
        (layer, sorted(generator.choice(NUM_EXPERTS, generator.integers(1, 4), replace=False).tolist()))
        for _ in range(num_tokens)
        for layer in layers
    ]


def forecast_by_the_formula(fit, events, layer_idx):
    """Frequencies and last choices from scratch, multiplied with the coefficients."""
    position = fit.layers.index(layer_idx)
    frequency = np.zeros((len(RATES), NUM_EXPERTS))
    last = np.zeros((NUM_LAYERS, NUM_EXPERTS))
    until = max(i for i, (layer, _) in enumerate(events) if layer == layer_idx)
    for layer, expert_ids in events[: until + 1]:
        chosen = np.isin(np.arange(NUM_EXPERTS), expert_ids)
        if layer == layer_idx:
            rates = np.array(RATES)[:, None]
            frequency = (1 - rates) * frequency + rates * chosen
        last[fit.layers.index(layer)] = chosen
    forecast = fit.constant[position] + np.einsum("ri,irj->j", frequency, fit.own[position])
    for n in range(fit.before.shape[1]):
        forecast = forecast + last[(position - 1 - n) % NUM_LAYERS] @ fit.before[position, n]
    return forecast


def tolerance(fit):
    """The native coefficients are bfloat16, 2 ** -9 off at most; at most this many of them are added."""
    largest = max(np.abs(fit.own).max(), np.abs(fit.before).max())
    return 2.0**-9 * float(largest) * NUM_EXPERTS * (len(RATES) + fit.before.shape[1])


def test_the_forecast_kept_up_to_date_is_the_formulas(tmp_path):
    fit = random_fit()
    fit.write(tmp_path / "fit.npz")
    policy = make_policy(f"horizon={tmp_path / 'fit.npz'}")
    assert tolerance(fit) < 0.4
    assert policy.trained_on == ("ab", "cd")
    events = random_events(1, fit.layers)
    for layer, expert_ids in events:
        policy.on_route(layer, expert_ids, None)
    for row, layer in enumerate(fit.layers):
        expected = forecast_by_the_formula(fit, events, layer)
        assert policy.scores()[row] == pytest.approx(expected, abs=tolerance(fit))


@pytest.mark.parametrize("fitted", [True, False])
def test_steps_shown_together_count_as_one_by_one(tmp_path, fitted):
    random_fit().write(tmp_path / "fit.npz")
    path = str(tmp_path / "fit.npz") if fitted else None
    events = [(layer, expert_ids, None) for layer, expert_ids in random_events(9, (1, 2, 5, 6))]

    class Watching(HorizonPolicy):
        def on_route(self, *event):
            seen.append(event)
            super().on_route(*event)

    seen = []
    single, together, watching = HorizonPolicy(path), HorizonPolicy(path), Watching(path)
    for event in events:
        single.on_route(*event)
    for start in range(0, len(events), 5):
        together.on_routes(events[start : start + 5])
        watching.on_routes(events[start : start + 5])
    assert np.array_equal(single.scores(), together.scores())
    assert np.array_equal(single.scores(), watching.scores()) and seen == events
    with pytest.raises(ValueError, match="wanted"):
        together.on_routes([(1,)])


def test_without_a_fit_an_experts_own_frequencies_count():
    policy = HorizonPolicy()
    events = random_events(2, (0, 3))
    frequency = np.zeros((len(RATES), NUM_EXPERTS))
    for layer, expert_ids in events:
        policy.on_route(layer, expert_ids, None)
        if layer == 3:
            rates = np.array(RATES)[:, None]
            frequency = (1 - rates) * frequency + rates * np.isin(np.arange(NUM_EXPERTS), expert_ids)
    assert policy.scores()[1] == pytest.approx(GENERIC_COEFFICIENTS @ frequency)
    assert policy.trained_on == ()


def test_a_layer_that_the_fit_has_not_is_forecast_without_it(tmp_path):
    random_fit().write(tmp_path / "fit.npz")
    fitted, generic = HorizonPolicy(str(tmp_path / "fit.npz")), HorizonPolicy()
    for layer, expert_ids in random_events(3, (9,)):
        fitted.on_route(layer, expert_ids, None)
        generic.on_route(layer, expert_ids, None)
    assert np.array_equal(fitted.scores(), generic.scores())


def markov_trace(seed, num_tokens, seq_len=None):
    """Each layer's expert pair follows from its last one's by a fixed permutation, most of the time."""
    generator = np.random.default_rng(seed)
    following = np.random.default_rng(99).permutation(NUM_EXPERTS // TOP_K)
    state, rows = np.zeros(NUM_LAYERS, np.int64), []
    for _ in range(num_tokens):
        jump = generator.random(NUM_LAYERS) < 0.1
        state = np.where(jump, generator.integers(0, NUM_EXPERTS // TOP_K, NUM_LAYERS), following[state])
        rows.append(state[:, None] * TOP_K + np.arange(TOP_K))
    return make_trace(np.array(rows), num_experts=NUM_EXPERTS, seq_len=seq_len)


def test_a_fit_goes_through_a_trace_in_parts(monkeypatch):
    """However small they are, to the same coefficients, and without room for the whole trace's inputs."""
    num_tokens = 1200
    trace = markov_trace(0, num_tokens, seq_len=[900, 300])
    whole = fit_horizon([trace])
    monkeypatch.setattr(horizon_fit, "CHUNK_TOKENS", 37)
    tracemalloc.start()
    parts = fit_horizon([trace])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for name in ("own", "before", "constant"):
        assert np.allclose(getattr(parts, name), getattr(whole, name), atol=1e-3), name
    inputs_bytes = 4 * num_tokens * ((len(RATES) + NUM_LAYERS - 1) * NUM_EXPERTS + 1)
    assert peak_bytes < inputs_bytes


def test_a_fit_is_the_least_squares_solution():
    """The forecast's error cannot be lowered by changing any coefficient; and it knows its sequences."""
    trace = markov_trace(0, 200, seq_len=[120, 80])
    fit = fit_horizon([trace], gamma=0.5, ridge=1e-6, layers_before=1)
    assert fit.trained_on == tuple(sequence_digests(trace))
    used = np.zeros((200, NUM_LAYERS, NUM_EXPERTS))
    np.put_along_axis(used, trace.experts.astype(int), 1, axis=2)
    future = np.zeros(used.shape)
    for token in range(198, -1, -1):
        if token != 119:  # the last of the first sequence has no future
            future[token] = used[token + 1] + 0.5 * future[token + 1]
    events = [
        (layer, sorted(trace.experts[t, layer].tolist())) for t in range(200) for layer in range(NUM_LAYERS)
    ]
    layer, errors, chosen = 2, [], []
    for token in range(0, 200):
        seen = events[: token * NUM_LAYERS + layer + 1]
        errors.append(future[token, layer] - forecast_by_the_formula(fit, seen, layer))
        chosen.append(np.concatenate([used[token, layer], used[token, layer - 1], [1.0]]))
    assert np.abs(np.array(chosen).T @ np.array(errors)).max() < 0.05  # orthogonal to its inputs


def test_a_fit_beats_recency_and_frequency_where_experts_follow_one_another(tmp_path):
    """Held out: another stretch of the same process."""
    fit_horizon([markov_trace(0, 400)], ridge=1.0).write(tmp_path / "fit.npz")
    trace = markov_trace(1, 400)
    names = ("lru", "ewma", f"horizon={tmp_path / 'fit.npz'}")
    hits = [
        replay(
            trace,
            layer_pools(trace, 3, shared=True),
            lambda name=name: make_policy(name),
            dict.fromkeys(range(4), 1),
        ).hits
        for name in names
    ]
    assert hits[2] > 1.2 * max(hits[:2]), dict(zip(names, hits, strict=True))


def test_the_native_forecast_refuses_what_it_has_no_coefficients_for():
    fit = random_fit()
    with pytest.raises(ValueError, match="do not agree"):
        HorizonCoefficients(fit.own[:3], list(RATES), fit.before, fit.constant)
    forecast = HorizonForecast(HorizonCoefficients(fit.own, list(RATES), fit.before, fit.constant))
    for position, expert_ids, width in (
        (NUM_LAYERS, [0], 1),
        (-1, [0], 1),
        (0, [NUM_EXPERTS], 1),
        (0, [-1], 1),
        (0, [0], 99),
    ):
        with pytest.raises(ValueError, match="out of range"):
            forecast.observe(position, expert_ids, np.zeros(width, np.float32))


def rounded_to_bfloat16(values):
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("num_experts", [7, 40, 128])  # rows of part of a block, of several, of whole ones
def test_the_native_forecast_adds_one_by_one_in_a_fixed_order(num_experts):
    """Bit by bit, since decisions must not depend on how wide the registers are."""
    generator, layers, num_before = np.random.default_rng(num_experts), 3, 2
    own = generator.normal(size=(layers, num_experts, len(RATES), num_experts)).astype(np.float32)
    before = generator.normal(size=(layers, num_before, num_experts, num_experts)).astype(np.float32)
    constant = generator.normal(size=(layers, num_experts)).astype(np.float32)
    forecast = HorizonForecast(HorizonCoefficients(own, list(RATES), before, constant))
    rates = np.array(RATES, np.float32)[:, None]
    parts = np.zeros((layers, len(RATES), num_experts), np.float32)
    said = np.zeros((layers, num_before, num_experts), np.float32)  # by a layer, of the one n + 1 after it
    for event in range(12):
        layer = event % layers
        chosen = generator.choice(num_experts, 5, replace=False).tolist()
        parts[layer] = parts[layer] * (1 - rates) + sum(
            rounded_to_bfloat16(own[layer, i] * rates) for i in chosen
        )
        for n in range(num_before):
            said[layer, n] = sum(rounded_to_bfloat16(before[(layer + 1 + n) % layers, n, i]) for i in chosen)
        expected = constant[layer].copy()
        for n in range(num_before):
            expected += said[layer - 1 - n, n]
        for part in parts[layer]:
            expected += part
        out = np.empty(num_experts, np.float32)
        forecast.observe(layer, chosen, out)
        np.testing.assert_array_equal(out, expected)


def test_ids_that_are_no_ints_are_refused():
    policy = HorizonPolicy()
    for expert_ids, error in (
        ([], ValueError),
        (["1"], TypeError),
        ([1 << 70], OverflowError),
        (3, TypeError),
    ):
        with pytest.raises(error):
            policy.on_route(0, expert_ids, None)


def test_traces_of_different_models_make_no_fit():
    with pytest.raises(ConfigError, match="one checkpoint"):
        fit_horizon([markov_trace(0, 20), make_trace(np.zeros((5, 2, 1), int), num_experts=2)])
    with pytest.raises(ConfigError, match="decode tokens"):
        fit_horizon([])


def test_a_missing_or_damaged_fit_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file.*fit_horizon\.py"):
        make_policy(f"horizon={tmp_path / 'none.npz'}")
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    with pytest.raises(CheckpointError, match=r"bad\.npz is no fitted file"):
        make_policy(f"horizon={tmp_path / 'bad.npz'}")
    fit = random_fit()
    HorizonFit(fit.layers, fit.own, fit.before, fit.constant[:, :5], (), "").write(tmp_path / "shape.npz")
    with pytest.raises(CheckpointError, match="contradict"):
        read_fit(tmp_path / "shape.npz")
    HorizonFit(fit.layers, fit.own * np.nan, fit.before, fit.constant, (), "").write(tmp_path / "nan.npz")
    with pytest.raises(CheckpointError, match="not finite"):
        read_fit(tmp_path / "nan.npz")


@pytest.mark.parametrize("fitted", [True, False])
def test_victims_are_the_lowest_scores_among_the_candidates(tmp_path, fitted):
    """The native book-keeping against a sort, over a life of insertions and evictions."""
    random_fit().write(tmp_path / "fit.npz")
    policy = HorizonPolicy(str(tmp_path / "fit.npz") if fitted else None)
    generator, residents = np.random.default_rng(4), set()
    for layer, expert_ids in random_events(4, (1, 2, 5, 6), num_tokens=40):
        for key in {ExpertKey(layer, expert_id) for expert_id in expert_ids} - residents:
            policy.on_insert(key)
            residents.add(key)
        policy.on_route(layer, expert_ids, None)
        candidates = {key for key in residents if generator.random() < 0.8}
        count = int(generator.integers(0, 4))
        scores, rows = policy.scores(), {layer: policy.reach(layer, 0) for layer in (1, 2, 5, 6)}
        expected = sorted(candidates, key=lambda key: (scores[rows[key.layer_idx], key.expert_id], key))
        victims = policy.victims(candidates, count)
        assert victims == expected[:count]
        for key in victims:
            policy.on_evict(key)
        residents -= set(victims)


@pytest.mark.parametrize("fitted", [True, False])
def test_a_restored_state_is_a_share_of_what_the_policy_knew(tmp_path, fitted):
    random_fit().write(tmp_path / "fit.npz")
    policy, later, cold = (HorizonPolicy(str(tmp_path / "fit.npz") if fitted else None) for _ in range(3))
    events = random_events(5, (1, 2, 5, 6))
    for layer, expert_ids in events:
        policy.on_route(layer, expert_ids, None)
    later.restore(policy.state())
    if not fitted:  # with a fit, constants and the layers before a layer count, too
        assert np.allclose(later.scores(), RESTORED_SHARE * policy.scores())
    for layer, expert_ids in random_events(6, (1, 2, 5, 6), num_tokens=3):
        for each in (policy, later, cold):
            each.on_route(layer, expert_ids, None)
    expected = RESTORED_SHARE * policy.scores() + (1 - RESTORED_SHARE) * cold.scores()  # forecasts are linear
    assert np.allclose(later.scores(), expected, atol=1e-5)
    assert not np.allclose(cold.scores(), policy.scores(), atol=1e-2)


def test_a_state_of_other_shapes_is_refused():
    policy = HorizonPolicy()
    state = policy.state()
    for broken in (
        {"layers": np.array([0, 1]), "parts": np.zeros((1, len(RATES), 4), np.float32)},
        {"layers": np.array([0]), "parts": np.zeros((1, 2, 4), np.float32)},
        {"layers": np.array([0]), "parts": np.full((1, len(RATES), 4), np.nan, np.float32)},
        {**state, "parts": np.zeros((0, len(RATES), 0), np.float32)},
    ):
        with pytest.raises(ValueError, match=r"wanted|finite"):
            policy.restore(broken)
    policy.on_route(0, [9], None)
    with pytest.raises(ValueError, match="more experts"):
        policy.restore({"layers": np.array([0]), "parts": np.zeros((1, len(RATES), 4), np.float32)})
