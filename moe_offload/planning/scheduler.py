"""Which of a layer's experts run on the GPU, which on the CPU, so that the later side finishes early.

The model: the CPU runs its experts one after the other; the GPU runs those resident, then those that
are copied, as they arrive; copies follow one another on the link. ``finish_s`` is that model, in the
best order of copies; every scheduler is a choice that it judges.

Sources: HybriMoE (arXiv 2504.05897, eq. 2 and its released greedy), Fiddler (arXiv 2402.07033), and
Johnson's rule for two machines in a row: with one copy time for all, the longest GPU time goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_offload import _native
from moe_offload.errors import ConfigError, nearest

Choice = NDArray[np.bool_]  # (n,) True: on the GPU, after a copy unless resident there


@dataclass(frozen=True)
class LayerWork:
    """The experts of one layer and step, n of them; times in seconds from measured curves.

    Attributes:
        cpu_s, gpu_s: (n,) each expert's time there, for its number of tokens.
        on_gpu: (n,) resident there.
        in_ram: (n,) the CPU can run it, and a copy can start; every expert is in one of the two.
        copy_s: of one expert over the link.
        cpu_start_s, gpu_start_s: once, when that side runs anything.
    """

    cpu_s: NDArray[np.float64]
    gpu_s: NDArray[np.float64]
    on_gpu: Choice
    in_ram: Choice
    copy_s: float
    cpu_start_s: float = 0.0
    gpu_start_s: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """A choice and the time when its later side finishes."""

    on_gpu: Choice
    finish_s: float


def finish_s(work: LayerWork, on_gpu: Choice) -> float:
    """Return when the later side of a choice finishes, copies in the best order."""
    cpu_s = float(work.cpu_s[~on_gpu].sum())
    gpu_s = float(work.gpu_s[on_gpu & work.on_gpu].sum())
    copied = sorted(work.gpu_s[on_gpu & ~work.on_gpu].tolist(), reverse=True)
    for position, expert_s in enumerate(copied, start=1):
        gpu_s = max(gpu_s, position * work.copy_s) + expert_s
    return max(cpu_s + work.cpu_start_s * (cpu_s > 0), gpu_s + work.gpu_start_s * (gpu_s > 0))


def hybrid(work: LayerWork) -> Schedule:
    """Ours: exact for equal loads (decoding), within 2% of the best for others."""
    return Schedule(
        *_native.schedule_layer(
            work.cpu_s,
            work.gpu_s,
            work.on_gpu,
            work.in_ram,
            work.copy_s,
            work.cpu_start_s,
            work.gpu_start_s,
        )
    )


def static_split(work: LayerWork) -> Schedule:
    """Run what is resident on the GPU and the rest on the CPU; nothing is copied."""
    return _judged(work, work.on_gpu.copy())


def on_demand(work: LayerWork) -> Schedule:
    """Copy every miss and run all on the GPU."""
    return _judged(work, np.ones(len(work.on_gpu), np.bool_))


def fiddler(work: LayerWork) -> Schedule:
    """Decide each miss by itself: copy where copy and GPU together are quicker than the CPU."""
    return _judged(work, work.on_gpu | (work.copy_s + work.gpu_s < work.cpu_s))


def hybrimoe_greedy(work: LayerWork) -> Schedule:
    """HybriMoE as released: a queue, residents first, eaten from both ends by whoever finishes first.

    Both parts of the queue are in descending load, for which the CPU time stands. The GPU takes from
    the front, the CPU from the back; an expert that the CPU cannot run stays with the GPU.
    """
    queue = sorted(range(len(work.cpu_s)), key=lambda i: (not work.on_gpu[i], -work.cpu_s[i]))
    on_gpu = np.zeros(len(queue), np.bool_)
    gpu_s = cpu_s = moved_s = 0.0
    first, last = 0, len(queue) - 1
    while first <= last:
        front, back = queue[first], queue[last]
        arrival_s = 0.0 if work.on_gpu[front] else moved_s + work.copy_s
        gpu_end_s = max(gpu_s, arrival_s) + work.gpu_s[front]
        cpu_end_s = cpu_s + work.cpu_s[back]
        if gpu_end_s <= cpu_end_s or not work.in_ram[back]:
            on_gpu[front] = True
            gpu_s, moved_s, first = gpu_end_s, max(moved_s, arrival_s), first + 1
        else:
            cpu_s, last = cpu_end_s, last - 1
    return _judged(work, on_gpu)


SCHEDULERS: dict[str, Callable[[LayerWork], Schedule]] = {
    "hybrid": hybrid,
    "static_split": static_split,
    "on_demand": on_demand,
    "fiddler": fiddler,
    "hybrimoe_greedy": hybrimoe_greedy,
}


def check_scheduler(name: str) -> None:
    """Refuse a name that is no scheduler's.

    Raises:
        ConfigError: with the names that are.
    """
    if name not in SCHEDULERS:
        known = ", ".join(SCHEDULERS)
        raise ConfigError(f"scheduler={name!r} is unknown{nearest(name, SCHEDULERS)}; known are {known}")


def _judged(work: LayerWork, on_gpu: Choice) -> Schedule:
    return Schedule(on_gpu, finish_s(work, on_gpu))


def times_of(curve: Sequence[tuple[int, float]], num_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return seconds for each token count from a measured curve, straight between its points.

    Args:
        curve: (tokens, seconds), ascending; beyond its end the last slope goes on.
    """
    tokens, seconds = np.array(curve, np.float64).T
    times: NDArray[np.float64] = np.interp(num_tokens, tokens, seconds)
    if len(curve) > 1:
        slope = (seconds[-1] - seconds[-2]) / (tokens[-1] - tokens[-2])
        times = np.where(num_tokens > tokens[-1], seconds[-1] + slope * (num_tokens - tokens[-1]), times)
    return times
