"""So many seconds and no more: a budget that is cut into shares, on a clock that the caller brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

Clock = Callable[[], float]  # seconds, monotonic
FAR_OVER = 2.0  # a budget that one step exceeded by its own length stops even what must be repeated


class TimeBudget:
    """``seconds`` from now on; what is not used is there for what comes after.

    A share never ends after the whole: what one step overran, the later ones lack.
    """

    def __init__(self, seconds: float, clock: Clock) -> None:
        self._clock, self.seconds = clock, seconds
        self._start = clock()

    @property
    def spent_s(self) -> float:
        return self._clock() - self._start

    @property
    def left_s(self) -> float:
        return max(0.0, self.seconds - self.spent_s)

    @property
    def is_over(self) -> bool:
        return self.spent_s >= self.seconds

    @property
    def is_far_over(self) -> bool:
        return self.spent_s >= FAR_OVER * self.seconds

    def share(self, part: float) -> TimeBudget:
        """Return a budget that begins now, of that part of the whole, or what is left of it."""
        return TimeBudget(min(part * self.seconds, self.left_s), self._clock)

    def shares(self, count: int) -> Iterator[TimeBudget]:
        """Yield ``count`` budgets for steps one after the other: each an equal part of what is left then."""
        for steps_left in range(count, 0, -1):
            yield TimeBudget(self.left_s / steps_left, self._clock)
