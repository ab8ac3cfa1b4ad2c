"""Which misses are worth a slot on the device: those that missed before, lately.

One miss says little: under a long tail of experts it would fill the device with what is not used again.
"""

from __future__ import annotations

from collections import OrderedDict

from moe_offload.storage.expert_format import ExpertKey

REMEMBERED_SHARE = 4  # misses remembered, in times the slots
LEAST_UNDER_WAY = 2  # copies; a demand overtakes what is not issued of them
IDLE_SHARE = 0.5  # of the link's idle time: copies take RAM's bandwidth from the CPU's experts


class SecondMiss:
    """Remember the last misses; admit an expert whose last miss is still among them.

    Args:
        num_slots: of the device.
    """

    def __init__(self, num_slots: int) -> None:
        self._most = max(1, REMEMBERED_SHARE * num_slots)
        self._missed: OrderedDict[ExpertKey, None] = OrderedDict()  # oldest first

    def admits(self, key: ExpertKey) -> bool:
        """Take note of a miss; whether the expert shall be copied. Then it starts anew."""
        if key in self._missed:
            del self._missed[key]
            return True
        self._missed[key] = None
        if len(self._missed) > self._most:
            self._missed.popitem(last=False)
        return False

    def remember(self, key: ExpertKey) -> None:
        """Let the next miss count as the second: it was admitted, and there was no time to copy it."""
        self._missed[key] = None


def most_under_way(idle_s: float, copy_s: float) -> int:
    """Return how many copies may be under way that no step waits for.

    Args:
        idle_s: how long the link had nothing to do since they were last counted.
        copy_s: an expert's time on it.
    """
    return max(LEAST_UNDER_WAY, int(IDLE_SHARE * idle_s / copy_s)) if copy_s > 0 else LEAST_UNDER_WAY
