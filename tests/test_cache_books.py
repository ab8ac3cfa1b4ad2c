"""Steps that native code ran, told in one go: the books are those of steps told one by one."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import partial

import numpy as np
import pytest
from simulated_disk import FakeArena, SimulatedDisk, make_layouts, make_pool

from moe_offload.planning.eviction import make_policy
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.route_log import CHUNK_EVENTS
from moe_offload.stats import OffloadStats
from moe_offload.storage.expert_format import ExpertKey

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2
ALL = NUM_LAYERS * NUM_EXPERTS


def make_cache(num_slots: list[int], policy: str) -> tuple[ExpertCache, OffloadStats]:
    """Return a cache of a pool, or of one for the first layer and one for the others."""
    layouts = make_layouts(NUM_LAYERS, NUM_EXPERTS)
    parts = [dict(layouts)] if len(num_slots) == 1 else [{0: layouts[0]}, {i: layouts[i] for i in (1, 2)}]
    pools = [make_pool(part, count, TOP_K) for part, count in zip(parts, num_slots, strict=True)]
    stats = OffloadStats()
    make, disk = partial(make_policy, policy), SimulatedDisk(layouts)
    cache = ExpertCache(pools, layouts, disk, FakeArena(), make, stats, top_k=TOP_K, clock=lambda: 0.0)
    return cache, stats


@pytest.mark.parametrize("policy", ["horizon", "lru"])
@pytest.mark.parametrize("num_slots", [[10], [ALL], [NUM_EXPERTS, 7], [4, 7]])
def test_a_run_told_in_one_go_leaves_what_its_steps_leave_one_by_one(num_slots, policy) -> None:
    left = []
    for in_one_go in (False, True):
        (cache, stats), generator = make_cache(num_slots, policy), random.Random(3)
        for _ in range(CHUNK_EVENTS // 2):  # so a chunk of the log ends in the middle of a run
            steps = []
            for layer_idx in range(NUM_LAYERS):
                row = cache.resident_table(layer_idx)[:, 0]
                resident = np.flatnonzero(row).tolist()
                ids = sorted(generator.sample(range(NUM_EXPERTS), TOP_K))
                if set(ids) <= set(resident):
                    steps.append((layer_idx, ids, [0.5, 0.5]))
                    continue
                tell(cache, steps, in_one_go)
                steps = []
                step = cache.begin(layer_idx, ids, [0.5, 0.5])
                for expert_id in step.pending:
                    cache.wait(step, expert_id)
                cache.end(step)
            tell(cache, steps, in_one_go)
        cache.check()
        states = [{name: value.tolist() for name, value in s.items()} for s in cache.policy_states()]
        left.append((cache.residents(), cache.log.events(), stats.as_dict(), states))
    assert left[0] == left[1]
    assert left[0][2]["hits"], "no step was told of"


def tell(cache: ExpertCache, steps: list, in_one_go: bool) -> None:
    if in_one_go:
        cache.used_in_run(steps)
    else:
        for step in steps:
            cache.used_residents(*step)


@pytest.mark.parametrize("policy", ["horizon", "lru"])
@pytest.mark.parametrize("num_slots", [12, 15])
def test_guesses_used_in_a_run_come_and_push_out_whom_they_would_have_one_by_one(num_slots, policy) -> None:
    """Who left for one, and was used later in the run, comes back without being read."""
    left, came_back = [], 0
    for in_one_go in (False, True):
        (cache, stats), generator = make_cache([num_slots], policy), random.Random(3)
        for _ in range(300):
            chosen = [sorted(generator.sample(range(NUM_EXPERTS), TOP_K)) for _ in range(NUM_LAYERS)]
            right = [ExpertKey(i, expert_id) for i, ids in enumerate(chosen) for expert_id in ids]
            cache.prefetch(generator.sample(right, 3))
            cache.finish_reads()
            read_bytes = stats.demand_bytes
            run_in_one_go(cache, chosen) if in_one_go else run_one_by_one(cache, range(NUM_LAYERS), chosen)
            came_back += in_one_go and stats.demand_bytes == read_bytes
            discard_guesses(cache)
        cache.check()
        states = [{name: value.tolist() for name, value in s.items()} for s in cache.policy_states()]
        counters = stats.hits, stats.misses + stats.prefetch_hits, stats.evictions
        left.append((cache.residents(), cache.log.events(), counters, states))
    assert left[0] == left[1]
    assert came_back, "no run went through"


def run_one_by_one(cache: ExpertCache, layers: Iterable[int], chosen: list[list[int]]) -> None:
    for layer_idx in layers:
        step = cache.begin(layer_idx, chosen[layer_idx], [0.5, 0.5])
        for expert_id in step.pending:
            cache.wait(step, expert_id)
        cache.end(step)


def run_in_one_go(cache: ExpertCache, chosen: list[list[int]]) -> None:
    """Run on what is there at the beginning, up to a layer that misses something."""
    steps, arrived = [], []
    for layer_idx, ids in enumerate(chosen):
        if not all(cache.has_bytes(layer_idx, ids)):
            break
        steps.append((layer_idx, ids, [0.5, 0.5]))
        residents = cache.are_resident(layer_idx, ids)
        arrived += [(layer_idx, i) for i, is_resident in zip(ids, residents, strict=True) if not is_resident]
    cache.used_in_run(steps, arrived)
    run_one_by_one(cache, range(len(steps), NUM_LAYERS), chosen)


def discard_guesses(cache: ExpertCache) -> None:
    for pool in cache._pools:
        for entry in pool.unclaimed():
            pool.discard(entry)
