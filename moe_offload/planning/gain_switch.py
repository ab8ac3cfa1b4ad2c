"""Does something pay? Compare steps with and without it, pair by pair, and keep what is faster.

A probe is two neighbouring blocks of a few steps, one with it and one without, in an order that alternates;
the first step of a block is left out since it inherits the other's state. A step that missed more takes
longer, whether it prefetches or not, so what a miss costs is estimated from all steps and taken off. Each
probe gives one difference; their mean and its confidence interval decide. While they agree with what is
done, probes become rarer; when they do not, they follow one another until the interval is clear of zero.
One probe is enough to rest where what is done was far faster in every one of its steps.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

BLOCK_STEPS, LEAST_STEPS = 5, 2  # of a block; the first one does not count
COUNTED_STEPS = BLOCK_STEPS - 1
LEAST_PROBES, MOST_PROBES = 4, 12  # before a change; the last MOST_PROBES count
AGREEING_PROBES = 2  # are enough to go on as before, where each of them says so
CLEAR, CLEAR_OF_FEW = 2.0, 3.5  # standard errors: with many probes, and more with few (Student's t)
SWITCH_ON, SWITCH_OFF = 0.015, -0.015  # mean gain where the interval does not decide
FAR = 0.10  # of a step: what a single probe may show
FIRST_REST_STEPS, LONGEST_REST_STEPS = 48, 256
TRIAL_SHARE = 0.02  # of all time: what finding out may cost, as far as a longest rest makes it so
REMEMBERED_STEPS = 256  # for what a miss costs


class Timed(NamedTuple):
    """A step's time and how many experts it needed that were not resident."""

    seconds: float
    needs: int


