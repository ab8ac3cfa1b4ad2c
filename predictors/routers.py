"""Ask a router what it would choose on some input: ranking scores, without the cost of its forward.

transformers' routers differ in what they do with their logits (softmax, sigmoid, a bias that only
ranks, groups), and a prediction needs the ranking only. Most rank by logits, or by sigmoid plus bias:
one matmul. A router that ranks otherwise is found by trying it, and then asked whole.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

PROBES = 16  # random inputs on which the quick way must choose as the router does
FAR = np.float32(1e3)  # below all scores, where a router chooses every expert
TINY = np.float32(1e-9)
TIE = 0.02  # of a standard deviation
WIDENED_ELEMENTS = 1 << 16  # torch takes longer for a bfloat16 product than to widen so small a matrix


class RouterScores:
    """Scores (T, E) of which each row's ``top_k`` largest are what ``router`` would choose.

    Args:
        router: transformers' router: (T, H) -> (logits, weights (T, K), expert ids (T, K)). Its
            weights are used in place, never copied, and its hooks are not called.
    """

    def __init__(self, router: nn.Module) -> None:
        self._router: Any = router
        self._weight: Tensor = router.get_parameter("weight").detach()
        bias: Tensor | None = getattr(router, "bias", None)
        self._bias = None if bias is None else bias.detach()
        self._ranking_bias: Tensor | None = getattr(router, "e_score_correction_bias", None)
        self.num_experts, self.hidden_size = self._weight.shape
        self.top_k = self._probe()

    def __call__(self, router_input: Tensor) -> NDArray[np.float32]:
        """Return (T, E) float32 scores for (T, H)."""
        if self.is_quick:
            return self._quick(router_input.detach())
        with torch.no_grad():
            return self._whole(router_input.detach())

    @property
    def linear_weight(self) -> Tensor | None:
        """The matrix (E, H) whose product with the input, plus a constant, are the scores; None: no such."""
        plain = self.is_quick and self._ranking_bias is None
        return self._weight if plain else None

    @property
    def linear_bias(self) -> Tensor | None:
        """The constant (E,) beside ``linear_weight``, where there is one."""
        return self._bias

    def _probe(self) -> int:
        """Set ``is_quick`` by comparing both ways on random inputs; return the router's top_k.

        A choice that the quick scores rank among the first top_k is the same, ties of narrow types apart.
        """
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(PROBES, self.hidden_size, generator=generator).to(self._weight.dtype)
        with torch.no_grad():
            chosen: NDArray[np.int64] = self._router.forward(probes)[2].numpy()
        top_k, scores = int(chosen.shape[1]), self._quick(probes)
        lowest = np.take_along_axis(scores, chosen, axis=1).min(axis=1)
        wanted = np.partition(scores, -top_k, axis=1)[:, -top_k]
        self.is_quick = bool((lowest >= wanted - TIE * scores.std(axis=1)).all())
        return top_k

    def _quick(self, router_input: Tensor) -> NDArray[np.float32]:
        weight, bias = self._weight, self._bias
        if len(router_input) == 1 and weight.numel() <= WIDENED_ELEMENTS:
            logits = functional.linear(
                router_input.float(), weight.float(), None if bias is None else bias.float()
            )
        else:
            logits = functional.linear(router_input.to(weight.dtype), weight, bias).float()
        if self._ranking_bias is not None:
            logits = logits.sigmoid() + self._ranking_bias.float()
        scores: NDArray[np.float32] = logits.numpy()
        return scores

    def _whole(self, router_input: Tensor) -> NDArray[np.float32]:
        """Let the router choose; its choice ranks above, the others keep the order of their logits."""
        logits, _, expert_ids = self._router.forward(router_input.to(self._weight.dtype))
        scores: NDArray[np.float32] = logits.float().numpy().copy()
        middle = threshold(scores, expert_ids.shape[1])
        chosen = np.zeros(scores.shape, bool)
        np.put_along_axis(chosen, expert_ids.numpy(), True, axis=1)
        step = 1e-3 * (1e-6 + scores.std(axis=1, keepdims=True))
        lifted: NDArray[np.float32] = np.where(
            chosen, np.maximum(scores, middle + step), np.minimum(scores, middle - step)
        )
        return lifted


def threshold(scores: NDArray[np.float32], top_k: int) -> NDArray[np.float32]:
    """Return (T, 1): halfway between the last score that is chosen and the first that is not."""
    first_chosen = scores.shape[1] - top_k
    if first_chosen == 0:
        lowest: NDArray[np.float32] = scores.min(axis=1, keepdims=True) - FAR
        return lowest
    parted = np.partition(scores, (first_chosen - 1, first_chosen), axis=1)
    middle: NDArray[np.float32] = parted[:, first_chosen - 1 : first_chosen + 1].mean(axis=1, keepdims=True)
    return middle


class Curve(NamedTuple):
    """From a score's distance to the choice's threshold, in standard deviations, to log odds."""

    slope: float
    offset: float


DEFAULT_CURVE = Curve(4.0, 0.0)  # where nothing was fitted


def distances(scores: NDArray[np.float32], top_k: int) -> NDArray[np.float32]:
    """Return (T, E): how far above its token's threshold a score is, in the token's standard deviations."""
    if len(scores) == 1:
        return _distances_of_one(scores[0], top_k)
    spread = scores.std(axis=1, keepdims=True) + TINY
    far: NDArray[np.float32] = (scores - threshold(scores, top_k)) / spread
    return far


def _distances_of_one(row: NDArray[np.float32], top_k: int) -> NDArray[np.float32]:
    """Return (1, E); the same in a quarter of the time, since decoding asks for one token at a time."""
    num_experts = len(row)
    first_chosen = num_experts - top_k
    if first_chosen == 0:
        middle = row.min() - FAR
    else:
        parted = np.partition(row, (first_chosen - 1, first_chosen))
        middle = (parted[first_chosen - 1] + parted[first_chosen]) * np.float32(0.5)
    centred = row - np.add.reduce(row) / np.float32(num_experts)
    spread = math.sqrt(float(centred.dot(centred)) / num_experts) + TINY
    far: NDArray[np.float32] = ((row - middle) * np.float32(1.0 / spread))[None]
    return far


def probabilities(
    scores: NDArray[np.float32], top_k: int, curve: Curve = DEFAULT_CURVE
) -> NDArray[np.float32]:
    """Turn (T, E) ranking scores into (T, E) probabilities of being chosen; the ranking is kept."""
    return logistic(np.float32(curve.slope) * distances(scores, top_k) + np.float32(curve.offset))


def logistic(log_odds: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return probabilities; tanh neither overflows nor needs to be clipped."""
    half = np.float32(0.5)
    chances: NDArray[np.float32] = half * np.tanh(half * log_odds) + half
    return chances
