"""Prompts are shared from the first layer on, and no longer where a static split turned out to be faster."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from moe_offload.planning.prompt_trials import RECENT_LAYERS, PromptTrials

Share = Callable[[bool], float]  # of what a static split is expected to take, by whether a layer is shared


def run(trials: PromptTrials, num_layers: int, share: Share, seed: int = 0) -> list[bool]:
    """Return what was done in layers of all sizes; what they take wanders by a few percent."""
    generator, done = random.Random(seed), list[bool]()
    for _ in range(num_layers):
        static_s = 10.0 ** generator.uniform(-4, -1)
        done.append(trials.is_on)
        trials.record(static_s * share(trials.is_on) * generator.uniform(0.97, 1.03), static_s)
    return done


@pytest.mark.parametrize("shared", [0.1, 0.6, 0.9])
def test_what_is_faster_than_a_static_split_is_expected_to_be_is_never_doubted(shared: float) -> None:
    """A static split would take ten times as long as was expected; nobody finds out."""
    trials = PromptTrials()
    assert all(run(trials, 1000, lambda is_shared: shared if is_shared else 10.0))
    assert trials.describe() == ""


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shared", [1.2, 1.6, 4.0])
def test_what_is_slower_than_a_static_split_is_not_done(shared: float, seed: int) -> None:
    trials = PromptTrials()
    first = run(trials, RECENT_LAYERS, lambda is_shared: shared if is_shared else 1.0, seed)
    assert all(first), "it begins shared"
    run(trials, 60, lambda is_shared: shared if is_shared else 1.0, seed)
    assert "prompts off: it costs" in trials.describe() or not trials.is_on
    later = run(trials, 400, lambda is_shared: shared if is_shared else 1.0, seed)
    assert sum(later) < 0.1 * len(later), "but for trials"


@pytest.mark.parametrize("seed", range(5))
def test_where_a_static_split_takes_longer_than_expected_layers_stay_shared(seed: int) -> None:
    """Both wait for a disk, say, of which nothing was expected."""
    done = run(PromptTrials(), 400, lambda is_shared: 3.0 if is_shared else 3.6, seed)
    assert 0.8 * len(done) < sum(done) < len(done), "in doubt it was tried"


def test_a_trial_ends_when_doubt_has_gone() -> None:
    """Once it rests, no other begins; what was found still counts."""
    trials = PromptTrials()
    run(trials, 100, lambda is_shared: 1.3 if is_shared else 2.0)
    assert trials.describe().startswith("prompts on: it saves")
    assert all(run(trials, 400, lambda is_shared: 0.5 if is_shared else 1.0)[100:])


def test_what_was_slower_and_is_not_any_more_is_done_again() -> None:
    trials = PromptTrials()
    run(trials, 100, lambda is_shared: 1.5 if is_shared else 1.0)
    assert not trials.is_on or "off" in trials.describe()
    assert all(run(trials, 1500, lambda is_shared: 0.5 if is_shared else 1.0)[-400:])
