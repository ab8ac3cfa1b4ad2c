"""Replays against the cache itself and a run's own counters; the quick engine against the plain one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_disk import FakeArena, SimulatedDisk, make_layouts, make_pool

import moe_offload
from moe_offload.errors import CheckpointError
from moe_offload.planning.eviction import ORACLES, POLICIES, LruPolicy, make_policy
from moe_offload.planning.plans import PoolPlan
from moe_offload.replay import events, foresee, layer_pools, missed_experts, replay
from moe_offload.replay_layers import replay_layers, scorer_of
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.runtime.model import DEMO_MODEL
from moe_offload.stats import OffloadStats
from moe_offload.trace import make_trace

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 7, 2
COUNTERS = ("hits", "misses", "demand_bytes", "stream_bytes", "evictions")
ALL_POLICIES = [*POLICIES, *ORACLES]


def random_trace(seed, step_tokens, *, with_weights=True, num_experts=NUM_EXPERTS):
    """Zipf-like choices that repeat the last token's half of the time."""
    generator = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(1, num_experts + 1)
    tokens = []
    for _ in range(sum(step_tokens)):
        fresh = [
            generator.choice(num_experts, TOP_K, replace=False, p=popularity / popularity.sum())
            for _ in range(NUM_LAYERS)
        ]
        tokens.append(tokens[-1] if tokens and generator.random() < 0.5 else np.array(fresh))
    weights = -np.sort(-generator.random((len(tokens), NUM_LAYERS, TOP_K)).astype(np.float32), axis=2)
    return make_trace(
        np.array(tokens),
        num_experts=num_experts,
        weights=weights if with_weights else None,
        step_tokens=step_tokens,
    )


def run_through_the_cache(trace, layouts, pools, policy_name):
    """Drive ExpertCache as the executor does and return its counters."""
    stats = OffloadStats()
    disk = SimulatedDisk(layouts)
    cache = ExpertCache(
        pools,
        layouts,
        disk,
        FakeArena(),
        lambda: make_policy(policy_name, oracles=True),
        stats,
        top_k=TOP_K,
        clock=itertools.count().__next__,
    )
    for pool in {id(pool): pool for pool in cache._pool_of.values()}.values():
        pool.keys = {layer: None for layer in pool.table}
        foresee(pool.policy, lambda: events(trace), pool)
    for event in events(trace):
        step = None
        if event.num_tokens is None:
            step = cache.begin(event.layer_idx, event.expert_ids, event.weights)
        if step is None:
            for _ in cache.stream(event.layer_idx, event.expert_ids, event.num_tokens):
                pass
        else:
            for expert_id in step.pending:
                cache.wait(step, expert_id)
            cache.end(step)
        cache.check()
    return stats


def counters(stats):
    return {name: getattr(stats, name) for name in COUNTERS}


@pytest.mark.parametrize("policy_name", ALL_POLICIES)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 10_000),
    step_tokens=st.lists(st.sampled_from([1, 1, 1, 1, 3, 17]), min_size=1, max_size=25),
    slots=st.integers(TOP_K, NUM_LAYERS * NUM_EXPERTS),
    sizes=st.sampled_from([(16,), (16, 24)]),
)
def test_a_replay_counts_what_the_cache_counts(policy_name, seed, step_tokens, slots, sizes):
    """Steps, short prompts, long prompts, one pool or two, from one token's experts to all of them."""
    layouts = make_layouts(NUM_LAYERS, NUM_EXPERTS, sizes)
    by_size = {}
    for layer_idx, layout in layouts.items():
        by_size.setdefault(layout.slot_bytes, {})[layer_idx] = layout
    pools = [
        make_pool(group, min(slots, NUM_EXPERTS * len(group)), TOP_K) for _, group in sorted(by_size.items())
    ]
    trace = random_trace(seed, step_tokens)
    expert_bytes = {layer_idx: layout.expert_bytes for layer_idx, layout in layouts.items()}
    replayed = replay(trace, pools, lambda: make_policy(policy_name, oracles=True), expert_bytes)
    assert counters(replayed) == counters(run_through_the_cache(trace, layouts, pools, policy_name))


@pytest.mark.parametrize("policy_name", ALL_POLICIES)
@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), with_weights=st.booleans(), num_experts=st.sampled_from([7, 40]))
def test_all_layers_at_once_count_as_one_after_the_other(policy_name, seed, with_weights, num_experts):
    trace = random_trace(seed, [1] * 60, with_weights=with_weights, num_experts=num_experts)
    expert_bytes = {layer_idx: 10 + layer_idx for layer_idx in trace.layers}
    scorer = scorer_of(make_policy(policy_name, oracles=True), trace)
    assert scorer is not None
    sizes = [1, TOP_K, 4, num_experts, num_experts + 5]
    quick = replay_layers(trace, scorer, sizes, expert_bytes)
    for size, stats in zip(sizes, quick, strict=True):
        pools = layer_pools(trace, size, shared=False)
        plain = replay(trace, pools, lambda: make_policy(policy_name, oracles=True), expert_bytes)
        assert counters(stats) == counters(plain), size


