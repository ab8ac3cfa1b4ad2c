"""What a scheduler does with one token's experts, written down for native code.

A token's experts cost the same, so a scheduler's answer depends on how many of them the device has, not on
which: a table of one number for each such number says the same. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moe_offload import _native
from moe_offload.planning.expert_costs import RunningCosts
from moe_offload.planning.scheduler import LayerWork, Schedule, hybrid, static_split

CHANGE = 0.05  # of a cost, before the scheduler is asked again

Scheduler = Callable[[LayerWork], Schedule]


def moves_of(
    scheduler: Scheduler, count: int, cpu_s: float, gpu_s: float, copy_s: float, gpu_start_s: float = 0.0
) -> list[int]:
    """Return, for 0 to ``count`` experts on the device, how many more are copied there.

    Below zero: so many of those on the device are left to the CPU.
    """
    if scheduler is hybrid:
        return _native.schedule_token(count, cpu_s, gpu_s, copy_s, gpu_start_s)[0]
    if scheduler is static_split:
        return [0] * (count + 1)
    moves = []
    for residents in range(count + 1):
        choice = scheduler(_work(residents, count, cpu_s, gpu_s, copy_s, gpu_start_s)).on_gpu
        copied, left = int(choice[residents:].sum()), residents - int(choice[:residents].sum())
        moves.append(copied or -left)
    return moves


@dataclass(frozen=True)
class Division:
    """Which of one token's experts run where, by position, ascending; ``copied`` ones on the device, too."""

    on_device: list[int]
    copied: list[int]
    on_cpu: list[int]


def divide(there: Sequence[bool], in_ram: Sequence[bool], moves: Sequence[int]) -> Division:
    """Return who runs where, given ``moves_of`` them (csrc/planning/token_division.h is its twin).

    Args:
        there: whether the device has it.
        in_ram: whether RAM has it; the device keeps what RAM has not.
    """
    move = moves[sum(there)]
    absent = [i for i, is_there in enumerate(there) if not is_there]
    spare = [i for i, (is_there, also) in enumerate(zip(there, in_ram, strict=True)) if is_there and also]
    copied, left = absent[: max(0, move)], spare[: max(0, -move)]
    on_device = [i for i, is_there in enumerate(there) if is_there and i not in left]
    return Division(on_device, copied, sorted([*left, *absent[len(copied) :]]))


def savings_of(
    scheduler: Scheduler, count: int, cpu_s: float, gpu_s: float, copy_s: float, gpu_start_s: float = 0.0
) -> list[float]:
    """Return, for 0 to ``count`` - 1 of a token's experts on the device, the seconds that one more saves."""
    if scheduler is hybrid:
        finish_s = _native.schedule_token(count, cpu_s, gpu_s, copy_s, gpu_start_s)[1]
        return [max(0.0, before - after) for before, after in pairwise(finish_s)]
    finish_s = [
        scheduler(_work(residents, count, cpu_s, gpu_s, copy_s, gpu_start_s)).finish_s
        for residents in range(count + 1)
    ]
    return [max(0.0, before - after) for before, after in pairwise(finish_s)]


def _work(
    residents: int, count: int, cpu_s: float, gpu_s: float, copy_s: float, gpu_start_s: float
) -> LayerWork:
    on_gpu, in_ram = np.arange(count) < residents, np.ones(count, np.bool_)
    return LayerWork(
        np.full(count, cpu_s), np.full(count, gpu_s), on_gpu, in_ram, copy_s, gpu_start_s=gpu_start_s
    )


class TokenMoves:
    """``moves_of`` for experts that cost ``costs``, asked again when those have changed."""

    def __init__(self, costs: RunningCosts) -> None:
        self.costs = costs
        self._asked_at = (0.0, 0.0, 0.0, 0.0)
        self._moves: dict[tuple[Scheduler, int], list[int]] = {}  # and the number of experts
        self._savings: dict[tuple[Scheduler, int], list[float]] = {}

    def of(self, scheduler: Scheduler, count: int) -> list[int]:
        """Return ``moves_of``; the same list as long as it holds."""
        self._ask_again_where_changed()
        if (scheduler, count) not in self._moves:
            self._moves[scheduler, count] = moves_of(scheduler, count, *self._asked_at)
        return self._moves[scheduler, count]

    def savings(self, scheduler: Scheduler, count: int) -> list[float]:
        """Return ``savings_of``."""
        self._ask_again_where_changed()
        if (scheduler, count) not in self._savings:
            self._savings[scheduler, count] = savings_of(scheduler, count, *self._asked_at)
        return self._savings[scheduler, count]

    def _ask_again_where_changed(self) -> None:
        now = self.costs.of_one_token()
        if any(abs(a - b) > CHANGE * b for a, b in zip(now, self._asked_at, strict=True)):
            self._asked_at = now
            self._moves, self._savings = {}, {}
