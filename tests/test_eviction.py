"""Policies against their formulas, written out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_offload.errors import ConfigError
from moe_offload.planning.eviction import EvictionPolicy, EwmaPolicy, LruPolicy, make_policy
from moe_offload.storage.expert_format import ExpertKey

NUM_LAYERS, NUM_EXPERTS = 3, 6
ALL_KEYS = [ExpertKey(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
EVENTS = st.lists(
    st.tuples(st.integers(0, NUM_LAYERS - 1), st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1)),
    max_size=60,
)


def decayed_frequencies(events: list[tuple[int, set[int]]], alpha: float) -> dict[ExpertKey, float]:
    """The formula, eagerly: every event decays every expert of its layer."""
    scores = dict.fromkeys(ALL_KEYS, 0.0)
    for layer_idx, chosen in events:
        for expert_id in range(NUM_EXPERTS):
            key = ExpertKey(layer_idx, expert_id)
            scores[key] = (1 - alpha) * scores[key] + alpha * (expert_id in chosen)
    return scores


@given(EVENTS, st.sets(st.sampled_from(ALL_KEYS)), st.integers(0, 20), st.sampled_from([0.05, 0.5]))
def test_ewma_evicts_the_lowest_decayed_frequencies(
    events: list[tuple[int, set[int]]], residents: set[ExpertKey], count: int, alpha: float
) -> None:
    policy = EwmaPolicy(alpha)
    for key in sorted(residents):
        policy.on_insert(key)
    for layer_idx, chosen in events:
        policy.on_route(layer_idx, sorted(chosen), None)
    victims = policy.victims(residents, count)
    assert len(victims) == len(set(victims)) == min(count, len(residents))
    scores = decayed_frequencies(events, alpha)
    chosen_scores = [scores[key] for key in victims]
    assert chosen_scores == pytest.approx(sorted(scores[key] for key in residents)[: len(victims)])
    assert chosen_scores == pytest.approx(sorted(chosen_scores))


@given(EVENTS, st.sets(st.sampled_from(ALL_KEYS), min_size=1))
def test_what_ewma_knows_does_not_depend_on_when_an_expert_came(
    events: list[tuple[int, set[int]]], residents: set[ExpertKey]
) -> None:
    early, late = EwmaPolicy(), EwmaPolicy()
    for key in sorted(residents):
        early.on_insert(key)
    for layer_idx, chosen in events:
        early.on_route(layer_idx, sorted(chosen), None)
        late.on_route(layer_idx, sorted(chosen), None)
    for key in sorted(residents):
        late.on_insert(key)
    assert early.victims(residents, len(residents)) == late.victims(residents, len(residents))


def test_ewma_stays_exact_after_a_million_events() -> None:
    """The stored logarithms grow with the event count; equal histories must stay equal."""
    policy = EwmaPolicy()
    for layer_idx in range(2):
        policy._row(layer_idx)
        policy._num_events[layer_idx] = 1_000_000
        for expert_id in range(3):
            policy.on_insert(ExpertKey(layer_idx, expert_id))
    for _ in range(40):
        policy.on_route(0, [0, 1], None)
        policy.on_route(1, [1, 2], None)
    policy.on_route(0, [0], None)
    policy.on_route(1, [2], None)
    keys = {ExpertKey(layer_idx, expert_id) for layer_idx in range(2) for expert_id in range(3)}
    assert policy.victims(keys, 6) == [(0, 2), (1, 0), (0, 1), (1, 1), (0, 0), (1, 2)]


@given(EVENTS, st.sets(st.sampled_from(ALL_KEYS)), st.integers(0, 20))
def test_lru_evicts_what_was_chosen_longest_ago(
    events: list[tuple[int, set[int]]], residents: set[ExpertKey], count: int
) -> None:
    policy = LruPolicy()
    last_event = dict.fromkeys(residents, -1)
    for key in sorted(residents):
        policy.on_insert(key)
    for position, (layer_idx, chosen) in enumerate(events):
        policy.on_route(layer_idx, sorted(chosen, reverse=True), None)
        last_event |= {
            key: position for key in residents if key.layer_idx == layer_idx and key.expert_id in chosen
        }
    wanted = sorted(residents, key=lambda key: (last_event[key], key))[:count]
    assert policy.victims(residents, count) == wanted


@pytest.mark.parametrize("name", ["lru", "ewma"])
@given(st.sets(st.sampled_from(ALL_KEYS), min_size=2), st.data())
def test_only_candidates_are_victims_and_ties_go_to_the_smaller_key(
    name: str, residents: set[ExpertKey], data: st.DataObject
) -> None:
    policy = make_policy(name)
    candidates = data.draw(st.sets(st.sampled_from(sorted(residents))))
    for key in sorted(residents):
        policy.on_insert(key)
    assert policy.victims(candidates, len(residents)) == sorted(candidates)


@pytest.mark.parametrize("name", ["lru", "ewma"])
def test_an_evicted_expert_is_no_victim_until_it_comes_back(name: str) -> None:
    policy = make_policy(name)
    first, second = ExpertKey(0, 1), ExpertKey(4, 9)
    policy.on_insert(first)
    policy.on_insert(second)
    policy.on_evict(first)
    assert policy.victims({first, second}, 1) == [second]
    policy.on_insert(first)
    policy.on_route(4, [9], None)
    assert policy.victims({first, second}, 1) == [first]


def test_a_policy_comes_by_name_or_by_import_path() -> None:
    assert isinstance(make_policy("lru"), LruPolicy)
    assert isinstance(make_policy("moe_offload.planning.eviction:EwmaPolicy"), EwmaPolicy)
    assert isinstance(make_policy("ewma"), EvictionPolicy)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mru", "is unknown"),
        ("", "is unknown"),
        ("no.such.module:Policy", "No module named 'no'"),
        ("moe_offload.planning.eviction:Missing", "no attribute 'Missing'"),
        ("collections:OrderedDict", "has not the methods"),
    ],
)
def test_an_unknown_policy_is_refused_with_the_known_names(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"{reason}.*known are ewma, lru"):
        make_policy(name)
