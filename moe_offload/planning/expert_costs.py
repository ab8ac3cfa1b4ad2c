"""What an expert costs on either side, from curves measured at load and corrected while running.

Pure: curves and measured seconds in, a ``LayerWork`` for the scheduler out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_offload.planning.scheduler import Choice, LayerWork, times_of

SMOOTHING = 0.1  # of corrections
MOST_CORRECTION = 20.0  # times faster or slower than measured at load: what is beyond was an accident

Curve = Sequence[tuple[int, float]]  # (tokens, seconds of one expert), ascending


@dataclass(frozen=True)
class MeasuredCosts:
    """Of one size of experts, alone on an idle machine."""

    cpu_curve: Curve
    gpu_curve: Curve
    copy_s: float


class RunningCosts:
    """``measured``, times what steps have shown since: the other side takes its share of memory's speed."""

    def __init__(self, measured: MeasuredCosts) -> None:
        self.measured = measured
        self.cpu_factor = self.gpu_factor = self.copy_factor = 1.0
        one = np.ones(1, np.int64)
        self._one_cpu_s = float(times_of(measured.cpu_curve, one)[0])
        self._one_gpu_s = float(times_of(measured.gpu_curve, one)[0])

    def cpu_s(self, num_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return each expert's time on the CPU for its tokens."""
        return times_of(self.measured.cpu_curve, num_tokens) * self.cpu_factor

    def gpu_s(self, num_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return each expert's time on the device for its tokens."""
        return times_of(self.measured.gpu_curve, num_tokens) * self.gpu_factor

    @property
    def copy_s(self) -> float:
        """An expert's time on the link."""
        return self.measured.copy_s * self.copy_factor

    def of_one_token(self) -> tuple[float, float, float]:
        """Return an expert's time on the CPU and on the device for one token, and on the link."""
        return self._one_cpu_s * self.cpu_factor, self._one_gpu_s * self.gpu_factor, self.copy_s

    def work(self, num_tokens: NDArray[np.int64], on_gpu: Choice, in_ram: Choice) -> LayerWork:
        """Return the layer as the schedulers see it; what is not on the device can run on the CPU.

        Args:
            in_ram: (n,) whether RAM has the expert too.
        """
        return LayerWork(
            cpu_s=self.cpu_s(num_tokens),
            gpu_s=self.gpu_s(num_tokens),
            on_gpu=on_gpu,
            in_ram=in_ram | ~on_gpu,
            copy_s=self.copy_s,
        )

    def saw_cpu(self, expected_s: float, seconds: float) -> None:
        """Take note of CPU work that was expected to take ``expected_s``."""
        self.cpu_factor = _corrected(self.cpu_factor, expected_s, seconds)

    def saw_gpu(self, expected_s: float, seconds: float) -> None:
        """Take note of the device's computing, without its waiting for copies."""
        self.gpu_factor = _corrected(self.gpu_factor, expected_s, seconds)

    def saw_copies(self, expected_s: float, seconds: float) -> None:
        """Take note of the link's busy time."""
        self.copy_factor = _corrected(self.copy_factor, expected_s, seconds)


def _corrected(factor: float, expected_s: float, seconds: float) -> float:
    if expected_s <= 0 or seconds <= 0:
        return factor
    shown = min(MOST_CORRECTION, max(1 / MOST_CORRECTION, factor * seconds / expected_s))
    return factor + SMOOTHING * (shown - factor)
