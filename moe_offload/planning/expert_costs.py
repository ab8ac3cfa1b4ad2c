"""What an expert costs on either side, from curves measured at load and corrected while running.

Pure: curves and measured seconds in, a ``LayerWork`` for the scheduler out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_offload.planning.correction import RunningCorrection
from moe_offload.planning.scheduler import Choice, LayerWork, times_of

Curve = Sequence[tuple[int, float]]  # (tokens, seconds of one expert), ascending


@dataclass(frozen=True)
class MeasuredCosts:
    """Of one size of experts, alone on an idle machine.

    Attributes:
        gpu_start_s: what a layer's launch takes beside computing: inputs, waking, waiting; 0: nothing.
    """

    cpu_curve: Curve
    gpu_curve: Curve
    copy_s: float
    gpu_start_s: float = 0.0


class RunningCosts:
    """``measured``, times what steps have shown since: the other side takes its share of memory's speed.

    What they have shown is in ``speeds``, which the run shares: one token's expert on either side and on the
    link, by the names "expert_cpu_s", "expert_device_s", "expert_copy_s", and a layer's launch by
    "device_start_s", with the bytes of an expert behind where a model has several sizes.
    """

    def __init__(
        self, measured: MeasuredCosts, speeds: RunningCorrection | None = None, size: str = ""
    ) -> None:
        self.measured, self.speeds = measured, speeds or RunningCorrection()
        one = np.ones(1, np.int64)
        self._one_cpu_s = float(times_of(measured.cpu_curve, one)[0])
        self._one_gpu_s = float(times_of(measured.gpu_curve, one)[0])
        self._cpu, self._gpu, self._copy = (f"expert_{what}_s{size}" for what in ("cpu", "device", "copy"))
        self._start = f"device_start_s{size}"
        self.speeds.expect(self._cpu, self._one_cpu_s)
        self.speeds.expect(self._gpu, self._one_gpu_s)
        self.speeds.expect(self._copy, measured.copy_s)
        self.speeds.expect(self._start, measured.gpu_start_s)

    @property
    def cpu_factor(self) -> float:
        """How many times as long as at load."""
        return self.speeds.factor(self._cpu)

    @property
    def gpu_factor(self) -> float:
        return self.speeds.factor(self._gpu)

    @property
    def copy_factor(self) -> float:
        return self.speeds.factor(self._copy)

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

    @property
    def gpu_start_s(self) -> float:
        """What a layer's launch takes beside computing."""
        return self.measured.gpu_start_s * self.speeds.factor(self._start)

    def of_one_token(self) -> tuple[float, float, float, float]:
        """Return an expert's time on CPU and device for one token, on the link, and a layer's launch."""
        cpu_s, gpu_s = self._one_cpu_s * self.cpu_factor, self._one_gpu_s * self.gpu_factor
        return cpu_s, gpu_s, self.copy_s, self.gpu_start_s

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
            gpu_start_s=self.gpu_start_s,
        )

    def saw_cpu(self, expected_s: float, seconds: float) -> None:
        """Take note of CPU work that was expected to take ``expected_s``."""
        self.speeds.took(self._cpu, expected_s, seconds)

    def saw_gpu(self, expected_s: float, seconds: float) -> None:
        """Take note of the device's computing, without its waiting for copies."""
        self.speeds.took(self._gpu, expected_s, seconds)

    def saw_copies(self, expected_s: float, seconds: float) -> None:
        """Take note of the link's busy time."""
        self.speeds.took(self._copy, expected_s, seconds)

    def saw_start(self, expected_s: float, seconds: float) -> None:
        """Take note of what launches took beside computing."""
        self.speeds.took(self._start, expected_s, seconds)
