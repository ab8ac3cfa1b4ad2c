"""torch's defaults for new tensors belong to the caller; ours are float32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_on_cpu() -> Iterator[None]:
    """Let new tensors be what native code writes to, whatever ``torch.set_default_dtype`` and such say."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype is torch.float32 and device.type == "cpu":
        yield  # entering a device would cost every call into torch
        return
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
