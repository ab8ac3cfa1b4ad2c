"""What a layer's experts should take on a device and the CPU together: for ranking schedulers, nothing else.

Pure arithmetic on what tune measured; the schedulers are the runtime's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np

from moe_offload.planning.scheduler import SCHEDULERS, LayerWork


@dataclass(frozen=True)
class DeviceFacts:
    """What was measured of a device, and what its slots hold.

    Attributes:
        top_k: experts of a token in a layer.
        expert_s: of one token's expert there.
        copy_s: of an expert over the link, while the CPU works.
        step_s: of a launch and of waiting for it.
        hit_rate: by policy, of the recorded trace replayed in the device's slots.
    """

    top_k: int
    expert_s: float
    copy_s: float
    step_s: float
    hit_rate: Mapping[str, float]

    def layer_s(self, scheduler: str, hit_rate: float, cpu_expert_s: float) -> float:
        """Return the seconds of a layer's experts for one token, whose bytes are all in RAM.

        Args:
            hit_rate: the share of them that is on the device.
            cpu_expert_s: of one expert on the CPU.
        """
        times = (cpu_expert_s, self.expert_s, self.copy_s, self.step_s)
        return _mean_finish_s(scheduler, self.top_k, hit_rate, *times)


@lru_cache(maxsize=4096)
def _mean_finish_s(
    scheduler: str, num: int, hit_rate: float, cpu_s: float, gpu_s: float, copy_s: float, step_s: float
) -> float:
    """Return the mean over how many of ``num`` experts are there, each with the chance ``hit_rate``."""
    mean_s = 0.0
    for there in range(num + 1):
        chance = comb(num, there) * hit_rate**there * (1 - hit_rate) ** (num - there)
        work = LayerWork(
            cpu_s=np.full(num, cpu_s),
            gpu_s=np.full(num, gpu_s),
            on_gpu=np.arange(num) < there,
            in_ram=np.ones(num, np.bool_),
            copy_s=copy_s,
            gpu_start_s=step_s,
        )
        mean_s += chance * SCHEDULERS[scheduler](work).finish_s
    return mean_s
