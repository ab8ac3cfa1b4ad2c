"""Each published policy against its formula, worked out by hand on few events."""

from __future__ import annotations

import pytest

from moe_offload.errors import ConfigError
from moe_offload.planning.eviction import ORACLES, POLICIES, EvictionPolicy, make_policy
from moe_offload.storage.expert_format import ExpertKey


def route(policy, *events):
    """Show events (layer, ids[, weights]) to a policy, each id inserted at its first use."""
    seen = set()
    for layer_idx, expert_ids, *weights in events:
        for expert_id in expert_ids:
            key = ExpertKey(layer_idx, expert_id)
            if key not in seen:
                seen.add(key)
                policy.on_insert(key)
        policy.on_route(layer_idx, expert_ids, weights[0] if weights else None)
    return seen


def order_of(policy, *events):
    """Return all the experts of the events in the order in which they would leave."""
    seen = route(policy, *events)
    return [tuple(key) for key in policy.victims(seen, len(seen))]


def expert_order(name, *events):
    return [expert_id for _, expert_id in order_of(make_policy(name), *((0, *event) for event in events))]


def test_lfu_evicts_the_fewest_uses():
    assert expert_order("lfu", ([1, 2],), ([1, 3],), ([1, 2],)) == [3, 2, 1]


def test_lfru_weighs_uses_by_age():
    """Expert 1: 3 uses, age 5: 3/6. Expert 2: 1 use, age 0: 1/1. Expert 3: 4 uses, age 1: 4/2."""
    events = [([1],)] * 3 + [([3],)] * 4 + [([2],)]
    assert expert_order("lfru", *events) == [1, 2, 3]


def test_lcp_decays_by_a_quarter_every_128_tokens():
    """Expert 1: 5 uses 128 tokens ago, 5/4. Expert 2: 1 use now. Expert 3: 127 uses one token ago."""
    events = [([1],)] * 5 + [([3],)] * 127 + [([2],)]
    assert expert_order("lcp", *events) == [2, 1, 3]
    assert expert_order("lcp", *[([1],)] * 3, *events[5:]) == [1, 2, 3]  # 3/4 < 1


def test_class_lru_divides_age_by_two_to_the_class():
    """Expert 1: four uses, class 1, age 5: 2.5. Expert 2: one use, age 4: 4. Expert 3: age 0."""
    events = [([1],)] * 4 + [([2],)] + [([3],)] * 4
    assert expert_order("class_lru", *events) == [2, 1, 3]


def test_mrs_decays_the_routers_weights():
    """alpha 0.25: expert 1 has .25 * .9 * .75 ** 2 = .127, expert 2 .25 * .6 * .75 = .113, expert 3 .1."""
    events = ([1], [0.9]), ([2], [0.6]), ([3], [0.4])
    assert expert_order("mrs", *events) == [3, 2, 1]


def test_static_popularity_is_frozen_after_256_tokens():
    before = [([1],)] * 200 + [([2],)] * 56
    assert expert_order("static", *before, *[([2, 3],)] * 500) == [3, 2, 1]


def test_least_stale_evicts_stale_experts_in_the_order_they_came():
    events = (0, [5]), (1, [4]), (0, [3]), (1, [4])
    assert order_of(make_policy("least_stale"), *events) == [(0, 5), (1, 4), (0, 3)]
    assert order_of(make_policy("least_stale"), *events, (0, [5])) == [(1, 4), (0, 3), (0, 5)]


def test_arc_evicts_what_was_used_once_before_what_was_used_again():
    policy = make_policy("arc")
    seen = route(policy, (0, [1]), (0, [2]), (0, [1]), (0, [3]))
    assert [key.expert_id for key in policy.victims(seen, 3)] == [2, 3, 1]


def test_arc_gives_recency_more_room_when_what_left_once_used_comes_back():
    policy = make_policy("arc")
    first, second, third = (ExpertKey(0, i) for i in (1, 2, 3))
    route(policy, (0, [1]), (0, [2]), (0, [1]))  # 1 was used again, 2 once
    policy.on_evict(second)
    policy.on_insert(second)  # a ghost hit: the target of T1 rises to 1, and 2 counts as used again
    policy.on_route(0, [2], None)
    policy.on_insert(third)
    policy.on_route(0, [3], None)
    assert policy.victims({first, second, third}, 1) == [first]  # T1 = {3} is not above its target


def test_fate_keeps_the_four_lowest_layers():
    events = [(layer, [0]) for layer in range(6)]
    assert [layer for layer, _ in order_of(make_policy("fate"), *events)] == [4, 5, 0, 1, 2, 3]
    assert order_of(make_policy("fate"), (7, [1]), (7, [2])) == [(7, 1), (7, 2)]


def test_moe_infinity_keeps_what_the_most_similar_stretch_used():
    """Two stretches of 128 tokens on experts 1 and 2, then one like the first: 3 is in it, 4 is not."""
    policy = make_policy("moe_infinity")
    events = [(0, [1, 3])] * 128 + [(0, [2, 4])] * 128 + [(0, [1, 4])] + [(0, [1, 3])] * 8
    victims = order_of(policy, *events)
    assert victims[-2:] == [(0, 3), (0, 1)]


def test_plec_keeps_what_usually_follows():
    """3 follows 1 always; 4 was used as lately as 3."""
    events = [([1],), ([3],)] * 8 + [([4],), ([5],), ([6],), ([1],)]
    assert expert_order("plec", *events)[-1] == 3


def test_belady_evicts_what_is_used_again_last():
    events = [(0, [1]), (0, [2]), (0, [3]), (0, [2]), (0, [1])]
    for name, expected in (("belady", [3, 1, 2]), ("belady_no_bypass", [1, 2, 3])):
        policy = make_policy(name, oracles=True)
        policy.foresee(events)
        seen = route(policy, *events[:3])
        assert [key.expert_id for key in policy.victims(seen, 3)] == expected


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_what_knows_the_future_is_refused_outside_of_replays(name):
    with pytest.raises(ConfigError, match="replays of a trace only"):
        make_policy(name)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_takes_layers_and_experts_as_they_come(name):
    """Rows and columns appear in any order; only candidates leave, each once."""
    policy = make_policy(name)
    assert isinstance(policy, EvictionPolicy) and policy.name == name
    seen = route(policy, (4, [2]), (9, [0, 5]), (1, [7]), (4, [2, 6]), (9, [11]))
    candidates = seen - {ExpertKey(4, 2)}
    victims = policy.victims(candidates, 10)
    assert sorted(victims) == sorted(candidates)
    for key in victims:
        policy.on_evict(key)
    assert policy.victims({ExpertKey(4, 2)}, 1) == [(4, 2)]
