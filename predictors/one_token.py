"""A predictor's forecasts for one token in one native call; of several tokens numpy makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_offload._native import Lookahead
from moe_offload.predictors.history import History, LayerOrder
from moe_offload.predictors.routers import Curve

FIRST = -1  # stands for the layer that has routed, before any has
Likely = list[tuple[int, int, int, float]]  # (layers ahead, layer_idx, expert_id, probability)


class OneToken:
    """What the layers ahead probably use, nearest layer and most probable expert first.

    Args:
        history: kept up to date by ``observe``; None where no forecast looks at the past.

    Attributes:
        native: what answers, for native code that asks itself (residency/early_reads.py).
        knows_first: whether it forecasts the first layers from a token's embedding.
    """

    def __init__(
        self, order: LayerOrder, num_experts: int, hidden_size: int, history: History | None = None
    ) -> None:
        self._order, self._remembers = order, history is not None
        self.knows_first = False
        kept = history or History(1, num_experts)
        self.native = Lookahead(hidden_size, kept.previous, kept.frequency, kept.decay)

    def add(
        self, layer_idx: int, later: int, weight: NDArray[Any], bias: Any, top_k: int, curve: Curve
    ) -> None:
        """Forecast ``later`` after ``layer_idx`` has routed (``FIRST``: before), nearest first.

        Args:
            weight: (E, features), float32 or bfloat16 as uint16; see csrc/planning/lookahead.h.
        """
        self.knows_first |= layer_idx == FIRST
        row = self._order.row_of[later] if self._remembers else 0
        self.native.add(layer_idx, later, weight, bias, top_k, curve.slope, curve.offset, row)

    def add_answers(
        self, layer_idx: int, later: int, directions: NDArray[np.float32], answers: NDArray[np.float32]
    ) -> None:
        """Let a forecast that was added count what each chosen expert adds.

        Args:
            directions: (D, H).
            answers: (E, D, E), see ``fitted.Hybrid``.
        """
        self.native.add_answers(layer_idx, later, directions, answers)

    def leave_out(self, slot_tables: Mapping[int, NDArray[np.uint64]]) -> None:
        """Return no expert from now on that has a slot.

        Args:
            slot_tables: by layer, (E, n), the first column 0 where an expert has none; looked at in every
                call. Layers without one: all their experts are returned.
        """
        self.native.leave_out(dict(slot_tables))

    def history_row(self, layer_idx: int) -> int:
        """Return where the history keeps a layer's choices; -1 where nothing is remembered."""
        return self._order.row_of.get(layer_idx, -1) if self._remembers else -1

    def observe(self, layer_idx: int, expert_ids: list[int], weights: list[float]) -> None:
        """Keep a layer's choice, and learn from it how often guesses come true."""
        self.native.chosen(layer_idx, expert_ids)
        if self._remembers:
            self.native.observe(self._order.row_of[layer_idx], expert_ids, weights)

    def likely(
        self, layer_idx: int, hidden: int, expert_ids: list[int], weights: list[float], threshold: float
    ) -> Likely:
        """Return what the next layers use with at least ``threshold`` and ``leave_out`` does not name.

        The probabilities are the predictor's at first, and soon how often such guesses came true.

        Args:
            hidden: address of (hidden_size,) float32, what the layer's router saw.
        """
        return self.native.likely(layer_idx, self._order.depth, hidden, expert_ids, weights, threshold)


def router_rows(weight: Tensor) -> NDArray[Any]:
    """Return a router's weight as ``OneToken.add`` takes it, not copied."""
    rows: NDArray[Any] = (
        weight.view(torch.uint16).numpy() if weight.dtype == torch.bfloat16 else weight.numpy()
    )
    return rows
