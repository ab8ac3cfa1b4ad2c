"""Hit rates of a run's first tokens: from cold, started warm by the same topic, and by another one.

What an earlier run leaves (residency/warm_start.py): how often every expert was used, so that the hottest are
resident, and the policy's scores, where it can give them. "same topic" learns from the rest of the trace,
"other topic" from the next trace on the command line.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_offload.planning.eviction import make_policy
from moe_offload.replay import events, layer_pools, replay_events
from moe_offload.residency.warm_start import WarmState
from moe_offload.trace import RoutingTrace


def start_rates(
    traces: list[tuple[str, RoutingTrace]], names: list[str], sizes: list[list[int]], num_tokens: int
) -> list[dict[str, Any]]:
    """Return one row a trace, policy and size, one pool over all layers as the runtime has it."""
    rows = []
    for index, (stem, trace) in enumerate(traces):
        first, rest = trace.head(num_tokens), tail(trace, num_tokens)
        other = traces[(index + 1) % len(traces)][1]
        for name in names:
            for size in sizes[index]:
                rates = {"cold": rate(first, name, size, None), "same_topic": rate(first, name, size, rest)}
                rates["other_topic"] = rate(first, name, size, other) if len(traces) > 1 else None
                rows.append({"trace": stem, "policy": name, "slots": size, "tokens": num_tokens, **rates})
    return rows


def tail(trace: RoutingTrace, num_tokens: int) -> RoutingTrace:
    """Return what comes after the first tokens."""
    from moe_offload.trace import make_trace

    weights = None if trace.weights is None else trace.weights[num_tokens:]
    return make_trace(
        trace.experts[num_tokens:], num_experts=trace.num_experts, weights=weights, layers=trace.layers
    )


def rate(trace: RoutingTrace, name: str, size: int, learned: RoutingTrace | None) -> float:
    """Return the hit rate on ``trace`` after a run of ``learned``, or from cold."""
    pools = layer_pools(trace, size, shared=True)
    expert_bytes = dict.fromkeys(trace.layers, 1)
    policy, residents = make_policy(name), []
    if learned is not None:
        before = make_policy(name)
        replay_events(lambda: events(learned), pools, lambda: before, expert_bytes, trace.num_experts)
        if hasattr(before, "state"):
            policy.restore(before.state())
        uses = np.stack([np.bincount(layer.reshape(-1), minlength=trace.num_experts) for layer in
                         learned.experts.transpose(1, 0, 2)])  # fmt: skip
        heat = dict(zip(learned.layers, uses, strict=True))
        residents = WarmState(heat, name).hottest()[: pools[0].num_slots - pools[0].num_staging]
    run = replay_events(
        lambda: events(trace), pools, lambda: policy, expert_bytes, trace.num_experts, residents=residents
    )
    return run.hit_rate


def print_starts(rows: list[dict[str, Any]]) -> None:
    print("\n| trace | policy | slots | cold | warm, same topic | warm, other topic |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        rates = [row[name] for name in ("cold", "same_topic", "other_topic")]
        shown = " | ".join("" if value is None else f"{value:.3f}" for value in rates)
        print(f"| {row['trace']} | {row['policy']} | {row['slots']} | {shown} |")
