"""Policies that look at forward passes and layers: least stale, MoE-Infinity, ExpertFlow's PLEC."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_offload.planning.policies.table import FloatArray, Ids, Rows, TablePolicy, Weights
from moe_offload.storage.expert_format import ExpertKey


class LeastStalePolicy(TablePolicy):
    """Least stale (SpecMD, arXiv 2602.03921): experts that the current pass has not touched are stale.

    Stale ones leave first, in the order they came; then those of the current pass, in that order.
    """

    name = "least_stale"
    scores_know_residents = True
    fields: ClassVar[dict[str, float]] = {"arrival": 0.0, "last_pass": 0.0}
    arrival: FloatArray
    last_pass: FloatArray

    def __init__(self) -> None:
        super().__init__()
        self._arrivals = 0

    def on_insert(self, key: ExpertKey) -> None:
        super().on_insert(key)
        self._arrivals += 1
        self.arrival[self.rows[key.layer_idx], key.expert_id] = self._arrivals

    def observe(self, row: Rows, expert_ids: Ids, weights: Weights) -> None:
        self.last_pass[row, expert_ids] = self.pass_count

    def scores(self) -> FloatArray:
        return np.where(self.last_pass == self.pass_count, self._arrivals + 1.0, 0.0) + self.arrival


class MoeInfinityPolicy(TablePolicy):
    """MoE-Infinity (arXiv 2401.14361): activation counts matched against those of earlier stretches.

    A stretch is 128 passes (the paper: a sequence, which a policy is not told of). Its counts (layers,
    experts) join a collection of at most 32. The one most like the current stretch (mean over layers of
    the cosine) predicts. Lowest leaves: predicted share * share in this stretch * layer term, each
    + 1e-6, the layer term falling from 1 for the layer that comes next to 1 / L for the one just done.
    """

    name = "moe_infinity"
    scores_know_residents = True  # its stretches are counted in passes of the pool
    stretch_passes, collection_size, match_passes = 128, 32, 8
    fields: ClassVar[dict[str, float]] = {"counts": 0.0, "predicted": 0.0}
    counts: FloatArray
    predicted: FloatArray

    def __init__(self) -> None:
        super().__init__()
        self._collection: list[FloatArray] = []
        self._stretch_start = self._matched_at = 1
        self._last_row = 0

    def observe(self, row: Rows, expert_ids: Ids, weights: Weights) -> None:
        if self.pass_count - self._stretch_start >= self.stretch_passes:
            self._collection = [*self._collection, self.counts.copy()][-self.collection_size :]
            self.counts[:] = 0.0
            self._stretch_start = self.pass_count
        if self.pass_count - self._matched_at >= self.match_passes:
            self._matched_at = self.pass_count
            self._match()
        self.counts[row, expert_ids] += 1.0
        self._last_row = int(row)

    def scores(self) -> FloatArray:
        num_layers = len(self.layers)
        ahead = (np.arange(num_layers) - self._last_row - 1) % num_layers
        layer_term = (1.0 - ahead / num_layers)[:, None]
        share = self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1.0)
        predicted = self.predicted / np.maximum(self.predicted.sum(axis=1, keepdims=True), 1.0)
        priorities: FloatArray = (predicted + 1e-6) * (share + 1e-6) * layer_term
        return priorities

    def _match(self) -> None:
        """Predict by the most similar stretch; stretches from before a layer appeared do not count."""
        known = [counts for counts in self._collection if counts.shape == self.counts.shape]
        if not known or not self.counts.any():
            return
        stack = np.stack(known)  # (stretches, layers, experts)
        lengths = np.linalg.norm(stack, axis=2) * np.linalg.norm(self.counts, axis=1)
        cosines = (stack * self.counts).sum(axis=2) / np.maximum(lengths, 1e-12)
        self.predicted[:] = known[int(cosines.mean(axis=1).argmax())]


class PlecPolicy(TablePolicy):
    """ExpertFlow's predictive locality-aware cache (arXiv 2410.17954), its predictor replaced by history.

    The paper predicts routes with a transformer of its own; here an expert's chance after this token is
    the mean of its transition rates from the experts that its layer chose last. Predicted experts (twice
    as many as chosen) stay. Of the others, those of layers above their share leave first, least recently
    used first; a layer's share of the slots is that of the distinct experts it used in its last 64 tokens.
    """

    name = "plec"
    demand_tokens = 64
    fields: ClassVar[dict[str, float]] = {"last_use": -1e9, "chance": 0.0}
    last_use: FloatArray
    chance: FloatArray

    def __init__(self) -> None:
        super().__init__()
        self._transitions: dict[int, FloatArray] = {}  # layer -> (experts, experts) counts
        self._previous: dict[int, list[int]] = {}
        self._all_transitions: FloatArray = np.zeros((0, 0, 0))  # (layers, experts, experts), of a replay
        self._all_previous: NDArray[np.intp] | None = None  # (layers, K)

    def observe(self, row: Rows, expert_ids: Ids, weights: Weights) -> None:
        if isinstance(row, np.ndarray):
            self._observe_layers(np.asarray(expert_ids))
        else:
            self._observe_layer(row, list(expert_ids))

    def _observe_layers(self, expert_ids: NDArray[np.intp]) -> None:
        """``_observe_layer`` of all layers at once; (layers, K)."""
        num_layers, num_experts = self._resident.shape
        if self._all_previous is None:
            self._all_transitions = np.zeros((num_layers, num_experts, num_experts))
        rows = np.arange(num_layers)[:, None]
        if self._all_previous is not None:
            pairs = self._all_previous[:, :, None], expert_ids[:, None, :]
            self._all_transitions[rows[:, :, None], *pairs] += 1.0
        self._all_previous = expert_ids
        self.last_use[rows, expert_ids] = self.clock
        chance = self._all_transitions[rows, expert_ids].sum(axis=1)
        most = min(2 * expert_ids.shape[1], num_experts)
        threshold = np.partition(chance, num_experts - most, axis=1)[:, num_experts - most, None]
        self.chance[:] = np.where(chance >= np.maximum(threshold, 1.0), chance, 0.0)

    def _observe_layer(self, row: int, expert_ids: list[int]) -> None:
        layer, num_experts = self.layers[row], self._resident.shape[1]
        counts = self._transitions.get(layer)
        if counts is None or len(counts) < num_experts:
            wider = np.zeros((num_experts, num_experts))
            if counts is not None:
                wider[: len(counts), : len(counts)] = counts
            counts = self._transitions[layer] = wider
        previous = self._previous.get(layer)
        if previous is not None:
            counts[np.asarray(previous)[:, None], expert_ids] += 1.0
        self._previous[layer] = expert_ids
        self.last_use[row, expert_ids] = self.clock[row, 0]
        chance = counts[expert_ids].sum(axis=0)
        threshold = np.sort(chance)[-min(2 * len(expert_ids), num_experts)]
        self.chance[row] = np.where(chance >= max(threshold, 1.0), chance, 0.0)

    def scores(self) -> FloatArray:
        age = self.clock - self.last_use
        demand = (age < self.demand_tokens).sum(axis=1)
        held = self._resident.sum(axis=1)
        above_share = held * demand.sum() > demand * held.sum()
        recency = -np.minimum(age, 1e8)
        return np.where(self.chance > 0.0, 1e10, 0.0) + recency - np.where(above_share, 1e9, 0.0)[:, None]
