"""Prefetching is on unless it clearly costs: a GainSwitch that asks for proof of a loss, not of a gain.

A step's time varies by a fifth with text and machine, so probes of a few steps cannot tell a gain of 1% from
a loss of 1% within thousands of steps. What they cost is certain. So a tie counts as on, a loss has to be
clear or to stay over many probes, and where nothing speaks against it probes become very rare.
"""

from __future__ import annotations

from typing import NamedTuple

from moe_offload.planning.gain_switch import (
    BLOCK_STEPS,
    FIRST_REST_STEPS,
    LONGEST_REST_STEPS,
    TRIAL_SHARE,
    GainSwitch,
)

# Measured at half of the experts (tiny-qwen3-moe): steps without prefetching use what those before have read
# for nothing, so a block of them is faster by 2% than going on without would be; who begins to prefetch again
# is slower by 7% in the first step and by 2% in the next three.
LEFT_BY_PREFETCH, SETTLING_STEPS = 0.02, 4
ALLOWED_LOSS = 0.02  # of a step: what it may cost and be done
MOST_PROBES = 24
UNCLEAR_LOSS = -0.03  # beyond ALLOWED_LOSS, by the mean of MOST_PROBES
UNCLEAR_REST_STEPS = 32  # between probes that speak against it and are not clear
LONGEST_REST_ON_STEPS = 2048


class Findings(NamedTuple):
    """Whether prefetching pays, and what share of a step's time it saves."""

    pays: bool
    gain: float


class PrefetchSwitch(GainSwitch):
    """On until probes show a loss of more than ALLOWED_LOSS; on again as soon as their mean shows none."""

    _most_probes = MOST_PROBES
    _in_favour = LEFT_BY_PREFETCH + ALLOWED_LOSS

    @property
    def findings(self) -> Findings | None:
        """What probes have shown so far; None before they have."""
        return None if self.gain is None else Findings(self.decision, self.gain)

    def begin_with(self, findings: Findings) -> None:
        """Go on from what an earlier run found, before any step: its trial need not be made again."""
        self.is_on = self.decision = findings.pays
        self.gain = findings.gain
        self._resting = FIRST_REST_STEPS

    def _num_settling(self) -> int:
        return SETTLING_STEPS if self.is_on else 1

    def _decide(self) -> None:
        worth, clear = self._estimate()
        if self.decision:
            decision = worth > (0.0 if clear else UNCLEAR_LOSS)
            waits = not decision and not clear and len(self._probes) < MOST_PROBES
        else:
            decision, waits = worth > 0.0, False
        if waits:
            self._resting = UNCLEAR_REST_STEPS
            return
        changes, self.decision = decision != self.decision, decision
        self._rest(agrees=self.gain is not None and not changes, gain=worth)
        if changes:
            self._probes.clear()

    def _rest(self, *, agrees: bool, gain: float) -> None:
        """Rest longer and longer as long as probes agree; ``gain``: with ALLOWED_LOSS.

        What was done may have changed its worth where the last probe disagrees with those before.
        """
        self.gain = gain - ALLOWED_LOSS
        if not agrees or (self._differences()[-1] > 0.0) is not self.decision:
            self._resting = self._rest_steps = FIRST_REST_STEPS
            return
        longest = LONGEST_REST_ON_STEPS if self.decision else LONGEST_REST_STEPS
        self._rest_steps = min(2 * self._rest_steps, longest)
        cost_steps = len(self._probes) * BLOCK_STEPS * abs(gain)
        self._resting = max(self._rest_steps, min(longest, int(cost_steps / TRIAL_SHARE)))
