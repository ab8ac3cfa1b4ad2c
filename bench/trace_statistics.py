"""How cacheable is a routing trace, whatever the policy? SRP and SCH of arXiv 2505.16056.

SRP (segment routing best performance): the best F1 with which one router per segment of m tokens can
stand in for the tokens' own. SCH (segment cache hit rate): hits of a cache that knows how often every
expert is used in the next m tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from moe_offload.planning.policies.table import FloatArray, TablePolicy, Weights
from moe_offload.replay_layers import replay_layers
from moe_offload.trace import RoutingTrace


@dataclass(frozen=True)
class SegmentRouting:
    """Result for windows of ``window_tokens``: all experts of all layers as one group.

    Attributes:
        srp: max over alpha of F1 = 2 * sum R f / sum (m R + f), with R = [f >= alpha], f the uses of an
            expert in a window of m tokens; all overlapping windows inside the sequences count.
        alpha: where it is reached.
        rho: experts that the best segment router activates, over top_k.
    """

    window_tokens: int
    srp: float
    alpha: int
    rho: float


def segment_routing(trace: RoutingTrace, window_tokens: int) -> SegmentRouting | None:
    """Return the trace's group SRP; None when no sequence is as long as the window."""
    histogram = np.zeros(window_tokens + 1, np.int64)  # windows by uses of an expert in them
    num_windows = 0
    for experts in sequences(trace):
        used = np.zeros((len(experts) + 1, len(trace.layers), trace.num_experts), np.int32)
        np.put_along_axis(used[1:], experts.astype(np.intp), 1, axis=2)
        total = used.cumsum(axis=0)
        uses = total[window_tokens:] - total[:-window_tokens] if len(experts) >= window_tokens else total[:0]
        histogram += np.bincount(uses.reshape(-1), minlength=window_tokens + 1)
        num_windows += len(uses)
    if not num_windows:
        return None
    f = np.arange(window_tokens + 1)
    activated = histogram[::-1].cumsum()[::-1]  # by alpha: pairs with f >= alpha
    covered = (histogram * f)[::-1].cumsum()[::-1]
    f1 = 2.0 * covered / (window_tokens * activated + (histogram * f).sum())
    alpha = int(f1.argmax())
    slots = num_windows * len(trace.layers) * trace.top_k
    return SegmentRouting(window_tokens, float(f1[alpha]), alpha, float(activated[alpha] / slots))


def segment_cache_hit_rates(
    trace: RoutingTrace, window_tokens: int, residents_per_layer: Sequence[int]
) -> list[float]:
    """Return the SCH for caches of ``residents_per_layer`` experts a layer.

    The first touch of an expert is a miss here; the paper's code counts it as a hit while the cache has
    empty slots, which only matters for short traces.
    """
    scorer = _NextUses(trace, window_tokens)
    stats = replay_layers(trace, scorer, residents_per_layer, dict.fromkeys(trace.layers, 1))
    return [result.hit_rate for result in stats]


def sequences(trace: RoutingTrace) -> list[Any]:
    """Return the experts (T_s, L, K) of each sequence."""
    return np.split(trace.experts, np.cumsum(trace.seq_len)[:-1])


class _NextUses(TablePolicy):
    """Evict the fewest uses in the next m tokens of the sequence; of equals the least recently used."""

    name = "segment_cache"
    fields: ClassVar[dict[str, float]] = {"uses": 0.0, "last_use": -1.0}
    uses: FloatArray
    last_use: FloatArray

    def __init__(self, trace: RoutingTrace, window_tokens: int) -> None:
        super().__init__()
        self._experts, self._window = trace.experts.astype(np.intp), window_tokens
        self._ends = np.repeat(np.cumsum(trace.seq_len), trace.seq_len)
        self._token = 0
        for layer_idx in trace.layers:
            self.reach(layer_idx, trace.num_experts - 1)

    def observe(self, row: Any, expert_ids: Any, weights: Weights) -> None:
        token, end = self._token, int(self._ends[self._token])
        if token == 0 or self._ends[token - 1] != end:  # a sequence begins: nothing of the last one counts
            self.uses[:] = 0.0
            for coming in range(token, min(token + self._window, end)):
                self.uses[row, self._experts[coming]] += 1.0
        self.uses[row, self._experts[token]] -= 1.0
        if token + self._window < end:
            self.uses[row, self._experts[token + self._window]] += 1.0
        self.last_use[row, expert_ids] = token
        self._token += 1

    def scores(self) -> FloatArray:
        result: FloatArray = self.uses * 2.0 * len(self._experts) + self.last_use
        return result
