"""Closed forms: ridge regression towards a prior, its low-rank version, and the curve to probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import from_numpy

from moe_offload.predictors.history import Float32Array
from moe_offload.predictors.routers import Curve, distances, logistic

NEWTON_STEPS = 12
CURVE_POINTS = 400_000  # are enough for two parameters


def ridge(
    features: Float32Array, targets: Float32Array, strength: float, prior: Float32Array | None = None
) -> Float32Array:
    """Return B (F, N) that minimises |targets - features B|² + strength · n · s² · |B - prior|².

    Args:
        features: (n, F); s² is their mean square, so that ``strength`` has no unit.
        targets: (n, N).
        prior: (F, N); None is 0.
    """
    x = from_numpy(np.ascontiguousarray(features))
    y = from_numpy(np.ascontiguousarray(targets))
    if prior is not None:
        y = y - x @ from_numpy(prior)
    gram = x.T @ x
    gram.diagonal().add_(strength * float(gram.diagonal().mean()) + 1e-6)
    table = torch.linalg.solve(gram, x.T @ y)
    if prior is not None:
        table += from_numpy(prior)
    result: Float32Array = table.numpy()
    return result


class SharedRegression:
    """Ridge regressions on the same tokens that share most of their features: these are multiplied once.

    Args:
        shared: (n, S) features of all of them.
    """

    def __init__(self, shared: Float32Array) -> None:
        self._shared = from_numpy(np.ascontiguousarray(shared))
        self._gram = self._shared.T @ self._shared

    def tables(
        self, more: Float32Array, targets: Float32Array, strengths: Sequence[float]
    ) -> list[Float32Array]:
        """Return what ``ridge`` finds on the features [shared, more], for each strength."""
        x, y = from_numpy(np.ascontiguousarray(more)), from_numpy(np.ascontiguousarray(targets))
        across = self._shared.T @ x
        gram = torch.cat([torch.cat([self._gram, across], 1), torch.cat([across.T, x.T @ x], 1)])
        moment = torch.cat([self._shared.T @ y, x.T @ y])
        mean = float(gram.diagonal().mean())
        tables = []
        for strength in strengths:
            held = gram.clone()
            held.diagonal().add_(strength * mean + 1e-6)
            tables.append(torch.linalg.solve(held, moment).contiguous().numpy())
        return tables


def low_rank(
    features: Float32Array, targets: Float32Array, strength: float, rank: int
) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Return U (F, r), V (r, N), b (N,): the ridge solution on the main directions of what it predicts."""
    means, offsets = features.mean(axis=0), targets.mean(axis=0)
    table = ridge(features - means, targets - offsets, strength)
    predicted = from_numpy((features - means) @ table)
    _, directions = torch.linalg.eigh(predicted.T @ predicted)  # ascending
    up = np.ascontiguousarray(directions[:, -min(rank, table.shape[1]) :].T.numpy())
    down = table @ up.T
    return down, up, offsets - (means @ down) @ up


def fit_curve(scores: Float32Array, used: Float32Array, top_k: int) -> Curve:
    """Return the logistic curve of use on a score's distance from its token's threshold (Newton).

    Args:
        scores: (T, E).
        used: (T, E), 1 where the router chose the expert.
    """
    tokens = max(1, CURVE_POINTS // scores.shape[1])
    x = distances(scores[:tokens], top_k).reshape(-1).astype(np.float64)
    y = used[:tokens].reshape(-1).astype(np.float64)
    design = np.stack([x, np.ones_like(x)], axis=1)
    parameters = np.array([1.0, 0.0])
    for _ in range(NEWTON_STEPS):
        chances = logistic((design @ parameters).astype(np.float32)).astype(np.float64)
        slack = 1e-3 * parameters - design.T @ (y - chances)  # keeps a separable case finite
        curvature = (design * (chances * (1.0 - chances))[:, None]).T @ design + 1e-3 * np.eye(2)
        parameters = parameters - np.clip(np.linalg.solve(curvature, slack), -2.0, 2.0)
    return Curve(max(float(parameters[0]), 0.05), float(parameters[1]))
