"""The replay of replay.py for caches of one layer each, all layers and several sizes at once.

Possible for a policy whose scores do not depend on what is resident: it sees each decode token's experts of
all layers in one call, and all caches evict together (csrc/planning/layer_caches.h). Of those that look at
what is resident, least_stale's arrivals and moe_infinity's stretches are kept for all caches here, and ARC's
lists natively (csrc/planning/arc_replay.h). tests/test_replay.py holds the counters equal to replay.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_offload._native import LayerCaches, arc_replay
from moe_offload.planning.eviction import EvictionPolicy, EwmaPolicy, LruPolicy
from moe_offload.planning.policies.arc import ArcPolicy, FatePolicy
from moe_offload.planning.policies.belady import NEVER, BeladyPolicy
from moe_offload.planning.policies.passes import LeastStalePolicy, MoeInfinityPolicy
from moe_offload.planning.policies.table import FloatArray, TablePolicy, Weights
from moe_offload.stats import OffloadStats
from moe_offload.trace import RoutingTrace

Ids = NDArray[np.intp]


class _Arc:
    """Stands for ARC, whose order is in no table of scores."""


def scorer_of(policy: EvictionPolicy, trace: RoutingTrace) -> TablePolicy | _Arc | None:
    """Return what gives the order of ``policy`` to ``replay_layers``; None if there is nothing."""
    if type(policy) is LruPolicy:
        scorer: TablePolicy = _LruScores()
    elif type(policy) is EwmaPolicy:
        scorer = _EwmaScores(policy.alpha)
    elif type(policy) in (ArcPolicy, FatePolicy):
        return _Arc()  # in a pool of one layer the two are the same
    elif type(policy) is LeastStalePolicy:
        scorer = _LeastStaleScores()
    elif type(policy) is MoeInfinityPolicy:
        scorer = _MoeInfinityScores(policy)
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
    scorer: TablePolicy | _Arc,
    residents_per_layer: Sequence[int],
    expert_bytes: Mapping[int, int],
) -> list[OffloadStats]:
    """Run a decode-only trace through caches of ``residents_per_layer`` experts; one result per size.

    Args:
        trace: every token a step of its own (RoutingTrace.decode_only).
        scorer: from ``scorer_of``, new.
    """
    assert (trace.step_tokens == 1).all(), "replay_layers takes single-token steps"
    sizes = np.minimum(np.asarray(residents_per_layer), trace.num_experts)
    order = np.argsort(trace.experts, axis=2, kind="stable")
    experts = np.take_along_axis(trace.experts, order, axis=2)  # (T, L, K) ascending
    if isinstance(scorer, _Arc):
        hits, evictions = arc_replay(experts.astype(np.uint16), trace.num_experts, sizes.tolist())
        return _stats(trace, hits, evictions, expert_bytes)
    num_layers, top_k = len(trace.layers), trace.top_k
    weights: NDArray[Any] | None = None
    if trace.weights is not None:
        weights = np.take_along_axis(trace.weights, order, axis=2).astype(np.float32).astype(np.float64)
    equal: Weights = np.full((num_layers, top_k), 1.0 / top_k)
    rows = np.arange(num_layers)[:, None]
    caches = LayerCaches(num_layers, trace.num_experts, sizes.tolist())
    come = getattr(scorer, "come", None)
    for token, ids in enumerate(experts.astype(np.int64)):
        is_over = caches.serve(ids)
        scorer.pass_count += 1
        scorer.clock += 1.0
        if come is not None:
            come(rows, ids, caches.was_new())
        scorer.observe(rows, ids, equal if weights is None else weights[token])
        if is_over:
            caches.evict(scorer.scores())
    return _stats(trace, caches.hits(), caches.evictions(), expert_bytes)


def _stats(
    trace: RoutingTrace, hits: NDArray[np.int64], evictions: Sequence[int], expert_bytes: Mapping[int, int]
) -> list[OffloadStats]:
    """(S, L) hits and (S) evictions -> the counters of each size."""
    total = trace.num_tokens * trace.top_k
    layer_bytes = np.array([expert_bytes[layer_idx] for layer_idx in trace.layers], np.int64)
    return [
        OffloadStats(
            hits=int(layer_hits.sum()),
            misses=int((total - layer_hits).sum()),
            demand_bytes=int(((total - layer_hits) * layer_bytes).sum()),
            evictions=int(gone),
        )
        for layer_hits, gone in zip(hits, evictions, strict=True)
    ]


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


class _LeastStaleScores(TablePolicy):
    """LeastStalePolicy's order in caches of one layer: arrivals differ from size to size, passes do not."""

    name = "least_stale"

    def __init__(self) -> None:
        super().__init__()
        self._arrival: FloatArray = np.zeros((0, 0, 0))  # (S, L, E): when an expert came, in order

    def come(self, rows: Ids, ids: Ids, is_new: NDArray[np.bool_]) -> None:
        """Note who came with this token: (L, 1), (L, K), (S, L, K)."""
        if not self._arrival.size:
            self._arrival = np.zeros((len(is_new), *self._resident.shape))
        num_experts = self._resident.shape[1]
        arrived = self.pass_count * num_experts + ids  # a token's come in ascending order
        self._arrival[:, rows, ids] = np.where(is_new, arrived, self._arrival[:, rows, ids])

    def observe(self, row: Any, expert_ids: Any, weights: Weights) -> None:
        self._current = (row, expert_ids)

    def scores(self) -> FloatArray:
        scores = self._arrival.copy()
        row, expert_ids = self._current
        scores[:, row, expert_ids] += (self.pass_count + 1) * self._resident.shape[1]  # not stale: last
        return scores


class _MoeInfinityScores(TablePolicy):
    """MoeInfinityPolicy in pools of one layer: every layer matches its own stretches."""

    name = "moe_infinity"
    fields: ClassVar[dict[str, float]] = {"counts": 0.0, "predicted": 0.0}
    counts: FloatArray
    predicted: FloatArray

    def __init__(self, policy: MoeInfinityPolicy) -> None:
        super().__init__()
        self._policy = policy
        self._collection: list[FloatArray] = []
        self._stretch_start = self._matched_at = 1

    def observe(self, row: Any, expert_ids: Any, weights: Weights) -> None:
        if self.pass_count - self._stretch_start >= self._policy.stretch_passes:
            self._collection = [*self._collection, self.counts.copy()][-self._policy.collection_size :]
            self.counts[:] = 0.0
            self._stretch_start = self.pass_count
        if self.pass_count - self._matched_at >= self._policy.match_passes:
            self._matched_at = self.pass_count
            self._match()
        self.counts[row, expert_ids] += 1.0

    def _match(self) -> None:
        if not self._collection or not self.counts.any():
            return
        stack = np.stack(self._collection)  # (stretches, L, E)
        lengths = np.linalg.norm(stack, axis=2) * np.linalg.norm(self.counts, axis=1)
        cosines = (stack * self.counts).sum(axis=2) / np.maximum(lengths, 1e-12)
        self.predicted[:] = stack[cosines.argmax(axis=0), np.arange(stack.shape[1])]

    def scores(self) -> FloatArray:
        share = self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1.0)
        predicted = self.predicted / np.maximum(self.predicted.sum(axis=1, keepdims=True), 1.0)
        priorities: FloatArray = (predicted + 1e-6) * (share + 1e-6)
        return priorities
