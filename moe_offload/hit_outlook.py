"""What a cache does for a model's decoded tokens, by replaying a trace of its routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_offload.errors import CheckpointError
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.plans import PoolPlan
from moe_offload.replay import Event, events, replay_events
from moe_offload.stats import OffloadStats
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.trace import RoutingTrace

TRACE_TOKENS = 2000  # of a trace; replaying them takes a second or two


@dataclass(frozen=True)
class Hits:
    """What a cache does for some decoded tokens.

    Attributes:
        misses: share of a layer's steps with 0, 1, ... misses; None: not known.
    """

    rate: float
    misses: tuple[float, ...] | None = None


def replayed_hits(
    checkpoint: Checkpoint, pools: Sequence[PoolPlan], trace: RoutingTrace, policy: str, split: int = 0
) -> tuple[Hits, Hits]:
    """Return what a cache does for a trace's decoded tokens before and after ``split``, from cold.

    Args:
        split: number of tokens; 0 is half of them.
    """
    expert_bytes = {i: layout.expert_bytes for i, layout in checkpoint.experts.layouts.items()}
    split, top_k = split or trace.num_tokens // 2, trace.top_k
    found = ([0] * (top_k + 1), [0] * (top_k + 1))  # steps by misses, before and after
    ends = np.cumsum(trace.step_tokens).tolist()
    seen, count = 0, 0

    def note(event: Event, stats: OffloadStats) -> None:
        nonlocal seen, count
        end, count = ends[count // len(trace.layers)], count + 1
        if event.num_tokens is None and len(event.expert_ids) <= top_k:
            found[end > split][stats.misses - seen] += 1
        seen = stats.misses

    replay_events(
        lambda: events(trace),
        pools,
        lambda: make_policy(policy),
        expert_bytes,
        trace.num_experts,
        on_event=note,
    )
    first, later = (_hits_of(steps, top_k) for steps in found)
    return first, later


def _hits_of(steps: list[int], top_k: int) -> Hits:
    total = max(1, sum(steps))
    missed = sum(misses * count for misses, count in enumerate(steps))
    return Hits(1 - missed / (total * top_k), tuple(count / total for count in steps))


def first_tokens(trace: RoutingTrace, checkpoint: Checkpoint) -> RoutingTrace:
    """Return the tokens of a trace that are replayed.

    Raises:
        CheckpointError: it is of another model.
    """
    spec = checkpoint.spec
    if (trace.num_experts, tuple(trace.layers)) != (spec.num_experts, tuple(spec.moe_layers)):
        raise CheckpointError(
            f"the trace has {trace.num_experts} experts in each of {len(trace.layers)} layers, "
            f"{checkpoint.path} {spec.num_experts} in each of {len(spec.moe_layers)}; record one of this "
            "model with moe-offload trace"
        )
    return trace.head(min(TRACE_TOKENS, trace.num_tokens))
