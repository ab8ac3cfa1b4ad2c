"""A routing trace through a cache of book-keeping only: the runtime's policies, admission and eviction.

``ReplayPool`` does what residency/expert_cache.py does without prefetch and without bytes: a step's
misses beyond the staging slots evict first, the policy sees the step after its misses came in, then what
is too many leaves; a prompt streams past the residents. tests/test_replay.py holds the two equal, and
replaying a run's own trace gives that run's counters to the digit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.config import DECODE_STEP_MAX_TOKENS
from moe_offload.errors import CheckpointError
from moe_offload.planning.eviction import EvictionPolicy, make_policy
from moe_offload.planning.plans import PoolPlan
from moe_offload.stats import OffloadStats
from moe_offload.storage.expert_format import ExpertKey
from moe_offload.trace import RoutingTrace

CHUNK_PASSES = 4096  # forward passes turned into Python lists at a time


@dataclass(frozen=True, slots=True)
class Event:
    """What one layer's router chose in one forward pass.

    Attributes:
        expert_ids: the union over the pass's tokens, ascending.
        weights: the router's, summed over the tokens, one for each id; None where they are not known.
        num_tokens: how many tokens chose each id; None for a step of few tokens.
    """

    layer_idx: int
    expert_ids: list[int]
    weights: list[float] | None
    num_tokens: list[int] | None


def events(trace: RoutingTrace) -> Iterator[Event]:
    """Yield the trace's events in the order of the run: pass by pass, layer by layer."""
    start = 0
    lengths = trace.step_tokens.tolist()
    for first in range(0, len(lengths), CHUNK_PASSES):
        chunk = lengths[first : first + CHUNK_PASSES]
        end = start + sum(chunk)
        if chunk == [1] * len(chunk):
            yield from _single_token_events(trace, start, end)
        else:
            for length in chunk:
                yield from _pass_events(trace, start, start + length)
                start += length
        start = end


def _single_token_events(trace: RoutingTrace, start: int, end: int) -> Iterator[Event]:
    order = np.argsort(trace.experts[start:end], axis=2, kind="stable")
    all_ids = np.take_along_axis(trace.experts[start:end], order, axis=2).tolist()
    weights = trace.weights
    all_weights = None
    if weights is not None:
        all_weights = np.take_along_axis(weights[start:end], order, axis=2).astype(np.float32).tolist()
    for token, rows in enumerate(all_ids):
        for position, layer_idx in enumerate(trace.layers):
            token_weights = None if all_weights is None else all_weights[token][position]
            yield Event(layer_idx, rows[position], token_weights, None)


def _pass_events(trace: RoutingTrace, start: int, end: int) -> Iterator[Event]:
    """Group a pass's (token, expert) pairs as runtime/executor.py does, float32 sums included."""
    for position, layer_idx in enumerate(trace.layers):
        chosen = trace.experts[start:end, position].reshape(-1).astype(np.int64)
        order = np.argsort(chosen, kind="stable")
        by_expert = chosen[order]
        firsts = np.flatnonzero(np.diff(by_expert, prepend=-1))
        sums: list[float] | None = None
        if trace.weights is not None:
            flat: NDArray[Any] = trace.weights[start:end, position].astype(np.float32).reshape(-1)[order]
            sums = np.add.reduceat(flat, firsts).tolist()
        counts = np.diff(np.append(firsts, len(order))).tolist()
        is_step = end - start <= DECODE_STEP_MAX_TOKENS
        yield Event(layer_idx, by_expert[firsts].tolist(), sums, None if is_step else counts)


