"""Ask a predictor along a recorded text, as a run would, and measure what its forecasts are worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from moe_offload.planning.prediction import Forecast, Predictor
from moe_offload.predictors.fit import Recording
from moe_offload.predictors.history import Float32Array, LayerOrder

Place = tuple[int, int]  # (layers ahead, row of the forecast layer); 0 ahead: before any router
BINS = 10
LEAST_CHANCE = 0.05  # what is hardly ever fetched would hide the rest in a calibration error
ASKED_CHANCE = 0.4  # least chance that decoding asks for, about
WANTED_RECALLS = (0.90, 0.95, 0.97, 0.99)


@dataclass(eq=False)
class Evaluation:
    """Forecasts of every token, and what the routers chose.

    Attributes:
        chances: by place, (T, E) float32; zeros where a token had no forecast.
        used: by row, (T, E) bool.
        predict_s: of each time that something was forecast, how long decoding would wait for it.
    """

    used: dict[int, NDArray[np.bool_]]
    chances: dict[Place, Float32Array] = field(default_factory=dict)
    predict_s: list[float] = field(default_factory=list)

    def recall(
        self,
        ahead: int,
        num_guesses: int,
        rows: Sequence[int] | None = None,
        among: NDArray[np.bool_] | None = None,
    ) -> float | None:
        """Return the share of chosen experts among the ``num_guesses`` most probable ones of each layer.

        Args:
            rows: of the forecast layers; None: all that are forecast ``ahead``.
            among: (T, rows, E), the chosen experts that count; None: all of them.
        """
        found = wanted = 0
        for row in self._rows(ahead, rows):
            chances = self.chances[ahead, row]
            used = self.used[row] if among is None else self.used[row] & among[:, row]
            best = np.argpartition(-chances, num_guesses - 1, axis=1)[:, :num_guesses]
            found += int(np.take_along_axis(used, best, axis=1).sum())
            wanted += int(used.sum())
        return found / wanted if wanted else None

    def guesses_for(self, ahead: int, recall: float) -> float | None:
        """Return how many experts a layer step fetches when the least probability is set for ``recall``."""
        rows = self._rows(ahead, None)
        if not rows:
            return None
        chances = np.concatenate([self.chances[ahead, row].reshape(-1) for row in rows])
        used = np.concatenate([self.used[row].reshape(-1) for row in rows])
        order = np.argsort(-chances, kind="stable")
        covered = np.cumsum(used[order])
        fetched = int(np.searchsorted(covered, recall * covered[-1])) + 1
        return fetched / sum(len(self.used[row]) for row in rows)

    def reliability(self, ahead: int) -> list[tuple[float, float, int]]:
        """Return, for bins of forecast probability, (mean probability, share that was used, count)."""
        rows = self._rows(ahead, None)
        if not rows:
            return []
        chances = np.concatenate([self.chances[ahead, row].reshape(-1) for row in rows])
        used = np.concatenate([self.used[row].reshape(-1) for row in rows])
        chances, used = chances[chances >= LEAST_CHANCE], used[chances >= LEAST_CHANCE]
        bins = np.minimum((chances * BINS).astype(int), BINS - 1)
        chosen = [bins == number for number in range(BINS)]
        return [(float(chances[i].mean()), float(used[i].mean()), int(i.sum())) for i in chosen if i.any()]

    def calibration_error(self, ahead: int) -> float | None:
        """Return the expected calibration error over experts forecast at LEAST_CHANCE or more."""
        bins = self.reliability(ahead)
        count = sum(number for _, _, number in bins)
        return sum(abs(mean - share) * number for mean, share, number in bins) / count if count else None

    def _rows(self, ahead: int, rows: Sequence[int] | None) -> list[int]:
        return [row for distance, row in self.chances if distance == ahead and (rows is None or row in rows)]


def evaluate(
    predictor: Predictor,
    recording: Recording,
    num_experts: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run the protocol token by token over ``recording``, with one torch thread, as decoding has it."""
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _evaluate(predictor, recording, num_experts, on_progress)
    finally:
        torch.set_num_threads(torch_threads)


