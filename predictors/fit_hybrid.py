"""The hybrid's regression: later scores as a linear function of all there is at a layer, and of every expert.

What an expert adds is no linear function of what it is given, but along the few directions in which routers'
inputs mostly lie it is nearly one. So each expert has a matrix from there to the later router's scores, which
counts by the weight that the expert was chosen with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import from_numpy, linalg

from moe_offload.predictors.fitted import answering
from moe_offload.predictors.history import Float32Array
from moe_offload.predictors.regression import SharedRegression, ridge

MOST_DIRECTIONS = 32
MOST_PRODUCTS = 1024  # of choice and directions: what the regression's time grows with


class HybridTables(NamedTuple):
    """What ``fitted.Hybrid`` computes scores of a later layer from.

    Attributes:
        table: (H + 3 E + 1, E), see ``fitted.Features``.
        answers: (E, D, E), see ``fitted.answering``.
    """

    table: Float32Array
    answers: Float32Array


class HybridRegression:
    """Regressions of the later layers' scores on one layer's features.

    Args:
        seen: (T, H + E + 1), what all later layers share.
        num_fitted: tokens, the first ones, that the regressions see.

    Attributes:
        directions: (D, H), orthonormal.
    """

    def __init__(self, seen: Float32Array, hidden_size: int, num_experts: int, num_fitted: int) -> None:
        self._num_seen, self._num_experts, self._num_fitted = seen.shape[1], num_experts, num_fitted
        self._hidden_size = hidden_size
        inputs, choice = seen[:, :hidden_size], seen[:, hidden_size : hidden_size + num_experts]
        count = max(1, min(MOST_DIRECTIONS, hidden_size, MOST_PRODUCTS // num_experts))
        self.directions = principal_directions(inputs[:num_fitted], count)
        self._shared = np.concatenate([seen, answering(inputs @ self.directions.T, choice)], axis=1)
        self._regression = SharedRegression(self._shared[:num_fitted])

    def fits(
        self,
        past: Float32Array,
        targets: Float32Array,
        router: Float32Array | None,
        strengths: Sequence[float],
    ) -> list[HybridTables]:
        """Return the tables for each strength of the ridge.

        Args:
            past: (T, 2 E) of the later layer.
            targets: (T, E), its true scores.
            router: (H, E) that the part for the input is drawn to; None: to 0.
        """
        fitted = slice(0, self._num_fitted)
        rest = targets[fitted]
        if router is not None:
            rest = rest - self._shared[fitted, : self._hidden_size] @ router
        found = []
        for rows in self._regression.tables(past[fitted], rest, strengths):
            seen, answers, later = np.split(rows, [self._num_seen, self._shared.shape[1]])
            if router is not None:
                seen[: self._hidden_size] += router
            shape = (self._num_experts, len(self.directions), self._num_experts)
            found.append(HybridTables(np.concatenate([seen, later]), answers.reshape(shape)))
        return found

    def scores(self, tables: HybridTables, past: Float32Array) -> Float32Array:
        """Return (T, E), of the tokens that were not fitted, too."""
        table, answers = tables
        seen, later = np.split(table, [self._num_seen])
        rows = np.concatenate([seen, answers.reshape(-1, self._num_experts)])
        scores: Float32Array = self._shared @ rows + past @ later
        return scores


def linear_table(
    features: Float32Array, targets: Float32Array, router: Float32Array | None, strength: float
) -> Float32Array:
    """Return (F, E), the ridge regression without a matrix for each expert; ``router`` as above."""
    prior = None
    if router is not None:
        prior = np.zeros((features.shape[1], targets.shape[1]), np.float32)
        prior[: len(router)] = router
    table: Float32Array = ridge(features, targets, strength, prior)
    return table


def principal_directions(inputs: Float32Array, count: int) -> Float32Array:
    """Return (count, H), orthonormal: where inputs are largest, the largest first."""
    x = from_numpy(np.ascontiguousarray(inputs))
    _, directions = linalg.eigh(x.T @ x)  # ascending
    main: Float32Array = np.ascontiguousarray(directions.numpy()[:, ::-1][:, :count].T)
    return main
