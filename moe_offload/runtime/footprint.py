"""What a loaded model holds in memory, and giving it back when the model is closed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from moe_offload.errors import ConfigError

CLOSED = "this model was closed by offload.close(); load it again with from_pretrained"
EXECUTOR = "moe_offload_executor"  # of an experts module; holds the cache, and that the slots


def weight_bytes(model: nn.Module, *, buffers: bool = True) -> int:
    """Return the bytes of the tensors that the model's modules hold, tied ones once."""
    tensors: list[Tensor] = [*model.parameters(), *(model.buffers() if buffers else ())]
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type != "meta")


def cache_bytes(caches: Iterable[Cache]) -> int:
    """Return the bytes that key/value caches have allocated, used or not."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for cache in caches
        for layer in cache.layers
        for tensor in _tensors(vars(layer).values())
    }
    return sum(storages.values())


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def release_weights(model: nn.Module) -> None:
    """Replace every tensor by one without memory; a reference that somebody kept stays good.

    Whoever calls a part of the model then is told so, not of tensors without data.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_empty(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _empty(buffer)
        if hasattr(module, EXECUTOR):
            delattr(module, EXECUTOR)
        module.register_forward_pre_hook(_refuse)


def _refuse(*_: object) -> None:
    raise ConfigError(CLOSED)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def trim_heap() -> None:
    """Hand freed memory back to the system, where the C library keeps it for later (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
