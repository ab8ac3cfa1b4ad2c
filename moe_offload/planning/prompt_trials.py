"""Whether a prompt's experts are shared as the scheduler says, or computed as a static split leaves them.

A token's step begins as a static split, since what is copied for it replaces something. What a prompt's
layer copies goes to lent slots, and while the device is empty a static split leaves all of it to the CPU: so
prompts are shared from the first layer on. Doubt, and with it trials, begins only when layers take longer
than a static split is expected to (CPU and device may take from one another what each had alone when it was
measured): where the device is far ahead, a trial alone would cost more than it could ever find. Pure.
"""

from __future__ import annotations

import statistics
from collections import deque

from moe_offload.planning.gain_switch import GainSwitch

RECENT_LAYERS = 4  # whose median says whether there is doubt


class _LayersSwitch(GainSwitch):
    """Compares layers: one leaves nothing behind that the next would have to settle from."""

    def _num_settling(self) -> int:
        return 0


class PromptTrials:
    """``record`` every layer of a prompt; times count as shares of what a static split is expected to take.

    So layers of any number of experts and tokens, and of any share on the device, compare. Once in doubt, a
    static split is what is done until probes decide.
    """

    def __init__(self) -> None:
        self._switch = _LayersSwitch(begins_on=False)
        self._recent: deque[float] = deque(maxlen=RECENT_LAYERS)  # of shared layers
        self._is_doubted = False

    @property
    def is_on(self) -> bool:
        """Whether the next layer is shared."""
        return self._switch.is_on if self._is_doubted else True

    def record(self, seconds: float, static_s: float) -> None:
        """Take note of a layer that was done with ``is_on`` as it is.

        Args:
            static_s: what a static split is expected to take.
        """
        share = seconds / static_s
        if self.is_on:
            self._recent.append(share)
        if self._is_doubted:
            self._switch.record(share)
        is_settled = self._switch.decision and not self._switch.is_trying
        if is_settled or not self._is_doubted:
            is_known = len(self._recent) == RECENT_LAYERS
            self._is_doubted = is_known and statistics.median(self._recent) > 1.0

    def describe(self) -> str:
        """Return what was decided and why; nothing where nothing was in doubt."""
        found = self._switch.gain is not None
        return f"prompts {self._switch.describe('a static split')}" if found else ""
