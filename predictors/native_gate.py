"""A router asked for one token's probabilities in one native call: numpy's calls are what decode pays for."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_offload._native import gate_chances
from moe_offload.predictors.one_token import router_rows
from moe_offload.predictors.routers import Curve, RouterScores


class NativeGate:
    """``routers.probabilities`` of a router's scores for one token, for routers that rank by logits.

    The weights are the router's own, not copied.
    """

    def __init__(self, router: RouterScores, curve: Curve) -> None:
        weight, bias = router.linear_weight, router.linear_bias
        assert weight is not None, "this router does not rank by its logits"
        self._hidden_size = router.hidden_size
        self._chances = partial(
            gate_chances,
            weight=router_rows(weight),
            bias=None if bias is None else bias.float().numpy(),
            top_k=router.top_k,
            slope=curve.slope,
            offset=curve.offset,
        )

    @staticmethod
    def serves(router: RouterScores) -> bool:
        """Whether a router can be asked in this way."""
        weight: Any = router.linear_weight
        return (
            weight is not None
            and weight.dtype in (torch.float32, torch.bfloat16)
            and weight.is_contiguous()
            and router.top_k < router.num_experts
        )

    def __call__(self, router_input: Tensor) -> NDArray[np.float32]:
        """(1, H) -> (E,)"""
        hidden = router_input.detach().float().contiguous()
        assert hidden.numel() == self._hidden_size, f"{tuple(hidden.shape)} for {self._hidden_size} channels"
        chances: NDArray[np.float32] = self._chances(hidden.data_ptr())
        return chances
