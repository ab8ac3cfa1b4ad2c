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

    Args:
        index: CUDA's, which counts the cards of CUDA_VISIBLE_DEVICES in its own order; NVML knows all cards
            in another one, so that it is asked by the place on the bus.

    Raises:
        DeviceError: the card does not answer.
    """
    cuda_library = ctypes.CDLL(str(library or cuda.LIBRARY))
    card = _find_card(nvml, _pci_bus_id(cuda_library, index))
    before = None if card is None else card.used_bytes()
    free, total = ctypes.c_int64(), ctypes.c_int64()
    code = cuda_library.moe_offload_cuda_memory(index, ctypes.byref(free), ctypes.byref(total))
    if code != 0:
        raise DeviceError(f"GPU {index} does not say how much memory it has (CUDA error {code})")
    after = None if card is None else card.used_bytes()
    grown = after - before if before is not None and after is not None else 0
    is_measured = MIB <= grown <= total.value // 2
    return CardMemory(
        total.value,
        free.value,
        grown if is_measured else ASSUMED_CONTEXT_BYTES,
        is_measured,
        card is None or card.has_display(),
    )


def _pci_bus_id(library: ctypes.CDLL, index: int) -> bytes:
    """Return where a card is on its bus; empty where CUDA does not say."""
    text = ctypes.create_string_buffer(32)
    code = library.moe_offload_cuda_pci_bus_id(index, text, len(text))
    return text.value if code == 0 else b""


@dataclass(frozen=True)
class _Card:
    """A card as NVML sees it."""

    library: ctypes.CDLL
    handle: ctypes.c_void_p

    def used_bytes(self) -> int | None:
        """Return what all processes hold of it."""
        memory = _NvmlMemory()
        if self.library.nvmlDeviceGetMemoryInfo(self.handle, ctypes.byref(memory)) != 0:
            return None
        return int(memory.used)

    def has_display(self) -> bool:
        """Whether it draws a screen; where nobody says, it may."""
        active = ctypes.c_int()
        code = self.library.nvmlDeviceGetDisplayActive(self.handle, ctypes.byref(active))
        return bool(active.value) if code == 0 else True


def _find_card(nvml: str, bus_id: bytes) -> _Card | None:
    """Return the card at a place on the bus; None where NVML is not there or does not know it."""
    try:
        library = ctypes.CDLL(nvml)
    except OSError:
        return None
    handle = ctypes.c_void_p()
    if not bus_id or library.nvmlInit_v2() != 0:
        return None
    found = library.nvmlDeviceGetHandleByPciBusId_v2(bus_id, ctypes.byref(handle)) == 0
    return _Card(library, handle) if found else None
