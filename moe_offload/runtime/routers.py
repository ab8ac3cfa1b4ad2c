"""A layer's router as one call: (T, H) -> (logits, weights (T, K), expert ids (T, K)).

transformers' routers live beside their experts under several names, and some take the block's
correction bias as an argument. They are used for prediction and for traces, never for the choice itself.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from moe_offload.errors import CheckpointError

ROUTER_NAMES = ("gate", "router")
BLOCK_ARGUMENTS = ("e_score_correction_bias", "expert_bias")  # what some routers take from their block


class BoundRouter(nn.Module):
    """A router with its block's arguments filled in; shares every weight, owns none."""

    def __init__(self, router: Any, weight: nn.Parameter, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.weight = weight
        self._call = (router, arguments)  # in a tuple, so that the router is no child
        for name, value in arguments.items():
            if name in BLOCK_ARGUMENTS and isinstance(value, Tensor):
                self.e_score_correction_bias = value

    def forward(self, hidden_states: Tensor) -> Any:
        router, arguments = self._call
        return router.forward(hidden_states, **arguments)  # not __call__: hooks are the model's


def router_in(layer: nn.Module, layer_idx: int, top_k: int) -> Any:
    """Return the router of a decoder layer.

    Raises:
        CheckpointError: there is none that chooses from its input alone.
    """
    block, router = _find(layer, layer_idx)
    arguments = _block_arguments(block, router, layer_idx)
    weight = getattr(router, "weight", None)
    if arguments or weight is None:
        weight = weight if weight is not None else _only_matrix(router)
        router = BoundRouter(router, weight, arguments)
    _check(router, layer_idx, top_k)
    return router


def _find(layer: nn.Module, layer_idx: int) -> tuple[nn.Module, Any]:
    for module in layer.modules():
        children = dict(module.named_children())
        if any(hasattr(child, "_apply_gate") for child in children.values()):
            for name in ROUTER_NAMES:
                if name in children:
                    return module, children[name]
    raise CheckpointError(f"layer {layer_idx} has experts but no router named {' or '.join(ROUTER_NAMES)}")


def _block_arguments(block: nn.Module, router: Any, layer_idx: int) -> dict[str, Any]:
    _, *others = inspect.signature(router.forward).parameters.values()
    arguments: dict[str, Any] = {}
    for parameter in others:
        if parameter.name in BLOCK_ARGUMENTS:
            arguments[parameter.name] = getattr(block, parameter.name, None)
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            raise CheckpointError(f"the router of layer {layer_idx} needs {parameter.name} to choose experts")
    return arguments


def _only_matrix(router: nn.Module) -> nn.Parameter:
    matrices = [parameter for parameter in router.parameters() if parameter.ndim == 2]
    if len(matrices) != 1:
        raise CheckpointError(f"{type(router).__name__} has {len(matrices)} matrices, one is wanted")
    return matrices[0]


def _check(router: Any, layer_idx: int, top_k: int) -> None:
    """Try it on one token: the answer must name ``top_k`` experts."""
    probe = torch.zeros(1, router.weight.shape[-1], dtype=router.weight.dtype, device=router.weight.device)
    try:
        with torch.no_grad():
            answer = router.forward(probe)
    except ValueError as error:  # afmoe's wants (B, T, H)
        raise CheckpointError(
            f"{type(router).__name__} of layer {layer_idx} cannot be asked about (T, H): {error}"
        ) from error
    if not (isinstance(answer, tuple) and len(answer) == 3 and answer[2].shape == (1, top_k)):
        raise CheckpointError(f"{type(router).__name__} of layer {layer_idx} does not name {top_k} experts")
