"""Does something pay? Switch it on and off by turns, compare step times, and keep what is faster.

A trial is a few rounds of on, off, off, on (the order cancels a drift), ``BLOCK_STEPS`` steps each, the first
of each block left out since it inherits the other's state. It ends as soon as the difference is clear. Then
the faster one stays for a while, longer each time that a trial agrees with the last one.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

BLOCK_STEPS = 4
ORDER = (True, False, False, True)
LEAST_ROUNDS, MOST_ROUNDS = 1, 6
CLEAR = 2.5  # standard errors
MARGIN = 0.01  # of a step's time: what is off must gain this much to be switched on; what is on may lose none
SHORTEST_STAY_STEPS, LONGEST_STAY_STEPS = 64, 1024


class GainSwitch:
    """Whether to do it in the next step; ``record`` every step's time.

    Attributes:
        is_on: for the next step.
        gain: share of a step's time that it saved in the last trial; None before the first one ended.
        decision: what the last trial decided.
    """

    def __init__(self) -> None:
        self.is_on = True
        self.gain: float | None = None
        self.decision = True
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._step = 0
        self._stay_steps = SHORTEST_STAY_STEPS
        self._staying = 0  # steps left before the next trial

    def record(self, seconds: float) -> None:
        """Take note of the step that was done with ``is_on`` as it is, and set it for the next one."""
        if self._staying:
            self._staying -= 1
            if not self._staying:
                self.is_on = ORDER[0]
            return
        if self._step % BLOCK_STEPS:
            self._times[self.is_on].append(seconds)
        self._step += 1
        rounds, rest = divmod(self._step, BLOCK_STEPS * len(ORDER))
        if rest == 0 and rounds >= LEAST_ROUNDS and self._is_decided(rounds):
            self._settle()
        else:
            self.is_on = ORDER[self._step // BLOCK_STEPS % len(ORDER)]

    def _is_decided(self, rounds: int) -> bool:
        on, off = self._times[True], self._times[False]
        error = (_variance_of_mean(on) + _variance_of_mean(off)) ** 0.5
        difference = abs(statistics.fmean(_trimmed(on)) - statistics.fmean(_trimmed(off)))
        return rounds >= MOST_ROUNDS or difference > CLEAR * error

    def _settle(self) -> None:
        on, off = (statistics.fmean(_trimmed(self._times[which])) for which in (True, False))
        self.gain = 1.0 - on / off if off > 0 else 0.0
        decision = self.gain > (0.0 if self.decision else MARGIN)
        agrees = decision == self.decision
        self._stay_steps = min(2 * self._stay_steps, LONGEST_STAY_STEPS) if agrees else SHORTEST_STAY_STEPS
        self.decision = self.is_on = decision
        self._staying = self._stay_steps
        self._times = {True: [], False: []}
        self._step = 0


def _trimmed(times: Sequence[float]) -> Sequence[float]:
    """Leave out the slowest quarter: what else the machine did."""
    return sorted(times)[: max(1, 3 * len(times) // 4)]


def _variance_of_mean(times: Sequence[float]) -> float:
    kept = _trimmed(times)
    return statistics.pvariance(kept) / len(kept)