class ReplayPool:
    """The residents of one pool, by key, and its policy; counts into ``stats``."""

    def __init__(
        self,
        plan: PoolPlan,
        num_experts: int,
        policy: EvictionPolicy,
        stats: OffloadStats,
        expert_bytes: Mapping[int, int],
    ) -> None:
        self.num_slots, self.capacity = plan.num_slots, plan.num_slots - plan.num_staging
        self.policy, self.stats, self.expert_bytes = policy, stats, expert_bytes
        self.residents: dict[ExpertKey, None] = {}
        self.total_experts = plan.num_experts
        self.keys = {i: [ExpertKey(i, expert_id) for expert_id in range(num_experts)] for i in plan.layers}

    def absent(self, event: Event) -> list[int]:
        """Return the event's experts that are not resident."""
        keys = self.keys[event.layer_idx]
        return [i for i in event.expert_ids if keys[i] not in self.residents]

    def num_newcomers(self, layer_idx: int) -> int:
        """Return how many of a layer's experts are not resident and would find room beside those that are."""
        missing = sum(key not in self.residents for key in self.keys[layer_idx])
        return max(0, min(missing, self.capacity - len(self.residents)))

    def admit(self, key: ExpertKey) -> None:
        """Begin with an expert resident."""
        self.residents[key] = None
        self.policy.on_insert(key)

    def route(self, event: Event) -> None:
        """Serve an event: as a step, or as a stream when it has many tokens or more ids than slots."""
        if event.num_tokens is None and len(event.expert_ids) <= self.num_slots:
            self._step(event)
        else:
            self._stream(event)

    def _step(self, event: Event) -> None:
        keys, residents, stats = self.keys[event.layer_idx], self.residents, self.stats
        wanted = [keys[expert_id] for expert_id in event.expert_ids]
        missing = [key for key in wanted if key not in residents]
        stats.hits += len(wanted) - len(missing)
        if missing:
            stats.misses += len(missing)
            stats.demand_bytes += len(missing) * self.expert_bytes[event.layer_idx]
            short = len(missing) - (self.num_slots - len(residents))
            if short > 0:
                unpinned = residents.keys() - set(wanted)
                self._evict(min(short, len(unpinned)), unpinned)
            for key in missing:
                residents[key] = None
                self.policy.on_insert(key)
        self.policy.on_route(event.layer_idx, event.expert_ids, event.weights)
        excess = len(residents) - self.capacity
        if excess > 0:
            self._evict(excess, residents.keys())

    def _stream(self, event: Event) -> None:
        """Read what is not resident; the most used fill free slots, up to the layer's share of the pool."""
        keys = self.keys[event.layer_idx]
        absent = self.absent(event)
        self.stats.stream_bytes += len(absent) * self.expert_bytes[event.layer_idx]
        held = sum(key in self.residents for key in keys)
        layer_share = self.capacity * len(keys) // self.total_experts
        count = max(0, min(layer_share - held, self.capacity - len(self.residents)))
        uses = dict(zip(event.expert_ids, event.num_tokens or [0] * len(event.expert_ids), strict=True))
        keepers = sorted(absent, key=lambda expert_id: (-uses[expert_id], expert_id))[:count]
        for expert_id in sorted(keepers):
            self.residents[keys[expert_id]] = None
            self.policy.on_insert(keys[expert_id])

    def _evict(self, count: int, candidates: Any) -> None:
        victims = self.policy.victims(candidates, count)
        assert len(set(victims)) == count, f"{self.policy.name} chose {victims}, wanted {count} residents"
        for key in victims:
            assert key in candidates, f"{self.policy.name} chose {key}, which is no candidate"
            self.policy.on_evict(key)
            del self.residents[key]
        self.stats.evictions += count


def replay(
    trace: RoutingTrace,
    pools: Sequence[PoolPlan],
    policy_factory: Callable[[], EvictionPolicy],
    expert_bytes: Mapping[int, int],
) -> OffloadStats:
    """Run a trace through ``pools`` from cold and return the counters; times stay zero.

    Args:
        pools: every layer of the trace is in one of them.
        policy_factory: makes one policy per pool; one that has ``foresee`` is shown its pool's events.
        expert_bytes: of an expert in the file, by layer index.

    Raises:
        CheckpointError: a layer of the trace is in no pool.
    """
    lost = sorted(set(trace.layers).difference(*(plan.layers for plan in pools)))
    if lost:
        raise CheckpointError(f"layers {lost} of the trace are in no pool of the plan")
    return replay_events(partial(events, trace), pools, policy_factory, expert_bytes, trace.num_experts)


