"""Fit every predictor that can be fitted to a recorded text: counts, ridge regressions, one small network.

All of it looks at a forward pass over text: what the routers saw, and what they chose. The last sequences
are kept from the regressions; on them the curves from scores to probabilities are fitted, so that a forecast
says how often it is right on text that was not fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy, nn

from moe_offload.errors import ConfigError
from moe_offload.predictors.fit_file import Pair, PredictorFit
from moe_offload.predictors.fit_hybrid import HybridRegression, linear_table
from moe_offload.predictors.fit_network import HIDDEN_UNITS, fit_network
from moe_offload.predictors.history import Float32Array, LayerOrder, past_of
from moe_offload.predictors.regression import fit_curve, low_rank, ridge
from moe_offload.predictors.residual_gate import norm_weight
from moe_offload.predictors.routers import Curve, RouterScores

RIDGES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
CALIBRATION_SHARE = 0.12  # of the sequences
RANK = 64
LEAST_TOKENS = 1000

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Recording:
    """What routers saw and chose on T tokens in L MoE layers.

    Attributes:
        layers: decoder indices.
        router_inputs: float16 (T, L, H).
        experts: (T, L, K).
        weights: (T, L, K).
        seq_len: (S,) tokens of each sequence.
        token_ids: (T,).
        embeddings: float16 (T, H), of the tokens; None where the model gives none.
        residual_rms: by layer, mean root mean square of the residual before the router's norm.
    """

    layers: tuple[int, ...]
    router_inputs: NDArray[np.float16]
    experts: NDArray[np.int64]
    weights: Float32Array
    seq_len: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    embeddings: NDArray[np.float16] | None
    residual_rms: Mapping[int, float]

    @property
    def num_tokens(self) -> int:
        return len(self.experts)


class Fitter:
    """Fits group after group into one PredictorFit.

    Args:
        recording: at least LEAST_TOKENS tokens of several sequences.
        routers: by layer.
        norms: by layer, the norms before the routers; layers whose norm does not divide out are left away.
        depth: how many layers ahead.

    Raises:
        ConfigError: too few tokens.
    """

    def __init__(
        self,
        recording: Recording,
        routers: Mapping[int, nn.Module],
        norms: Mapping[int, nn.Module],
        *,
        depth: int,
        checkpoint: str = "",
    ) -> None:
        if recording.num_tokens < LEAST_TOKENS or len(recording.seq_len) < 4:
            raise ConfigError(
                f"a fit on {recording.num_tokens} tokens of {len(recording.seq_len)} texts says nothing; "
                f"give at least {LEAST_TOKENS} tokens of 4 texts"
            )
        self.recording, self.order = recording, LayerOrder(recording.layers, depth)
        self.scores = {layer_idx: RouterScores(router) for layer_idx, router in routers.items()}
        self._norms = norms
        first = self.scores[self.order.layers[0]]
        self.num_experts, self.hidden_size, self.top_k = first.num_experts, first.hidden_size, first.top_k
        held_out = max(1, round(CALIBRATION_SHARE * len(recording.seq_len)))
        self._split = int(recording.seq_len[:-held_out].sum())  # tokens before are fitted
        self._starts = np.concatenate([[0], np.cumsum(recording.seq_len)[:-1]])
        self._targets = {i: self._scores_on(i, self._inputs(i)) for i in self.order.layers}
        self.fit = PredictorFit(
            checkpoint, recording.layers, self.num_experts, self.top_k, self.hidden_size, depth
        )

    @property
    def pairs(self) -> list[Pair]:
        """Every (layer, later layer) that a forecast may reach."""
        return [(i, later) for i in self.order.layers for later in self.order.after(i)]

    def counts(self) -> None:
        """Popularity, how often a token's expert stays, and transitions."""
        num_tokens, starts = self.recording.num_tokens, self._starts
        used = {i: self._one_hot(i) for i in self.order.layers}
        follows = np.setdiff1d(np.arange(1, num_tokens), starts)
        for layer_idx, one_hot in used.items():
            self._keep("popularity", (layer_idx,), one_hot.mean(axis=0))
            stayed = (one_hot[follows] * one_hot[follows - 1]).sum() / max(1, len(follows)) / self.top_k
            self._keep("stay", (layer_idx,), np.array([stayed]))
        for layer_idx, later in self.pairs:
            popularity = used[later].mean(axis=0)
            together = used[layer_idx].T @ used[later] + 5.0 * popularity  # 5 tokens of prior
            uses = used[layer_idx].sum(axis=0)[:, None] + 5.0
            self._keep("transition", (layer_idx, later), together / uses)

    def gates(self) -> None:
        """Curves of plain gate reuse, the residual gate and the mean-output gate with its tables."""
        for layer_idx, later in self.pairs:
            inputs = self._inputs(layer_idx)
            self._keep_curve("cross_layer_gate", layer_idx, later, self._scores_on(later, inputs))
        try:
            norms = {i: norm_weight(self._norms[i], i).numpy() for i in self.order.layers}
        except (ConfigError, KeyError):
            return
        for layer_idx, later in self.pairs:
            inputs = self._inputs(layer_idx).astype(np.float32) * (norms[later] / norms[layer_idx])
            scores = self._scores_on(later, inputs)
            self._keep_curve("residual_gate", layer_idx, later, scores)
            seen = np.concatenate([self._weighted(layer_idx), np.ones((len(scores), 1), np.float32)], axis=1)
            rest = self._targets[later] - scores
            table = ridge(seen[: self._split], rest[: self._split], 1e-3)
            self._keep("mean_scores", (layer_idx, later), table)
            self._keep_curve("mean_output_gate", layer_idx, later, scores + seen @ table)
        for layer_idx, rms in self.recording.residual_rms.items():
            self._keep("residual_rms", (layer_idx,), np.array([rms]))

    def low_rank(self, on_progress: Progress | None = None) -> None:
        """The map from one router's input to a later one's, of rank RANK."""
        for done, (layer_idx, later) in enumerate(self.pairs):
            inputs = self._inputs(layer_idx).astype(np.float32)
            change = self._inputs(later).astype(np.float32) - inputs
            down, up, shift = low_rank(inputs[: self._split], change[: self._split], 1e-3, RANK)
            for name, array in (("low_rank.down", down), ("low_rank.up", up), ("low_rank.shift", shift)):
                self._keep(name, (layer_idx, later), array)
            scores = self._scores_on(later, inputs + (inputs @ down) @ up + shift)
            self._keep_curve("low_rank_gate", layer_idx, later, scores)
            if on_progress is not None:
                on_progress(done + 1, len(self.pairs))

    def hybrid(self, on_progress: Progress | None = None) -> None:
        """Ridge regression of later scores on all there is; of the first layers' on the token."""
        strength = self._best_ridge()
        self.fit.report["ridge"] = strength
        for done, layer_idx in enumerate(self.order.layers[:-1]):
            self._fit_hybrid(layer_idx, strength)
            if on_progress is not None:
                on_progress(done + 1, len(self.order.layers) - 1)
        if self.recording.embeddings is None:
            return
        ones = np.ones((self.recording.num_tokens, 1), np.float32)
        embedded = np.concatenate([self.recording.embeddings.astype(np.float32), ones], axis=1)
        for later in self.order.layers[: self.order.depth]:
            features = np.concatenate([embedded, *self._past(later)], axis=1)
            table = ridge(features[: self._split], self._targets[later][: self._split], strength)
            self._keep("first", (later,), table)
            self._keep_curve("first", later, later, features @ table)

    def _fit_hybrid(self, layer_idx: int, strength: float) -> None:
        regression = self._hybrid_regression(layer_idx)
        self._keep("directions", (layer_idx,), regression.directions)
        for later in self.order.after(layer_idx):
            past = np.concatenate(self._past(later), axis=1)
            (found,) = regression.fits(past, self._targets[later], self._router(later), (strength,))
            self._keep("hybrid", (layer_idx, later), found.table)
            self._keep("answers", (layer_idx, later), found.answers)
            self._keep_curve("hybrid", layer_idx, later, regression.scores(found, past))

    def _hybrid_regression(self, layer_idx: int) -> HybridRegression:
        return HybridRegression(self._seen(layer_idx), self.hidden_size, self.num_experts, self._split)

    def network(self, on_progress: Progress | None = None, *, hidden_units: int = HIDDEN_UNITS) -> None:
        """One network a layer on the hybrid's features, starting from the hybrid."""
        for done, layer_idx in enumerate(self.order.layers[:-1]):
            later_layers = self.order.after(layer_idx)
            features = self._joint_features(layer_idx)
            linear = self._joint_table(layer_idx, features.shape[1])
            targets = [self._targets[later][: self._split] for later in later_layers]
            graph, run = fit_network(
                features[: self._split], linear, targets, seed=layer_idx, hidden_units=hidden_units
            )
            self._keep("network", (layer_idx,), np.frombuffer(graph, np.uint8))
            held_out = run(features[self._split :])
            for position, later in enumerate(later_layers):
                part = held_out[:, position * self.num_experts : (position + 1) * self.num_experts]
                self._keep_curve("learned", layer_idx, later, part, whole=False)
            if on_progress is not None:
                on_progress(done + 1, len(self.order.layers) - 1)

    # Features and targets.

    def features(self, layer_idx: int, later: int) -> Float32Array:
        """Return (T, H + 3 E + 1), as ``fitted.Features`` describes them."""
        return np.concatenate([self._seen(layer_idx), *self._past(later)], axis=1)

    def _joint_features(self, layer_idx: int) -> Float32Array:
        pasts = [part for later in self.order.after(layer_idx) for part in self._past(later)]
        return np.concatenate([self._seen(layer_idx), *pasts], axis=1)

    def _joint_table(self, layer_idx: int, num_features: int) -> Float32Array:
        """Return the pairs' tables side by side, for the joint features."""
        num_experts, later_layers = self.num_experts, self.order.after(layer_idx)
        seen = self.hidden_size + num_experts + 1
        joint = np.zeros((num_features, len(later_layers) * num_experts), np.float32)
        for position, later in enumerate(later_layers):
            table = linear_table(
                self.features(layer_idx, later)[: self._split],
                self._targets[later][: self._split],
                self._router(later),
                float(self.fit.report["ridge"]),
            )
            columns = slice(position * num_experts, (position + 1) * num_experts)
            past = seen + 2 * num_experts * position
            joint[:seen, columns] = table[:seen]
            joint[past : past + 2 * num_experts, columns] = table[seen:]
        return joint

    def _seen(self, layer_idx: int) -> Float32Array:
        inputs = self._inputs(layer_idx).astype(np.float32)
        return np.concatenate(
            [inputs, self._weighted(layer_idx), np.ones((len(inputs), 1), np.float32)], axis=1
        )

    def _past(self, layer_idx: int) -> tuple[Float32Array, Float32Array]:
        past: tuple[Float32Array, Float32Array] = past_of(
            self._one_hot(layer_idx), self._weighted(layer_idx), self._starts
        )
        return past

    def _inputs(self, layer_idx: int) -> NDArray[np.float16]:
        return self.recording.router_inputs[:, self.order.row_of[layer_idx]]

    def _one_hot(self, layer_idx: int) -> Float32Array:
        return self._scattered(layer_idx, np.float32(1.0))

    def _weighted(self, layer_idx: int) -> Float32Array:
        return self._scattered(layer_idx, self.recording.weights[:, self.order.row_of[layer_idx]])

    def _scattered(self, layer_idx: int, values: Float32Array | np.float32) -> Float32Array:
        out = np.zeros((self.recording.num_tokens, self.num_experts), np.float32)
        np.put_along_axis(out, self.recording.experts[:, self.order.row_of[layer_idx]], values, axis=1)
        return out

    def _scores_on(self, later: int, inputs: NDArray[np.float16] | Float32Array) -> Float32Array:
        """Return what a router ranks by on (T, H) inputs, each token's mean taken away."""
        scores = self.scores[later](from_numpy(np.ascontiguousarray(inputs)))
        return scores - scores.mean(axis=1, keepdims=True)

    # Regressions.

    def _best_ridge(self) -> float:
        """Return the strength that errs least on the held-out sequences, over a few pairs."""
        pairs = self.pairs[:: max(1, len(self.pairs) // 3)]
        errors = np.zeros(len(RIDGES))
        for layer_idx, later in pairs:
            regression, past = self._hybrid_regression(layer_idx), np.concatenate(self._past(later), axis=1)
            targets, held_out = self._targets[later], slice(self._split, None)
            for position, found in enumerate(regression.fits(past, targets, self._router(later), RIDGES)):
                wrong = regression.scores(found, past)[held_out] - targets[held_out]
                errors[position] += float((wrong**2).sum(axis=1).mean())
        return RIDGES[int(errors.argmin())]

    def _router(self, later: int) -> Float32Array | None:
        """Return (H, E), plain gate reuse, where the router is a plain matmul."""
        weight: Tensor | None = self.scores[later].linear_weight
        if weight is None:
            return None
        router: Float32Array = weight.detach().float().numpy().T
        return router - router.mean(axis=1, keepdims=True)

    def _keep(self, group: str, key: tuple[int, ...], array: NDArray[np.generic]) -> None:
        kept = array if array.dtype == np.uint8 else array.astype(np.float32)
        self.fit.groups.setdefault(group, {})[key] = kept

    def _keep_curve(
        self, predictor: str, layer_idx: int, later: int, scores: Float32Array, *, whole: bool = True
    ) -> None:
        """Fit the curve on the held-out sequences; ``whole``: ``scores`` are of all tokens."""
        held_out = scores[self._split :] if whole else scores
        curve: Curve = fit_curve(held_out, self._one_hot(later)[self._split :], self.top_k)
        self._keep(f"curve.{predictor}", (layer_idx, later), np.array(curve))
