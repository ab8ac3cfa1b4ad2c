"""How fast link, layers and predictions are, and what layers need: measured while a prefetcher works."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from moe_offload.planning.correction import RunningCorrection

REST_AFTER_STEPS = 64  # a few tokens
MEASURE_EVERY_STEPS = 32  # layer steps between two looks at the link's counters and the waste
SMOOTHING = 0.2  # of measured windows
BEST_SPEED_KEPT = 0.98  # a link is as fast as it was with much to do; with little it is waited for
DISK_RATE, LINK_RATE = "disk_bytes_per_s", "link_bytes_per_s"  # names in a RunningCorrection
SUBMIT_S = 2e-5  # compute time that asking for a read takes, until it is measured
EXPECTED_RECALL = 0.7  # share of a layer's needs that a prediction finds, for judging what it is worth
PROBE_EVERY = 16  # a prediction that is not worth its cost is made all the same now and then

LinkCounters = Callable[[], tuple[int, float]]  # bytes read so far, seconds in which something was being read


class Pace:
    """Measured figures, smoothed; what is expected stands in until there are any.

    Args:
        link: counters of the reader; None: nothing is known of its speed.
        speeds: what to expect of the link and of a layer ("layer_s"), and where the measurements go.

    Attributes:
        window_s: a layer's compute time; inf: not known.
        bytes_per_s: of the link.
        read_s: an expert's read, as they come.
        submit_s: what asking for a read takes from computing.
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
        self.window_s = self._speeds.get("layer_s")
        self.read_s = math.inf
        self.submit_s = SUBMIT_S
        self.now = 0.0
        self._predict_s = 0.0  # with planning its reads
        self._submitting_s = 0.0  # in the prediction under way
        self._last_look: tuple[float, float] | None = None  # (time, stall_s so far) of the last layer step
        self._link_seen = (0, 0.0)
        self._steps = 0
        self._steps_without_need = 0
        self._needs_seen = -1
        self._needs: dict[int, float] = {}  # by layer: experts of a step that are not resident, smoothed
        self._next_layer: dict[int, int] = {}  # as steps have shown
        self._last_layer = -1
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
        return self.window_s * self.bytes_per_s

    @property
    def mean_needs(self) -> float | None:
        """Experts that a layer's step needs and that are not resident; None before any step."""
        return sum(self._needs.values()) / len(self._needs) if self._needs else None

    def begin_step(self) -> None:
        """Forget where the last forward pass ended."""
        self._last_look = None
        self._last_layer = -1

    def rest(self) -> None:
        """Nobody looks at what layers need for a while."""
        self._needs_seen = -1

    def rests(self, layer_idx: int, needs: int) -> bool:
        """Note what the layer needed; whether for long no layer needed what was not resident.

        Args:
            needs: that were not resident, so far.
        """
        new = needs - self._needs_seen if self._needs_seen >= 0 else 1
        self._needs_seen = needs
        before = self._needs.get(layer_idx)
        self._needs[layer_idx] = new if before is None else before + SMOOTHING * (new - before)
        if self._last_layer >= 0:
            self._next_layer[self._last_layer] = layer_idx
        self._last_layer = layer_idx
        self._steps_without_need = 0 if new else self._steps_without_need + 1
        return self._steps_without_need > REST_AFTER_STEPS

    def look(self, stall_s: float) -> bool:
        """Bring the window's compute time up to date; whether it is time to measure the link.

        Args:
            stall_s: waited for experts, so far.
        """
        self.now = now = self.clock()
        if self._last_look is not None:
            window_s = max(1e-6, now - self._last_look[0] - (stall_s - self._last_look[1]))
            known = self.window_s < math.inf
            self.window_s = self.window_s + SMOOTHING * (window_s - self.window_s) if known else window_s
            self._speeds.note("layer_s", self.window_s)
        self._last_look = (now, stall_s)
        self._steps += 1
        return self.link is not None and self._steps % MEASURE_EVERY_STEPS == 0

    def measure_link(self, expert_bytes: int) -> bool:
        """Bring the link's speed up to date; whether it has read since the last time."""
        assert self.link is not None
        bytes_read, busy_s = self.link()
        new_bytes, new_s = bytes_read - self._link_seen[0], busy_s - self._link_seen[1]
        self._link_seen = (bytes_read, busy_s)
        if new_bytes <= 0 or new_s <= 0:
            return False
        speed = new_bytes / new_s
        best = self.bytes_per_s * BEST_SPEED_KEPT
        self.bytes_per_s = speed if best == math.inf else max(speed, best)
        self._speeds.note(self._rate, self.bytes_per_s)
        self.read_s = expert_bytes / speed
        return True

    def is_worth_predicting(self, layer_idx: int) -> bool:
        """Whether the stall that a prediction may save is above the time that it takes."""
        needs = self._needs.get(self._next_layer.get(layer_idx, -1))
        if needs is None or self._steps % PROBE_EVERY == 0:
            return True
        return EXPECTED_RECALL * needs * (self.read_s - self.submit_s) > self._predict_s

    def predicting(self) -> None:
        """Note that a prediction begins, which began to cost at the last look."""
        self._submitting_s = 0.0

    def predicted(self) -> None:
        """Note that the prediction was made and its reads were asked for."""
        predict_s = self.clock() - self.now - self._submitting_s
        self._predict_s += SMOOTHING * (predict_s - self._predict_s)

    def submitted(self, started: float, num_reads: int) -> None:
        """Note that ``num_reads`` were asked for since ``started``."""
        submit_s = (self.clock() - started) / num_reads
        self.submit_s += SMOOTHING * (submit_s - self.submit_s)
        self._submitting_s = submit_s * num_reads
