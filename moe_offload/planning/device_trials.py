"""Whether a device's experts are shared and copied ahead, or stay what a static split would make of them.

Two GainSwitches: ``sharing`` compares the scheduler with a static split (nothing copied, nothing replaced,
nothing looked ahead for), ``ahead`` compares copying the next layers' experts with not doing it. They take
turns, since two that switch in step would be taken for each other; and what loses against the static split
loses all of it. Both begin off: until a trial has shown more, a device does what a static split does. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe_offload.planning.gain_switch import GainSwitch

# What copies ahead must be able to save in a layer before they are tried: a share of its experts' time, and
# what it takes to predict, rank and queue them (0.2 to 0.7 ms in 12 layers of the demo, x86-2c).
LEAST_WORTH, LOOK_AHEAD_S = 0.05, 2e-4


def may_gain(savings: Sequence[float], one_cpu_s: float) -> bool:
    """Whether experts on the device can make a layer faster by more than looking ahead for them takes.

    Args:
        savings: of one token, token_moves.savings_of.
        one_cpu_s: of an expert.
    """
    return sum(savings) > max(LOOK_AHEAD_S, LEAST_WORTH * len(savings) * one_cpu_s)


class DeviceTrials:
    """Whose trial it is. The switches are named in every call, since callers change them.

    ``sharing`` None: another scheduler than ours, always on; ``ahead`` None: copies ahead are never doubted.
    """

    def __init__(self) -> None:
        self._is_turn_of_ahead = False

    def copies_ahead(self, sharing: GainSwitch | None, ahead: GainSwitch | None, may_gain: bool) -> bool:
        """Whether the next step may copy for layers to come."""
        if sharing is not None and not sharing.is_on:
            return False
        if ahead is None:
            return True
        if sharing is None or self._is_turn_of_ahead:
            return ahead.is_on
        return may_gain and ahead.decision

    def record(
        self,
        sharing: GainSwitch | None,
        ahead: GainSwitch | None,
        seconds: float,
        needs: int,
        may_gain: bool,
    ) -> None:
        """Take note of a step, and say by the switches what the next one does.

        Args:
            needs: experts that the step needed and the device had not.
            may_gain: ``may_gain``: where not, copies ahead are not tried.
        """
        if sharing is None or ahead is None:
            switch, misses = (ahead, needs) if sharing is None else (sharing, 0)
            return None if switch is None else switch.record(seconds, misses)
        if self._is_turn_of_ahead:
            ahead.record(seconds, needs)
            self._is_turn_of_ahead = ahead.is_trying
            return None
        was_on = sharing.decision
        sharing.record(seconds)
        if was_on and not sharing.decision:
            ahead.revoke()
        elif sharing.decision and not sharing.is_trying:
            self._rest_or_try(ahead, seconds, needs, may_gain)
        return None

    def _rest_or_try(self, ahead: GainSwitch, seconds: float, needs: int, may_gain: bool) -> None:
        if ahead.is_trying:
            self._is_turn_of_ahead = may_gain
        else:
            ahead.record(seconds, needs)