def test_all_layers_at_once_match_stretches_as_one_after_the_other():
    """Long enough for moe_infinity to have stretches to match."""
    trace = random_trace(3, [1] * 400, num_experts=12)
    name, expert_bytes = "moe_infinity", dict.fromkeys(trace.layers, 1)
    quick = replay_layers(trace, scorer_of(make_policy(name), trace), [3, 6], expert_bytes)
    for size, stats in zip([3, 6], quick, strict=True):
        pools = layer_pools(trace, size, shared=False)
        assert counters(stats) == counters(replay(trace, pools, lambda: make_policy(name), expert_bytes))


class TheirOwn(LruPolicy):
    """A policy that only its own methods know."""


@pytest.mark.parametrize("shared", [True, False])
def test_what_a_trace_waits_for_is_what_its_replay_counts(shared):
    trace = random_trace(5, [1] * 40)
    pools, sizes = layer_pools(trace, 3, shared=shared), dict.fromkeys(trace.layers, 10)
    missed = missed_experts(trace, pools, LruPolicy, sizes)
    assert missed.shape == (40, len(trace.layers), trace.num_experts)
    assert 0 < missed.sum() == replay(trace, pools, LruPolicy, sizes).misses < trace.experts.size
    assert np.take_along_axis(missed, trace.experts.astype(np.int64), axis=2).sum() == missed.sum()
    assert missed[0].sum() == trace.experts[0].size, "nothing is there at first"


def test_a_policy_that_nothing_is_known_of_is_left_to_the_plain_engine():
    assert scorer_of(TheirOwn(), random_trace(0, [1])) is None


def brute_force_hits(choices, size):
    """Most hits of one layer's events by trying every set of residents after every event."""
    best = {frozenset(): 0}
    for chosen in choices:
        following = {}
        for residents, hits in best.items():
            hits += len(residents & chosen)
            there = residents | chosen
            for kept in itertools.combinations(sorted(there), min(size, len(there))):
                following[frozenset(kept)] = max(following.get(frozenset(kept), 0), hits)
        best = following
    return max(best.values())


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_no_choice_of_residents_has_more_hits_than_belady(seed, size):
    generator = np.random.default_rng(seed)
    experts = np.array([generator.choice(5, (1, 2), replace=False) for _ in range(9)]).reshape(9, 1, 2)
    trace = make_trace(experts, num_experts=5)
    pools = layer_pools(trace, size, shared=False)
    stats = replay(trace, pools, lambda: make_policy("belady", oracles=True), {0: 1})
    assert stats.hits == brute_force_hits([set(row[0].tolist()) for row in experts], size)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_belady_bounds_every_policy(size, shared):
    trace = random_trace(5, [1] * 200)
    hits = {
        name: replay(
            trace,
            layer_pools(trace, size, shared=shared),
            lambda name=name: make_policy(name, oracles=True),
            dict.fromkeys(trace.layers, 1),
        ).hits
        for name in ALL_POLICIES
    }
    assert max(hits, key=hits.get) == "belady", hits


def test_a_layer_without_a_pool_is_an_error():
    trace = random_trace(0, [1])
    with pytest.raises(CheckpointError, match=r"layers \[1, 2\]"):
        replay(trace, [PoolPlan(1, (0,), 7, 3, 2)], lambda: make_policy("lru"), {0: 1})


@pytest.mark.parametrize(
    ("experts", "policy"),
    [
        pytest.param(4, "lru", marks=pytest.mark.slow),  # sizes and policies by turns do by default
        ("12%", "ewma"),
        ("25%", "lru"),
        pytest.param("25%", "ewma", marks=pytest.mark.slow),
        ("25%", "mrs"),
        ("25%", "horizon"),
        pytest.param("50%", "ewma", marks=pytest.mark.slow),
        ("all", "lru"),
    ],
)
def test_replaying_a_runs_own_trace_gives_its_counters_to_the_digit(experts, policy):
    """Two sequences of the demo model: a prompt of one step, and one that streams."""
    tokenizer = moe_offload.load_tokenizer(DEMO_MODEL)
    model = moe_offload.from_pretrained(experts=experts, policy=policy, prefetch=False, context=128)
    long = "In the spring of that year the engineers began to measure the old bridge, and the mayor wrote to"
    with model.offload.trace() as recorder:
        for prompt in ("The patient was", long):
            recorder.begin_sequence()
            inputs = tokenizer(prompt, return_tensors="pt")
            model.generate(**inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    trace, stats = recorder.trace(), model.offload.stats()
    assert trace.step_tokens.max() > 16 and 1 < trace.step_tokens[0] <= 16
    expert_bytes = {int(i): n for i, n in trace.metadata["expert_bytes"].items()}
    replayed = replay(trace, model.offload.plan.pools, lambda: make_policy(policy), expert_bytes)
    assert counters(replayed) == counters(stats)
    assert stats.hits + stats.misses > 1000
    model.offload.close()
