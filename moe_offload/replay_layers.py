"""The replay of replay.py for caches of one layer each, all layers and several sizes at once.

Possible for a policy whose scores do not depend on what is resident: it sees each decode token's
experts of all layers in one call, and numpy evicts in all caches together. tests/test_replay.py holds the
counters equal to replay.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_offload.planning.eviction import EvictionPolicy, EwmaPolicy, LruPolicy
from moe_offload.planning.policies.belady import NEVER, BeladyPolicy
from moe_offload.planning.policies.table import FloatArray, TablePolicy, Weights
from moe_offload.stats import OffloadStats
from moe_offload.trace import RoutingTrace

Ids = NDArray[np.intp]


def scorer_of(policy: EvictionPolicy, trace: RoutingTrace) -> TablePolicy | None:
    """Return a TablePolicy with the order of ``policy``, fit for ``replay_layers``; None if there is none."""
    if type(policy) is LruPolicy:
        scorer: TablePolicy = _LruScores()
    elif type(policy) is EwmaPolicy:
        scorer = _EwmaScores(policy.alpha)
    elif isinstance(policy, TablePolicy) and not policy.scores_know_residents:
        scorer = policy
    else:
        return None
    for layer_idx in trace.layers:
        scorer.reach(layer_idx, trace.num_experts - 1)
    if isinstance(scorer, BeladyPolicy):
        scorer.foresee_layers(next_uses(trace))
    return scorer


def replay_layers(
    trace: RoutingTrace,
    scorer: TablePolicy,
    residents_per_layer: Sequence[int],
    expert_bytes: Mapping[int, int],
    on_progress: Callable[[int], None] | None = None,
) -> list[OffloadStats]:
    """Run a decode-only trace through caches of ``residents_per_layer`` experts; one result per size.

    Args:
        trace: every token a step of its own (RoutingTrace.decode_only).
        scorer: from ``scorer_of``, new.
        on_progress: called now and then with the tokens done.
    """
    assert (trace.step_tokens == 1).all(), "replay_layers takes single-token steps"
    num_layers, top_k = len(trace.layers), trace.top_k
    sizes = np.minimum(np.asarray(residents_per_layer), trace.num_experts)[:, None]  # (S, 1)
    resident = np.zeros((len(sizes), num_layers, trace.num_experts), np.bool_)
    hits = np.zeros((len(sizes), num_layers), np.int64)
    evictions = np.zeros(len(sizes), np.int64)
    rows = np.arange(num_layers)[:, None]
    order = np.argsort(trace.experts, axis=2, kind="stable")
    experts = np.take_along_axis(trace.experts, order, axis=2).astype(np.intp)
    weights: NDArray[Any] | None = None
    if trace.weights is not None:
        weights = np.take_along_axis(trace.weights, order, axis=2).astype(np.float32).astype(np.float64)
    equal: Weights = np.full((num_layers, top_k), 1.0 / top_k)
    counts = np.zeros((len(sizes), num_layers), np.int64)
    for token, ids in enumerate(experts):
        found = resident[:, rows, ids].sum(axis=2)
        hits += found
        resident[:, rows, ids] = True
        counts += top_k - found
        scorer.pass_count += 1
        scorer.clock += 1.0
        scorer.observe(rows, ids, equal if weights is None else weights[token])
        excess = counts - sizes
        if excess.max() > 0:
            evictions += _evict(resident, np.maximum(excess, 0), scorer.scores())
            np.minimum(counts, sizes, out=counts)
        if on_progress is not None and token % 512 == 0:
            on_progress(token)
    total = trace.num_tokens * top_k
    layer_bytes = np.array([expert_bytes[layer_idx] for layer_idx in trace.layers], np.int64)
    return [
        OffloadStats(
            hits=int(hits[i].sum()),
            misses=int((total - hits[i]).sum()),
            demand_bytes=int(((total - hits[i]) * layer_bytes).sum()),
            evictions=int(evictions[i]),
        )
        for i in range(len(sizes))
    ]


def _evict(resident: NDArray[np.bool_], excess: NDArray[np.int64], scores: FloatArray) -> NDArray[np.int64]:
    """Clear the ``excess`` (S, L) residents of the lowest scores of each cache; return (S,) how many."""
    most = int(excess.max())
    masked = np.where(resident, scores, np.inf)  # (S, L, E)
    if most * 4 < masked.shape[2]:
        for round_ in range(most):  # the first of equals: ties go to the smaller id
            caches = np.nonzero(excess > round_)
            lowest = masked[caches].argmin(axis=1)
            masked[(*caches, lowest)] = np.inf
            resident[(*caches, lowest)] = False
    else:
        order = np.argsort(masked, axis=2, kind="stable")
        leaves = np.arange(masked.shape[2]) < excess[:, :, None]
        gone = np.zeros_like(resident)
        np.put_along_axis(gone, order, leaves, axis=2)
        resident &= ~gone
    total: NDArray[np.int64] = excess.sum(axis=1)
    return total


def next_uses(trace: RoutingTrace) -> NDArray[np.float64]:
    """Return for each token's sorted ids (T, L, K) the token that uses the same expert next, or NEVER."""
    experts = np.sort(trace.experts, axis=2).astype(np.intp)
    following = np.full((len(trace.layers), trace.num_experts), NEVER)
    rows = np.arange(len(trace.layers))[:, None]
    result = np.empty(experts.shape)
    for token in range(len(experts) - 1, -1, -1):
        result[token] = following[rows, experts[token]]
        following[rows, experts[token]] = token
    return result


class _LruScores(TablePolicy):
    """LruPolicy's order: experts of one event are equally recent."""

    name = "lru"
    fields: ClassVar[dict[str, float]] = {"last_use": -1.0}
    last_use: FloatArray

    def observe(self, row: Any, expert_ids: Any, weights: Weights) -> None:
        self.last_use[row, expert_ids] = self.pass_count

    def scores(self) -> FloatArray:
        return self.last_use


class _EwmaScores(TablePolicy):
    """EwmaPolicy's formula, with every score decayed at every event."""

    name = "ewma"
    fields: ClassVar[dict[str, float]] = {"score": 0.0}
    score: FloatArray

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def observe(self, row: Any, expert_ids: Any, weights: Weights) -> None:
        self.score *= 1.0 - self.alpha
        self.score[row, expert_ids] += self.alpha

    def scores(self) -> FloatArray:
        return self.score
