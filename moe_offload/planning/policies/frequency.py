"""Policies that count uses: LFU, LFRU, LCP, llama.cpp's class LRU, frozen popularity, and MRS.

A layer's clock counts its events: at decode, tokens. Counts are kept after an eviction.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moe_offload.planning.policies.table import FloatArray, Ids, Rows, TablePolicy, Weights


class LfuPolicy(TablePolicy):
    """Least frequently used: the fewest uses so far."""

    name = "lfu"
    fields: ClassVar[dict[str, float]] = {"uses": 0.0}
    uses: FloatArray

    def observe(self, row: Rows, expert_ids: Ids, weights: Weights) -> None:
        self.uses[row, expert_ids] += 1.0

    def scores(self) -> FloatArray:
        return self.uses


class LfruPolicy(TablePolicy):
    """Least frequent and recent: uses / (clock - last use + 1) (Zhang, arXiv 2608.07911)."""

    name = "lfru"
    fields: ClassVar[dict[str, float]] = {"uses": 0.0, "last_use": 0.0}
    uses: FloatArray
    last_use: FloatArray

    def observe(self, row: Rows, expert_ids: Ids, weights: Weights) -> None:
        self.uses[row, expert_ids] += 1.0
        self.last_use[row, expert_ids] = self.clock[row, 0]

    def scores(self) -> FloatArray:
        return self.uses / (self.clock - self.last_use + 1.0)


class LcpPolicy(LfruPolicy):
    """Least cache priority: mu * rho ** (nu / omega), mu uses and nu tokens since the last one.

    rho = 0.25, omega = 128 (MoEpic, arXiv 2509.08342).
    """

    name = "lcp"
    rho, omega_tokens = 0.25, 128.0

    def scores(self) -> FloatArray:
        return self.uses * self.rho ** ((self.clock - self.last_use) / self.omega_tokens)


class ClassLruPolicy(TablePolicy):
    """llama.cpp's class LRU (b12170): one LRU list per frequency class, the victim among their heads.

    CRF counts uses, halved every 128 tokens; class = floor(log2 CRF) within 0..7; the head of the largest
    age / 2 ** class leaves. A list's head has its list's largest age, so this is the largest over all.
    """

    name = "class_lru"
    half_life_tokens, num_classes = 128.0, 8
    fields: ClassVar[dict[str, float]] = {"crf": 0.0, "last_use": 0.0}
    crf: FloatArray  # as of last_use
    last_use: FloatArray

    def observe(self, row: Rows, expert_ids: Ids, weights: Weights) -> None:
        now = self.clock[row, 0]
        age = now - self.last_use[row, expert_ids]
        self.crf[row, expert_ids] = self.crf[row, expert_ids] * 0.5 ** (age / self.half_life_tokens) + 1.0
        self.last_use[row, expert_ids] = now

    def scores(self) -> FloatArray:
        age = self.clock - self.last_use
        crf = np.maximum(self.crf * 0.5 ** (age / self.half_life_tokens), 1.0)
        classes = np.minimum(np.floor(np.log2(crf)), self.num_classes - 1)
        return -age / 2.0**classes


class StaticPolicy(LfuPolicy):
    """Static popularity (Fiddler's placement): uses over a layer's first 256 tokens, then frozen."""

    name = "static"
    calibration_tokens = 256

    def observe(self, row: Rows, expert_ids: Ids, weights: Weights) -> None:
        self.uses[row, expert_ids] += self.clock[row, 0] <= self.calibration_tokens


class MrsPolicy(TablePolicy):
    """Minus recent score (HybriMoE, arXiv 2504.05897): S <- alpha * TopP(s) + (1 - alpha) * S.

    The paper lets the 2K largest router scores of an event count; the K chosen ones are what every trace
    and every runtime has, so TopP keeps those. alpha = 0.25 (the released code has 0.5, a port 0.75).
    """

    name = "mrs"
    alpha = 0.25
    fields: ClassVar[dict[str, float]] = {"score": 0.0}
    score: FloatArray

    def observe(self, row: Rows, expert_ids: Ids, weights: Weights) -> None:
        self.score[row] *= 1.0 - self.alpha  # a layer that is not observed does not decay
        self.score[row, expert_ids] += self.alpha * np.asarray(weights)

    def scores(self) -> FloatArray:
        return self.score