class GainSwitch:
    """Whether to do it in the next step; ``record`` every step's time.

    Attributes:
        is_on: for the next step.
        decision: what is done between probes.
        gain: share of a step's time that it saves by the last probes; None before the first decision.

    Args:
        begins_on: what is done until probes decide; the first block is of this kind.
    """

    _most_probes = MOST_PROBES
    _in_favour = 0.0  # share of a step's time without it that is added to every difference

    def __init__(self, *, begins_on: bool = True) -> None:
        self.is_on = self.decision = self._begins_on = begins_on
        self.gain: float | None = None
        self._blocks: dict[bool, list[Timed]] = {True: [], False: []}  # of the probe under way
        self._probes: deque[tuple[list[Timed], list[Timed]]] = deque(maxlen=self._most_probes)  # on, off
        self._recent: deque[tuple[float, float]] = deque(maxlen=REMEMBERED_STEPS)  # see _miss_s
        self._step = 0  # of the block
        self._is_second = False  # block of the probe
        self._num_probes = 0
        self._resting = 0  # steps left before the next probe
        self._rest_steps = FIRST_REST_STEPS

    @property
    def is_trying(self) -> bool:
        """Whether a probe is under way: steps are not all done in the same way."""
        return self._resting == 0

    def describe(self, compared: str = "a step") -> str:
        """Return in a few words what was decided and why; ``compared``: of which the gain is a share."""
        if self.gain is None and not self._begins_on:
            return "on for comparison" if self.is_on else "off until it is tried"
        if self.gain is None:
            return "on" if self.is_on else "off for comparison"
        does = f"{'saves' if self.gain >= 0 else 'costs'} {abs(self.gain):.1%} of {compared}"
        return f"{'on' if self.decision else 'off'}: it {does}"

    def record(self, seconds: float, needs: int = 0) -> None:
        """Take note of the step that was done with ``is_on`` as it is, and set it for the next one."""
        if self._resting:
            self._resting -= 1
        else:
            self._record_in_probe(Timed(seconds, needs))
        self.is_on = self.decision if self._resting else self._is_on_in_probe()

    def _record_in_probe(self, step: Timed) -> None:
        if self._step >= self._num_settling():
            self._blocks[self.is_on].append(step)
        self._step += 1
        ends_block = self._step == self._num_settling() + COUNTED_STEPS
        if ends_block and not self._is_second:
            self._step, self._is_second = 0, True
        elif ends_block or self._is_hopeless():
            self._end_probe()

    def _num_settling(self) -> int:
        """Return how many steps of the block under way do not count."""
        return 1

    def revoke(self) -> None:
        """Do it no more: something else showed that it costs. Later probes may show otherwise."""
        self.is_on = self.decision = False
        self._blocks = {True: [], False: []}
        self._probes.clear()
        self._step, self._is_second = 0, False
        self._resting = self._rest_steps = FIRST_REST_STEPS

    def _is_on_in_probe(self) -> bool:
        first = self._begins_on == (self._num_probes % 2 == 0)
        return first is not self._is_second

    def _is_hopeless(self) -> bool:
        """Whether a probe's second block, of what is not done, need not be finished: it is slower again.

        In a first trial it has to be far slower.
        """
        done, other = self._blocks[self.decision], self._blocks[not self.decision]
        if len(done) < COUNTED_STEPS or len(other) < LEAST_STEPS:
            return False
        return self._is_faster(done, other, by=FAR if self.gain is None else 0.0)

    def _end_probe(self) -> None:
        on, off = self._blocks[True], self._blocks[False]
        for block in (on, off):
            mean_s, mean_needs = _means(block)
            self._recent.extend((step.seconds - mean_s, step.needs - mean_needs) for step in block)
        self._probes.append((on, off))
        self._blocks = {True: [], False: []}
        self._step, self._is_second = 0, False
        self._num_probes += 1
        if len(self._probes) >= LEAST_PROBES:
            self._decide()
        elif self._all_agree() or self._is_faster(*((on, off) if self.decision else (off, on)), by=FAR):
            self._rest(agrees=self.gain is not None, gain=self._estimate()[0])

    def _all_agree(self) -> bool:
        """Whether there are a few probes and what is done was faster in each."""
        differences = self._differences()
        agreeing = sum((difference > 0.0) is self.decision for difference in differences)
        return len(differences) >= AGREEING_PROBES and agreeing == len(differences)

    def _is_faster(self, done: Sequence[Timed], other: Sequence[Timed], *, by: float) -> bool:
        """Whether every step of ``done`` was faster than any of ``other``, and all by more than a share."""
        miss_s = self._miss_s()
        done_s, other_s = ([step.seconds - miss_s * step.needs for step in block] for block in (done, other))
        is_far = statistics.fmean(other_s) - statistics.fmean(done_s) > by * statistics.fmean(done_s)
        return is_far and max(done_s) < min(other_s)

    def _rest(self, *, agrees: bool, gain: float) -> None:
        """Begin no probe for some steps: more the longer nothing changed, and the more these probes cost."""
        longer = min(2 * self._rest_steps, LONGEST_REST_STEPS)
        self._rest_steps = longer if agrees else FIRST_REST_STEPS
        cost_steps = len(self._probes) * BLOCK_STEPS * abs(gain)
        self._resting = max(self._rest_steps, min(LONGEST_REST_STEPS, int(cost_steps / TRIAL_SHARE)))
        self.gain = gain

    def _decide(self) -> None:
        """Bring decision and gain up to date; rest, unless it takes more probes to change it."""
        gain, clear = self._estimate()
        decision = gain > (0.0 if clear else SWITCH_OFF if self.decision else SWITCH_ON)
        contradicts = decision != self.decision
        if contradicts and not clear and len(self._probes) < MOST_PROBES:
            return
        self._rest(agrees=self.gain is not None and not contradicts, gain=gain)
        if contradicts:
            self._probes.clear()
        self.decision = decision

    def _estimate(self) -> tuple[float, bool]:
        """Return the mean gain of the probes as a share of a step without it, and whether it is clear of 0.

        A trimmed mean, its error from what is left with the extremes drawn in (Yuen, Biometrika 61, 1974): a
        disk that hesitates once shall not decide.
        """
        differences = self._differences()
        step_s = statistics.median(_means(off)[0] for _, off in self._probes)
        if step_s <= 0.0:
            return 0.0, False
        cut, ordered = _num_extremes(len(differences)), sorted(differences)
        kept = ordered[cut : len(ordered) - cut]
        drawn_in = [min(max(value, kept[0]), kept[-1]) for value in differences]
        spread = statistics.stdev(drawn_in) if len(kept) > 1 else 0.0
        error = spread * len(differences) ** 0.5 / len(kept)
        mean = statistics.fmean(kept)
        clear = len(kept) > 1 and abs(mean) > (CLEAR + CLEAR_OF_FEW / (len(kept) - 1)) * error
        return mean / step_s, clear

    def _differences(self) -> list[float]:
        """Return by probe the seconds that a step took longer without it, its misses taken off."""
        miss_s, differences = self._miss_s(), []
        for on, off in self._probes:
            (on_s, on_needs), (off_s, off_needs) = _means(on), _means(off)
            differences.append((1.0 + self._in_favour) * off_s - on_s - miss_s * (off_needs - on_needs))
        return differences

    def _miss_s(self) -> float:
        """Return the seconds that a miss more takes, by least squares within the blocks; none below 0."""
        squares = sum(needs * needs for _, needs in self._recent)
        products = sum(seconds * needs for seconds, needs in self._recent)
        return max(0.0, products / squares) if squares > 0.0 else 0.0


def _means(block: Sequence[Timed]) -> tuple[float, float]:
    """Return the means of times and needs, the slowest step left out: what else the machine did."""
    kept = sorted(block)[: max(1, len(block) - 1)]
    return statistics.fmean(step.seconds for step in kept), statistics.fmean(step.needs for step in kept)


def _num_extremes(num_probes: int) -> int:
    """Return how many probes are left out at either end."""
    return num_probes // 4
