"""How fast link, layers and predictions are, and what layers need: measured while a prefetcher works."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from moe_offload._native import LayerPace
from moe_offload.planning.correction import RunningCorrection

MEASURE_EVERY_STEPS = 32  # layer steps between two looks at the link's counters and the waste
BEST_SPEED_KEPT = 0.98  # a link is as fast as it was with much to do; with little it is waited for
DISK_RATE, LINK_RATE = "disk_bytes_per_s", "link_bytes_per_s"  # names in a RunningCorrection
SMOOTHING = 0.2  # of the share of a step that the link is busy
SUBMIT_S = 2e-5  # compute time that asking for a read takes, until it is measured

LinkCounters = Callable[[], tuple[int, float]]  # bytes read so far, seconds in which something was being read


class Pace:
    """Measured figures, smoothed; what is expected stands in until there are any.

    Args:
        link: counters of the reader; None: nothing is known of its speed.
        speeds: what to expect of the link and of a layer ("layer_s"), and where the measurements go.

    Attributes:
        layers: of layer steps and predictions (planning/layer_pace.py); native code keeps it up to date too.
        bytes_per_s: of the link.
        busy_share: of a step, that the link takes for what steps need, guessed or not.
        now: when the last layer step was looked at.
    """

    def __init__(
        self,
        link: LinkCounters | None,
        speeds: RunningCorrection | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self._speeds = speeds or RunningCorrection()
        self.layers = LayerPace(self._speeds.get("layer_s"), SUBMIT_S)
        self.now = 0.0
        self._submitting_s = 0.0  # in the prediction under way
        self._link_seen = (0, 0.0)
        self._measured_at = 0  # number of layer steps
        self.busy_share = 0.0
        self._needs_at: tuple[int, int, float] | None = None  # bytes needed, layer steps, stall, so far
        self._needs_seen = -1
        self.turn_to(link, DISK_RATE)

    def turn_to(self, link: LinkCounters | None, rate: str) -> None:
        """Measure another link, whose speed is called ``rate``."""
        self.link, self._rate = link, rate
        self.bytes_per_s = self._speeds.get(rate)

    def use(self, link: LinkCounters | None) -> None:
        """Measure the same kind of link by other counters."""
        self.turn_to(link, self._rate)

    @property
    def window_bytes(self) -> float:
        """What the link brings while a layer computes."""
        return self.layers.window_s * self.bytes_per_s

    def rest(self) -> None:
        """Nobody looks at what layers need for a while."""
        self._needs_seen, self._needs_at = -1, None

    def rests(self, layer_idx: int, needs: int) -> bool:
        """Note what the layer needed; whether for long no layer needed what was not resident.

        Args:
            needs: that were not resident, so far.
        """
        new = needs - self._needs_seen if self._needs_seen >= 0 else 1
        self._needs_seen = needs
        return self.layers.rests(layer_idx, new)

    def look(self, stall_s: float) -> None:
        """Bring the window's compute time up to date.

        Args:
            stall_s: waited for experts, so far.
        """
        self.now = self.clock()
        self.layers.look(self.now, stall_s)

    @property
    def is_time_to_measure(self) -> bool:
        """Whether enough layer steps were made since ``measure_link``."""
        return self.link is not None and self.layers.num_steps - self._measured_at >= MEASURE_EVERY_STEPS

    def measure_link(self, expert_bytes: int) -> bool:
        """Bring the link's speed up to date; whether it has read since the last time."""
        assert self.link is not None
        self._measured_at = self.layers.num_steps
        if self.layers.window_s < math.inf:
            self._speeds.note("layer_s", self.layers.window_s)
        bytes_read, busy_s = self.link()
        new_bytes, new_s = bytes_read - self._link_seen[0], busy_s - self._link_seen[1]
        self._link_seen = (bytes_read, busy_s)
        if new_bytes <= 0 or new_s <= 0:
            return False
        speed = new_bytes / new_s
        best = self.bytes_per_s * BEST_SPEED_KEPT
        self.bytes_per_s = speed if best == math.inf else max(speed, best)
        self._speeds.note(self._rate, self.bytes_per_s)
        self.layers.read_s = expert_bytes / speed
        return True

    def measure_needs(self, needed_bytes: int, stall_s: float) -> None:
        """Bring ``busy_share`` up to date; pauses between tokens do not count.

        Args:
            needed_bytes: that decoding steps read and used, so far.
            stall_s: waited for experts, so far.
        """
        before, self._needs_at = self._needs_at, (needed_bytes, self.layers.num_steps, stall_s)
        if before is None:
            return
        computed_s = (self._needs_at[1] - before[1]) * self.layers.window_s
        step_s = computed_s + self._needs_at[2] - before[2]
        if 0.0 < step_s < math.inf:
            share = min(1.0, max(0.0, (needed_bytes - before[0]) / self.bytes_per_s / step_s))
            self.busy_share += SMOOTHING * (share - self.busy_share)

    def predicting(self) -> None:
        """Note that a prediction begins, which began to cost at the last look."""
        self._submitting_s = 0.0

    def predicted(self) -> None:
        """Note that the prediction was made and its reads were asked for."""
        self.layers.predicted(self.clock() - self.now - self._submitting_s)

    def submitted(self, started: float, num_reads: int) -> None:
        """Note that ``num_reads`` were asked for since ``started``."""
        self._submitting_s = self.clock() - started
        self.layers.submitted(self._submitting_s, num_reads)
