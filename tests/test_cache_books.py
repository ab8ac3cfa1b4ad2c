"""Steps that native code ran, told in one go: the books are those of steps told one by one."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
from simulated_disk import FakeArena, SimulatedDisk, make_layouts, make_pool

from moe_offload.planning.eviction import make_policy
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.route_log import CHUNK_EVENTS
from moe_offload.stats import OffloadStats

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
