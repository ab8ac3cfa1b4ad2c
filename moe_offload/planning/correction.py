"""Measured against expected: what a run makes of the figures that it began with.

A profile's bandwidths and layer times were true when they were measured; a run that sees others follows them.
Pure: who measures, calls; who decides, asks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

SMOOTHING = 0.2  # weight of the newest measurement
MOST_CORRECTION = 20.0  # times more or less than expected: what is beyond was an accident
MOST_STEP = 4.0  # one measurement moves an estimate by no more than this factor: a hiccup is no new machine


class RunningCorrection:
    """Rates and times by name: expected at first, then corrected by what is measured.

    ``expected`` may lack any name: its first measurement is then taken as it is. Names are the caller's,
    as "disk_bytes_per_s" or "layer_s".
    """

    def __init__(self, expected: Mapping[str, float] | None = None) -> None:
        self._expected = {name: value for name, value in (expected or {}).items() if _is_usable(value)}
        self._now = dict(self._expected)
        self._counts: dict[str, int] = {}

    def measure(self, name: str, value: float) -> float:
        """Take note of a measurement and return the estimate; what is no positive number counts nothing."""
        if not _is_usable(value):
            return self.get(name, value)
        before = self._now.get(name)
        if before is None:
            self._now[name] = value
        else:
            step = min(MOST_STEP, max(1 / MOST_STEP, value / before))
            self._now[name] = before * step**SMOOTHING
        self._counts[name] = self._counts.get(name, 0) + 1
        return self._now[name]

    def expect(self, name: str, value: float) -> None:
        """Take what was measured at load for what is expected, unless something is expected already."""
        if _is_usable(value) and name not in self._expected:
            self._expected[name] = value
            self._now.setdefault(name, value)

    def took(self, name: str, expected: float, seen: float) -> None:
        """Take note of work that the estimate said to be ``expected``, in any unit, and that was ``seen``."""
        if not (_is_usable(expected) and _is_usable(seen)) or name not in self._expected:
            return
        shown = self.factor(name) * seen / expected
        bounded = min(MOST_CORRECTION, max(1 / MOST_CORRECTION, shown))
        self.measure(name, self._expected[name] * bounded)

    def note(self, name: str, estimate: float) -> None:
        """Take an estimate that the caller has smoothed itself."""
        if _is_usable(estimate):
            self._now[name] = estimate
            self._counts[name] = self._counts.get(name, 0) + 1

    def get(self, name: str, otherwise: float = math.inf) -> float:
        """Return the estimate now; ``otherwise`` where nothing was expected or measured."""
        return self._now.get(name, otherwise)

    def factor(self, name: str) -> float:
        """Return estimate over expectation: 1 where nothing was expected, or measured."""
        expected = self._expected.get(name)
        return 1.0 if expected is None else self._now[name] / expected

    def corrected(self, name: str, modelled: float) -> float:
        """Return a figure of the cost model, scaled as the measured ones of its kind were."""
        return modelled * self.factor(name)

    def as_dict(self) -> dict[str, dict[str, float | int | None]]:
        """Return of every name what is expected and estimated, and from how many measurements, for JSON."""
        return {
            name: {
                "expected": self._expected.get(name),
                "estimate": now,
                "measurements": self._counts.get(name, 0),
            }
            for name, now in self._now.items()
        }


def _is_usable(value: float) -> bool:
    return value > 0 and math.isfinite(value)
