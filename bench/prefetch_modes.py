"""The modes that bench/prefetch.py compares: predictors, switches and thresholds for a model's prefetcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODES = ("none", "fate", "history", "ours", "always", "perfect")
PERFECT_DEPTH = 4  # layers ahead


def settings_of(model: Any, run: Callable[[], Any]) -> dict[str, Callable[[], None]]:
    """Return for each mode what sets the model's prefetcher to it, with the mode's own state.

    Args:
        run: generates the text that all modes will; what it routes to is what ``perfect`` knows.
    """
    from moe_offload.planning.prefetch_plan import Threshold
    from moe_offload.planning.prefetch_switch import PrefetchSwitch
    from moe_offload.predictors.cross_layer_gate import CrossLayerGate
    from moe_offload.runtime import skeleton
    from moe_offload.runtime.predictor_choice import PredictorChoice
    from moe_offload.runtime.predictor_making import make_predictor

    prefetcher = model.offload.prefetcher
    link, default = prefetcher.link, prefetcher._predictor
    layers = sorted(skeleton.experts_modules(model))
    routers = {i: skeleton.router_of(model, i) for i in layers}
    history = make_predictor(PredictorChoice("previous_token"), model, layers)

    def setting(predictor: Any, **kwargs: Any) -> Callable[[], None]:
        def apply() -> None:
            prefetcher.use(predictor, **kwargs)
            if predictor is not None:
                predictor.new_sequence()

        return apply

    with model.offload.trace() as recorder:
        prefetcher.use(None, switch=None)
        run()
    trace = recorder.trace()
    perfect = Recorded(trace.experts, trace.layers, trace.num_experts, trace.step_tokens.tolist())
    return {
        "none": setting(None, switch=None),
        "fate": setting(CrossLayerGate(routers), switch=None, threshold=Fixed()),
        "history": setting(history, switch=None, threshold=Threshold(), link=link),
        "ours": setting(default, switch=PrefetchSwitch(), threshold=Threshold(), link=link),
        "always": setting(default, switch=None, threshold=Threshold(), link=link),
        "perfect": setting(perfect, switch=None, threshold=Fixed(), link=link),
    }


class Recorded:
    """The oracle: forecasts what an earlier identical run recorded, 1.0 or 0.0."""

    def __init__(
        self, experts: NDArray[Any], layers: Sequence[int], num_experts: int, passes: list[int]
    ) -> None:
        """``experts`` (T, L, K) of all passes, ``passes`` their lengths in tokens."""
        self._layers, self._position = list(layers), {layer: i for i, layer in enumerate(layers)}
        self._used = np.zeros((len(passes), len(layers), num_experts), np.float32)
        start = 0
        for number, length in enumerate(passes):
            for token in experts[start : start + length]:
                self._used[number, np.arange(len(layers))[:, None], token] = 1.0
            start += length
        self._pass = -1
        self.one_token = self  # answers as predictors/one_token.py does

    def new_sequence(self) -> None:
        self._pass = -1

    def first_input(self, token_ids: Any) -> Any:
        """Tell the next pass; of a tensor nothing is wanted but an address."""
        import torch

        self._pass += 1
        return torch.empty(0)

    def begin_step(self, token_ids: Any) -> list[Any]:
        self._pass += 1
        return self._ahead(-1)

    def observe(self, layer_idx: int, expert_ids: Any, expert_weights: Any) -> None:
        """It knows already."""

    def predict(self, layer_idx: int, *known: Any) -> list[Any]:
        return self._ahead(self._position[layer_idx])

    def likely(self, layer_idx: int, *known: Any) -> list[tuple[int, int, int, float]]:
        """Return the routes of the next layers, -1: of the first ones."""
        position = -1 if layer_idx < 0 else self._position[layer_idx]
        return [
            (windows, forecast.layer_idx, expert_id, 1.0)
            for windows, forecast in enumerate(self._ahead(position), start=1)
            for expert_id in np.flatnonzero(forecast.probabilities).tolist()
        ]

    def _ahead(self, position: int) -> list[Any]:
        """Return the next layers' routes; after the last layer come the next token's."""
        from moe_offload.planning.prediction import Forecast

        forecasts, count = [], len(self._layers)
        for ahead in range(1, PERFECT_DEPTH + 1):
            passes, layer = divmod(position + ahead, count)
            if self._pass + passes < len(self._used):
                forecasts.append(Forecast(self._layers[layer], self._used[self._pass + passes, layer]))
        return forecasts


class Fixed:
    """A threshold that stays where it is."""

    value = 0.5

    def skip(self, *known: Any) -> None:
        """Nothing is counted."""

    def update(self, *known: Any, **named: Any) -> None:
        """Nothing moves it."""
