"""What looking ahead costs and may save, from layer step to layer step: on numbers only.

The reference of csrc/planning/layer_pace.h, which the prefetcher uses: both do the same arithmetic.
"""

from __future__ import annotations

import math

REST_AFTER_STEPS = 64  # a few tokens
SMOOTHING = 0.2  # of measured seconds and needs
EXPECTED_RECALL = 0.7  # share of a layer's needs that a prediction finds, for judging what it is worth
PROBE_EVERY = 16  # a prediction that is not worth its cost is made all the same now and then
LEAST_WINDOW_S = 1e-6


class LayerPace:
    """Smoothed figures of layer steps.

    Attributes:
        window_s: a layer's compute time; inf: not known.
        submit_s: what asking for a read takes from computing.
        read_s: an expert's read, as they come.
        predict_s: what a prediction takes, with planning its reads.
        num_steps: layer steps looked at.
    """

    def __init__(self, window_s: float, submit_s: float) -> None:
        self.window_s, self.submit_s = window_s, submit_s
        self.read_s, self.predict_s = math.inf, 0.0
        self.num_steps = 0
        self._last_look: tuple[float, float] | None = None  # (time, stall_s so far)
        self._steps_without_need, self._last_layer = 0, -1
        self._needs: dict[int, float] = {}  # by layer: experts of a step that are not resident
        self._next_layer: dict[int, int] = {}  # as steps have shown

    def begin_step(self) -> None:
        """Forget where the last forward pass ended."""
        self._last_look, self._last_layer = None, -1

    def rests(self, layer_idx: int, needs: int) -> bool:
        """Note what the layer needed that was not resident; whether for long no layer needed any."""
        before = self._needs.get(layer_idx)
        self._needs[layer_idx] = needs if before is None else before + SMOOTHING * (needs - before)
        if self._last_layer >= 0:
            self._next_layer[self._last_layer] = layer_idx
        self._last_layer = layer_idx
        self._steps_without_need = 0 if needs else self._steps_without_need + 1
        return self._steps_without_need > REST_AFTER_STEPS

    def look(self, now: float, stall_s: float) -> None:
        """Bring the window's compute time up to date.

        Args:
            stall_s: waited for experts, so far.
        """
        if self._last_look is not None:
            new_s = max(LEAST_WINDOW_S, now - self._last_look[0] - (stall_s - self._last_look[1]))
            known = self.window_s < math.inf
            self.window_s = self.window_s + SMOOTHING * (new_s - self.window_s) if known else new_s
        self._last_look = now, stall_s
        self.num_steps += 1

    def is_worth_predicting(self, layer_idx: int) -> bool:
        """Whether the stall that a prediction may save is above the time that it takes."""
        needs = self._needs.get(self._next_layer.get(layer_idx, -1))
        if needs is None or self.num_steps % PROBE_EVERY == 0:
            return True
        return EXPECTED_RECALL * needs * (self.read_s - self.submit_s) > self.predict_s

    def predicted(self, seconds: float) -> None:
        """Note what a prediction took, its reads not counted."""
        self.predict_s += SMOOTHING * (seconds - self.predict_s)

    def submitted(self, seconds: float, num_reads: int) -> None:
        """Note what asking for ``num_reads`` took."""
        self.submit_s += SMOOTHING * (seconds / num_reads - self.submit_s)

    def mean_needs(self) -> float | None:
        """Return the experts that a layer's step needs and that are not resident; None before any step."""
        in_order = [self._needs[layer_idx] for layer_idx in sorted(self._needs)]
        return sum(in_order) / len(in_order) if in_order else None
