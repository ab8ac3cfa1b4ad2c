"""What ops check before an address goes to native code."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_offload.errors import ConfigError


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def check_bias(op: str, argument: str, bias: Tensor | None, shape: tuple[int, ...]) -> None:
    if bias is not None:
        check_tensor(op, argument, bias, torch.float32, shape)


def check_tensor(
    op: str, argument: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...] | None = None
) -> None:
    """Raise ConfigError unless ``tensor`` is contiguous, on the CPU, of ``dtype`` and ``shape``."""
    if tensor.dtype != dtype:
        raise ConfigError(f"{op}: {argument} must have dtype {dtype}, got {tensor.dtype}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        kind = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise ConfigError(f"{op}: {argument} must be contiguous on the CPU, got {kind} on {tensor.device}")
    if shape is None:
        return
    matches = len(shape) == tensor.ndim and all(
        wanted in (None, got) for wanted, got in zip(shape, tensor.shape, strict=True)
    )
    if not matches:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ConfigError(f"{op}: {argument} must have shape ({wanted}), got {tuple(tensor.shape)}")


def check_array(op: str, argument: str, array: NDArray[np.generic], dtype: type[np.generic]) -> None:
    if array.dtype != dtype or not array.flags.c_contiguous:
        kind = "contiguous" if array.flags.c_contiguous else "not contiguous"
        raise ConfigError(
            f"{op}: {argument} must be a contiguous {dtype.__name__} array, got {kind} {array.dtype}"
        )