def replay_events(
    events: Callable[[], Iterable[Event]],
    pools: Sequence[PoolPlan],
    policy_factory: Callable[[], EvictionPolicy],
    expert_bytes: Mapping[int, int],
    num_experts: int,
    *,
    residents: Iterable[ExpertKey] = (),
    on_event: Callable[[Event, OffloadStats], None] | None = None,
) -> OffloadStats:
    """Run events through ``pools``; see ``replay``.

    Args:
        events: called once for the run and once for each pool of an oracle.
        num_experts: of a layer, at most.
        residents: who is in memory at the start.
        on_event: called after each event with the counters so far.
    """
    stats = OffloadStats()
    by_layer = pools_by_layer(events, pools, policy_factory, expert_bytes, num_experts, stats)
    for key in residents:
        by_layer[key.layer_idx].admit(key)
    for event in events():
        by_layer[event.layer_idx].route(event)
        if on_event is not None:
            on_event(event, stats)
    return stats


def pools_by_layer(
    events: Callable[[], Iterable[Event]],
    pools: Sequence[PoolPlan],
    policy_factory: Callable[[], EvictionPolicy],
    expert_bytes: Mapping[int, int],
    num_experts: int,
    stats: OffloadStats,
) -> dict[int, ReplayPool]:
    """Return each layer's pool, empty; see ``replay_events``."""
    by_layer: dict[int, ReplayPool] = {}
    for plan in pools:
        pool = ReplayPool(plan, num_experts, policy_factory(), stats, expert_bytes)
        foresee(pool.policy, events, pool)
        by_layer |= dict.fromkeys(plan.layers, pool)
    return by_layer


def missed_experts(
    trace: RoutingTrace,
    pools: Sequence[PoolPlan],
    policy_factory: Callable[[], EvictionPolicy],
    expert_bytes: Mapping[int, int],
) -> NDArray[np.bool_]:
    """Return what each pass of a trace, run from cold, has to wait for: (passes, layers, experts)."""
    num_layers = len(trace.layers)
    missed = np.zeros((len(trace.step_tokens), num_layers, trace.num_experts), bool)
    by_layer = pools_by_layer(
        partial(events, trace), pools, policy_factory, expert_bytes, trace.num_experts, OffloadStats()
    )
    for number, event in enumerate(events(trace)):
        pool = by_layer[event.layer_idx]
        missed[number // num_layers, number % num_layers, pool.absent(event)] = True
        pool.route(event)
    return missed


def belady_hit_rate(trace: RoutingTrace, pools: Sequence[PoolPlan], expert_bytes: Mapping[int, int]) -> float:
    """Return the most that any policy could have hit on a trace without prefetch, prompts included."""
    return replay(trace, pools, lambda: make_policy("belady", oracles=True), expert_bytes).hit_rate


def foresee(policy: EvictionPolicy, events: Callable[[], Iterable[Event]], pool: ReplayPool) -> None:
    """Show an oracle the steps of its pool, which are the events that ``on_route`` will see."""
    look_ahead = getattr(policy, "foresee", None)
    if look_ahead is not None:
        look_ahead(
            [
                (event.layer_idx, event.expert_ids)
                for event in events()
                if event.layer_idx in pool.keys
                and event.num_tokens is None
                and len(event.expert_ids) <= pool.num_slots
            ]
        )


def layer_pools(trace: RoutingTrace, residents_per_layer: int, *, shared: bool) -> list[PoolPlan]:
    """Return pools that keep ``residents_per_layer`` experts resident for every layer of a trace.

    One pool a layer, or one over all of them that is as large. Staging comes on top, a step's misses.
    """
    layers = trace.layers
    groups = [layers] if shared else [(layer_idx,) for layer_idx in layers]
    plans = []
    for group in groups:
        num_experts = trace.num_experts * len(group)
        residents = min(residents_per_layer * len(group), num_experts)
        staging = trace.top_k if residents < num_experts else 0
        plans.append(PoolPlan(1, tuple(group), num_experts, residents + staging, staging))
    return plans
