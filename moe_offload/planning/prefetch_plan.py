"""Which guesses are worth reading now, and in which order: on numbers only.

Time is counted in windows, the compute time of one layer; a guess's deadline is the number of windows
until its layer's router speaks. A link that reads ``window_bytes`` per window serves the earliest deadline
first. A guess is admitted when its read, after all that is queued before it, begins within a window: a read
that comes late still shortens the wait, and what would not have begun by then is decided anew when the next
layer has routed, by who knows more. So deep guesses fill a link that near ones leave idle, and no other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from moe_offload.storage.expert_format import ExpertKey

WASTE_TARGET = 0.13  # of all bytes read
LOWEST, HIGHEST = 0.10, 0.95  # of the threshold on a guess's probability
GAIN, MOST_STEP = 0.4, 0.05  # of its steps: per share of waste above the target, and in all
REMEMBERED = 12  # looks at the counters
READERS = 4  # reads under way at the same time


class Guess(NamedTuple):
    """An expert that a step may need soon.

    Attributes:
        windows: layers until its router speaks, from 1.
    """

    key: ExpertKey
    probability: float
    num_bytes: int
    windows: int


def plan_reads(
    guesses: Iterable[Guess],
    *,
    queued_bytes: float,
    window_bytes: float,
    threshold: float,
    ranked: bool = False,
) -> list[ExpertKey]:
    """Return what to read, in order: by deadline, then the more probable first; or as they come, ``ranked``.

    Args:
        queued_bytes: guesses that go before. Demands do too, but the step waits for those: they put off the
            deadline by as much as they take.
        window_bytes: measured link speed times a layer's measured compute time; may be infinite.
        threshold: least probability.
    """
    likely = [guess for guess in guesses if guess.probability >= threshold]
    if not ranked:
        likely.sort(key=lambda guess: (guess.windows, -guess.probability))
    admitted: list[ExpertKey] = []
    for guess in likely:
        if queued_bytes > window_bytes:
            break
        admitted.append(guess.key)
        queued_bytes += guess.num_bytes
    return admitted


def lookahead_depth(needed_bytes: float, window_bytes: float) -> int:
    """Return how many windows it takes to read what one layer needs (ExpertFlow, arXiv 2510.26730)."""
    return 1 if window_bytes <= 0 or needed_bytes <= 0 else max(1, math.ceil(needed_bytes / window_bytes))


def break_even(read_s: float, submit_s: float, busy_share: float = 0.0) -> float:
    """Return the probability at which a guess saves as much stall as it is expected to cost.

    Right, it saves its read's time. Wrong, it takes that time from a link that is busy with what steps need;
    where the link has time, a demand waits for half of it, among ``READERS`` reads under way. Either way it
    costs ``submit_s`` of compute time to ask for it.

    Args:
        busy_share: of the time, that the link takes for what is needed.
    """
    hold_up_s = read_s * (busy_share + (1.0 - busy_share) * 0.5 / READERS)
    return min(HIGHEST, (hold_up_s + submit_s) / (read_s + hold_up_s)) if read_s > 0 else HIGHEST


class Threshold:
    """Least probability of a guess: at break-even, and higher while too much of what is read is wasted.

    It moves by the waste of the last ``REMEMBERED`` or so looks, so that this settles at the target.
    """

    def __init__(self) -> None:
        self.value = 0.5
        self._read = self._wasted = 0
        self._recent_read = self._recent_wasted = 0.0

    def skip(self, read_bytes: int, wasted_bytes: int) -> None:
        """Leave out what was read until now: not by these guesses."""
        self._read, self._wasted = read_bytes, wasted_bytes

    def update(self, read_bytes: int, wasted_bytes: int, lowest: float) -> None:
        """Take note of the counters so far and move by at most a step.

        Args:
            read_bytes: all that decode has read.
            wasted_bytes: of these, guesses that nobody used.
            lowest: break-even.
        """
        read, wasted = read_bytes - self._read, wasted_bytes - self._wasted
        if read <= 0:
            return
        self._read, self._wasted = read_bytes, wasted_bytes
        self._recent_read += read - self._recent_read / REMEMBERED
        self._recent_wasted += wasted - self._recent_wasted / REMEMBERED
        above = self._recent_wasted / self._recent_read - WASTE_TARGET
        step = min(MOST_STEP, max(-MOST_STEP, GAIN * above))
        self.value = min(HIGHEST, max(LOWEST, lowest, self.value + step))
