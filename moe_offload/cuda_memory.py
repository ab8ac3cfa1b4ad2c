"""How much of a card's memory is free, what the driver takes for itself, and how much to leave alone.

The driver's library for management (NVML) says what the card holds without making a context of our own;
making one then shows what a context costs on this driver. Where NVML does not answer (WSL2 shows no
processes, some containers no library) the costs are assumed and ``is_measured`` is False.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from moe_offload import cuda
from moe_offload.errors import DeviceError

MIB = 1 << 20
ASSUMED_CONTEXT_BYTES = 512 * MIB
DISPLAY_RESERVE_BYTES = 1024 * MIB  # peers fall off a cliff with less than about 1 GiB free on a desktop
RESERVE_BYTES = 256 * MIB


@dataclass(frozen=True)
class CardMemory:
    """Bytes of one card, seen once our context is there."""

    total_bytes: int
    free_bytes: int
    context_bytes: int
    is_measured: bool  # the context; else assumed
    has_display: bool

    @property
    def auto_bytes(self) -> int:
        """What ``vram="auto"`` takes, the context included: what is free less a reserve."""
        reserve = DISPLAY_RESERVE_BYTES if self.has_display else RESERVE_BYTES
        return max(0, self.free_bytes + self.context_bytes - reserve)


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def card_memory(index: int, library: Path | None = None, nvml: str = "libnvidia-ml.so.1") -> CardMemory:
    """Return a card's memory; makes a CUDA context in this process, if there is none.

    Raises:
        DeviceError: the card does not answer.
    """
    before = _used_bytes(nvml, index)
    free, total = ctypes.c_int64(), ctypes.c_int64()
    ask = ctypes.CDLL(str(library or cuda.LIBRARY)).moe_offload_cuda_memory
    code = ask(index, ctypes.byref(free), ctypes.byref(total))
    if code != 0:
        raise DeviceError(f"GPU {index} does not say how much memory it has (CUDA error {code})")
    after = _used_bytes(nvml, index)
    grown = after - before if before is not None and after is not None else 0
    is_measured = MIB <= grown <= total.value // 2
    return CardMemory(
        total.value,
        free.value,
        grown if is_measured else ASSUMED_CONTEXT_BYTES,
        is_measured,
        _has_display(nvml, index),
    )


def _nvml_card(nvml: str, index: int) -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    try:
        library = ctypes.CDLL(nvml)
    except OSError:
        return None
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2() != 0:
        return None
    found = library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0
    return (library, handle) if found else None


def _used_bytes(nvml: str, index: int) -> int | None:
    """Return what all processes hold of a card."""
    card = _nvml_card(nvml, index)
    memory = _NvmlMemory()
    if card is None or card[0].nvmlDeviceGetMemoryInfo(card[1], ctypes.byref(memory)) != 0:
        return None
    return int(memory.used)


def _has_display(nvml: str, index: int) -> bool:
    """Return whether the card draws a screen; where nobody says, it may."""
    card = _nvml_card(nvml, index)
    active = ctypes.c_int()
    if card is None or card[0].nvmlDeviceGetDisplayActive(card[1], ctypes.byref(active)) != 0:
        return True
    return bool(active.value)
