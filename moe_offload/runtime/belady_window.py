"""How far the run just made stayed below Belady's rule, in RAM and on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe_offload.planning.eviction import make_policy
from moe_offload.planning.plans import PoolPlan
from moe_offload.replay import Event, replay_events
from moe_offload.residency.device_tier import DeviceTier
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.route_log import LoggedEvent, Mark
from moe_offload.stats import OffloadStats

Rates = tuple[float | None, float | None]


def find_distances(
    stats: OffloadStats,
    cache: ExpertCache,
    pools: Sequence[PoolPlan],
    num_experts: int,
    tier: DeviceTier | None,
) -> None:
    """Put both rates into ``stats``, and those of the device that is above ``cache`` into its part."""
    stats.window_hit_rate, stats.belady_hit_rate = belady_window(cache, pools, num_experts)
    if tier is not None and stats.device is not None:
        rates = device_window(tier, num_experts)
        stats.device.device_window_hit_rate, stats.device.device_belady_hit_rate = rates


def belady_window(cache: ExpertCache, pools: Sequence[PoolPlan], num_experts: int) -> Rates:
    """Return (hit rate of residents, the most that any policy could have had) over the events that are kept.

    Both begin with who was resident then and count the needs of steps, not of prompts: where a device is
    above ``cache``, of what it did not serve. (None, None) where there were none.
    """
    logged, marks = cache.log.events()
    left = [
        (i, [e for e in ids if e not in above] if above else ids, num_tokens, above)
        for i, ids, num_tokens, above in logged
    ]
    return _window(left, marks[0], cache.hits_and_needs, pools, num_experts)


def device_window(tier: DeviceTier, num_experts: int) -> Rates:
    """Return the same of a device's cache: every expert of its layers is a need."""
    logged, marks = tier.ram.log.events()
    return _window(logged, marks[1], tier.cache.hits_and_needs, tier.plan.pools, num_experts)


def _window(
    logged: Sequence[LoggedEvent],
    start: Mark,
    hits_and_needs: tuple[int, int],
    pools: Sequence[PoolPlan],
    num_experts: int,
) -> Rates:
    """Replay what is logged of the pools' layers from ``start`` on; ``hits_and_needs``: by now."""
    hits, needs = hits_and_needs
    if needs == start.needs:
        return None, None
    rate = (hits - start.hits) / (needs - start.needs)
    if all(pool.num_staging == 0 for pool in pools):
        return rate, rate  # nothing ever has to leave, and steps without a read are not logged
    layers = {layer_idx for pool in pools for layer_idx in pool.layers}

    def events() -> Iterator[Event]:
        for layer_idx, expert_ids, num_tokens, _ in logged:
            if layer_idx in layers and len(expert_ids):  # the tier above may have served them all
                tokens = None if num_tokens is None else list(num_tokens)
                yield Event(layer_idx, list(expert_ids), None, tokens)

    best = replay_events(
        events,
        pools,
        lambda: make_policy("belady", oracles=True),
        dict.fromkeys(layers, 0),
        num_experts,
        residents=start.keys(),
    )
    return rate, best.hit_rate
