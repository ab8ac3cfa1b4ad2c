"""Which of two trials has its turn, and that whatever loses against a static split is turned off."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from moe_offload.planning.device_trials import DeviceTrials, may_gain
from moe_offload.planning.gain_switch import BLOCK_STEPS, GainSwitch

Seconds = Callable[[bool, bool], float]  # whether experts are shared, and copied ahead


class World:
    """Steps that take as long as ``seconds`` says of what is done in them."""

    def __init__(self, *, may_gain: bool = True) -> None:
        self.trials, self.sharing, self.ahead = (
            DeviceTrials(),
            GainSwitch(begins_on=False),
            GainSwitch(begins_on=False),
        )
        self.may_gain = may_gain
        self.done: list[tuple[bool, bool]] = []

    def run(self, num_steps: int, seconds: Seconds) -> float:
        """Return the time of all steps."""
        total_s = 0.0
        for _ in range(num_steps):
            copies = self.trials.copies_ahead(self.sharing, self.ahead, self.may_gain)
            self.done.append((self.sharing.is_on, copies))
            step_s = seconds(self.sharing.is_on, copies)
            self.trials.record(self.sharing, self.ahead, step_s, 0, self.may_gain)
            total_s += step_s
        return total_s


def test_the_first_tokens_are_a_static_splits() -> None:
    world = World()
    world.run(BLOCK_STEPS, lambda shares, ahead: 1.0)
    assert set(world.done) == {(False, False)}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("costs", [(0.3, 1.5), (0.02, 0.3), (2.0, 0.1)])
def test_what_loses_costs_next_to_nothing_from_the_first_token_on(
    costs: tuple[float, float], seed: int
) -> None:
    """Of 96 tokens, whatever sharing and copying ahead cost more than a static split."""
    world, generator = World(), random.Random(seed)
    shared_s, ahead_s = costs

    def seconds(shares: bool, ahead: bool) -> float:
        return generator.uniform(0.95, 1.05) * (1.0 + shared_s * shares + ahead_s * ahead)

    assert world.run(96, seconds) < 1.08 * 96


def test_nothing_is_copied_ahead_beside_a_static_split() -> None:
    world = World()
    world.run(2000, lambda shares, ahead: 1.0 - 0.2 * ahead - 0.05 * shares)
    assert (False, True) not in world.done
    assert world.sharing.decision and world.ahead.decision


def test_both_are_never_tried_at_once() -> None:
    world = World()
    world.run(400, lambda shares, ahead: 1.0 - 0.03 * ahead - 0.05 * shares)
    first = world.done.index((True, True))
    assert (False, False) in world.done[:first]  # sharing was decided before
    probe = world.done[first - first % BLOCK_STEPS :][: 2 * BLOCK_STEPS]
    assert not any(not shares for shares, _ in probe)


@pytest.mark.parametrize("ahead_s", [0.2, 1.5])
def test_what_costs_is_off_nearly_always(ahead_s: float) -> None:
    world = World()
    total_s = world.run(1000, lambda shares, ahead: 1.0 + 0.3 * (not shares) + ahead_s * ahead)
    assert world.sharing.decision and not world.ahead.decision
    assert total_s < 1.1 * 1000


def test_losing_to_a_static_split_turns_copying_ahead_off_too() -> None:
    world = World()
    world.run(500, lambda shares, ahead: 1.0 - 0.1 * shares - 0.2 * ahead)
    assert world.ahead.decision
    world.run(2000, lambda shares, ahead: 1.0 + 0.2 * shares)
    assert not world.sharing.decision and not world.ahead.decision
    assert world.run(1000, lambda shares, ahead: 1.0 + 0.2 * shares) < 1.02 * 1000
    assert (True, True) not in world.done[-1000:]


def test_what_cannot_gain_is_not_tried() -> None:
    world = World(may_gain=False)
    world.run(2000, lambda shares, ahead: 1.0 - 0.3 * ahead)
    assert not any(ahead for _, ahead in world.done)


def test_without_a_static_split_to_compare_with_copying_ahead_has_its_own_trial() -> None:
    trials, ahead = DeviceTrials(), GainSwitch()
    for _ in range(500):
        trials.record(None, ahead, 2.0 if trials.copies_ahead(None, ahead, True) else 1.0, 0, True)
    assert not ahead.decision
    assert trials.copies_ahead(None, None, True)


def test_a_device_that_computes_no_faster_cannot_gain() -> None:
    assert not may_gain([0.0, 0.0, 0.0], 1e-3)
    assert not may_gain([1e-5, 0.0, 0.0], 1e-3)
    assert not may_gain([5e-6, 3e-6, 0.0], 1e-5), "looking ahead takes longer"
    assert may_gain([5e-4, 3e-4, 0.0], 1e-3)
