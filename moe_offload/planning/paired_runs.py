"""What real runs that take turns say of settings, and how many of them a time allows.

What is chosen has to beat the plain defaults in runs that take turns with theirs, by more than the noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_offload.planning.tuning import Choice

MARGIN = 0.02  # a gain below this is none
SCREEN_ROUNDS, DUEL_ROUNDS, LEAST_DUEL_ROUNDS = 3, 12, 3
LEAST_RUN_TOKENS = 8
# Student's t, two-sided 99%, by degrees of freedom; the normal's value beyond. Not 95%: a setting stays for
# long, and a host that others share has hours in which neighbouring rounds are slow together.
STUDENT_T = (63.7, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25, 3.17, 3.11, 3.05, 3.01, 2.98, 2.95)
NORMAL_T = 2.58


@dataclass(frozen=True)
class Gain:
    """How many times as fast as the defaults, and the 99% interval of paired runs."""

    speedup: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Faster beyond noise by enough to be worth a setting: all of the interval is."""
        return self.low > 1.0 + MARGIN


def paired_gain(defaults_s: Sequence[float], candidate_s: Sequence[float]) -> Gain:
    """Return the gain of a candidate whose runs took turns with the defaults'.

    Args:
        defaults_s, candidate_s: seconds of the same tokens, one pair a round; one round says nothing of the
            noise, so its interval is everything.
    """
    logs = [math.log(base / mine) for base, mine in zip(defaults_s, candidate_s, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return Gain(math.exp(mean), 0.0, math.inf)
    freedom = len(logs) - 1
    factor = STUDENT_T[freedom - 1] if freedom <= len(STUDENT_T) else NORMAL_T
    half = factor * statistics.stdev(logs) / math.sqrt(len(logs))
    return Gain(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


@dataclass(frozen=True)
class RunPlan:
    """How real runs spend a time.

    Attributes:
        tokens: of a run.
        candidates: that take turns, defaults among them; 2: the duel comes at once; 0: there is no time.
        screen_rounds: of their turns.
    """

    tokens: int
    candidates: int
    screen_rounds: int


def plan_runs(*, step_s: float, left_s: float, most_tokens: int, most_candidates: int) -> RunPlan:
    """Return what fits into ``left_s``: a screen of candidates and a duel, the duel alone, or nothing.

    Args:
        step_s: of a token, as the model was just seen to write.
    """
    least_tokens = min(LEAST_RUN_TOKENS, most_tokens)
    runs = left_s / (least_tokens * step_s)
    if runs < 2 * LEAST_DUEL_ROUNDS or most_candidates < 2:
        return RunPlan(least_tokens, 0, 0)
    for rounds in range(SCREEN_ROUNDS, 1, -1):
        candidates = min(most_candidates, int((runs - 2 * LEAST_DUEL_ROUNDS) // rounds))
        if candidates > 2:
            turns = rounds * candidates + 2 * DUEL_ROUNDS
            tokens = int(left_s / turns / step_s)
            return RunPlan(max(least_tokens, min(most_tokens, tokens)), candidates, rounds)
    tokens = int(left_s / (2 * DUEL_ROUNDS) / step_s)
    return RunPlan(max(least_tokens, min(most_tokens, tokens)), 2, 0)


def worth_a_duel(times_s: Mapping[Choice, Sequence[float]], defaults: Choice) -> Choice | None:
    """Return the candidate that was fastest in the first rounds; None where the defaults were.

    Args:
        times_s: seconds of each candidate's runs, round by round.
    """
    gains = {
        choice: paired_gain(times_s[defaults], times).speedup
        for choice, times in times_s.items()
        if choice != defaults and times
    }
    best = max(gains, key=lambda choice: gains[choice], default=None)
    return best if best is not None and gains[best] > 1.0 else None
