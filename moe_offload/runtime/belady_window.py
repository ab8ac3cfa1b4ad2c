"""How far the run just made stayed below Belady's rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe_offload.planning.eviction import make_policy
from moe_offload.planning.plans import PoolPlan
from moe_offload.replay import Event, replay_events
from moe_offload.residency.expert_cache import ExpertCache


def belady_window(
    cache: ExpertCache, pools: Sequence[PoolPlan], num_experts: int
) -> tuple[float | None, float | None]:
    """Return (hit rate of residents, the most that any policy could have had) over the events that are kept.

    Both begin with who was resident then and count the needs of steps, not of prompts. (None, None) where
    there were none.
    """
    logged, residents, hits_before, needs_before = cache.log.events()
    hits, needs = cache.hits_and_needs
    if needs == needs_before:
        return None, None
    rate = (hits - hits_before) / (needs - needs_before)
    if all(pool.num_staging == 0 for pool in pools):
        return rate, rate  # nothing ever has to leave, and steps without a read are not logged

    def events() -> Iterator[Event]:
        for layer_idx, expert_ids, num_tokens in logged:
            tokens = None if num_tokens is None else list(num_tokens)
            yield Event(layer_idx, list(expert_ids), None, tokens)

    layers = [layer_idx for pool in pools for layer_idx in pool.layers]
    best = replay_events(
        events,
        pools,
        lambda: make_policy("belady", oracles=True),
        dict.fromkeys(layers, 0),
        num_experts,
        residents=residents,
    )
    return rate, best.hit_rate