def _evaluate(
    predictor: Predictor,
    recording: Recording,
    num_experts: int,
    on_progress: Callable[[int, int], None] | None,
) -> Evaluation:
    order = LayerOrder(recording.layers, len(recording.layers))
    used = {row: _one_hot(recording.experts[:, row], num_experts) for row in range(len(order.layers))}
    result = Evaluation(used)
    starts = set(np.concatenate([[0], np.cumsum(recording.seq_len)[:-1]]).tolist())
    inputs = from_numpy(recording.router_inputs)
    for token in range(recording.num_tokens):
        if token in starts:
            predictor.new_sequence()
        here = slice(token, token + 1)
        for forecast in predictor.begin_step(recording.token_ids[here]):
            if order.row_of[forecast.layer_idx] == 0:
                _note(result, recording.num_tokens, token, 0, 0, forecast)
        for row, layer_idx in enumerate(order.layers):
            chosen = recording.experts[here, row], recording.weights[here, row]
            router_input = inputs[here, row].float()
            predictor.observe(layer_idx, *chosen)
            started = time.perf_counter()
            forecasts = predictor.predict(layer_idx, router_input, *chosen)
            if forecasts:
                took_s = time.perf_counter() - started
                natively_s = _asking_natively_s(predictor, layer_idx, router_input, *chosen)
                result.predict_s.append(took_s if natively_s is None else natively_s)
            for forecast in forecasts:
                later = order.row_of[forecast.layer_idx]
                _note(result, recording.num_tokens, token, later - row, later, forecast)
        if on_progress is not None and token % 64 == 0:
            on_progress(token, recording.num_tokens)
    return result


def _asking_natively_s(
    predictor: Predictor,
    layer_idx: int,
    router_input: Tensor,
    expert_ids: NDArray[np.int64],
    expert_weights: Float32Array,
) -> float | None:
    """Return how long the call takes that decoding makes for one token; None: it makes ``predict``."""
    one_token = getattr(predictor, "one_token", None)
    if one_token is None:
        return None
    hidden = router_input.contiguous()
    arguments = hidden.data_ptr(), expert_ids[0].tolist(), expert_weights[0].tolist(), ASKED_CHANCE
    started = time.perf_counter()
    one_token.likely(layer_idx, *arguments)
    return time.perf_counter() - started


def summarize(evaluation: Evaluation, top_k: int, expert_bytes: float, depth: int) -> dict[str, Any]:
    """Return JSON: recall, over-fetch in experts and bytes per layer step, calibration, cost."""
    ahead_rows: dict[str, Mapping[str, Any]] = {}
    for ahead in range(depth + 1):
        recall = evaluation.recall(ahead, top_k)
        if recall is None:
            continue
        guesses = {str(wanted): evaluation.guesses_for(ahead, wanted) for wanted in WANTED_RECALLS}
        rows = sorted(row for distance, row in evaluation.chances if distance == ahead)
        ahead_rows[str(ahead)] = {
            "recall": recall,
            "recall_beyond_layer_0": evaluation.recall(ahead, top_k, [row for row in rows if row > ahead]),
            "recall_plus_2": evaluation.recall(ahead, top_k + 2),
            "recall_double": evaluation.recall(ahead, 2 * top_k),
            "guesses_for_recall": guesses,
            "bytes_for_recall": {k: None if v is None else v * expert_bytes for k, v in guesses.items()},
            "calibration_error": evaluation.calibration_error(ahead),
            "recall_by_layer": {row: evaluation.recall(ahead, top_k, [row]) for row in rows},
        }
    durations = np.array(evaluation.predict_s) * 1e6
    cost = [float(q) for q in np.percentile(durations, (50, 10, 90))] if len(durations) else None
    return {"ahead": ahead_rows, "predict_us": cost}


def _note(result: Evaluation, num_tokens: int, token: int, ahead: int, row: int, forecast: Forecast) -> None:
    if (ahead, row) not in result.chances:
        result.chances[ahead, row] = np.zeros((num_tokens, len(forecast.probabilities)), np.float32)
    result.chances[ahead, row][token] = forecast.probabilities


def _one_hot(experts: NDArray[np.int64], num_experts: int) -> NDArray[np.bool_]:
    used = np.zeros((len(experts), num_experts), bool)
    np.put_along_axis(used, experts, True, axis=1)
    return used
