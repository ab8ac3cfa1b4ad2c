"""The accelerator in native code: open it, wait for it, say why there is none. Knows no experts."""

from __future__ import annotations

from enum import IntEnum

from moe_offload import _native, cuda
from moe_offload._native import Device
from moe_offload.config import DEVICE_FORM, DeviceChoice
from moe_offload.cuda_memory import card_memory
from moe_offload.errors import ConfigError

__all__ = ["Device", "DeviceFault", "check_device", "memory_of", "open_device", "wait_copy", "wait_launch"]

WAIT_S = 3600.0  # per native call; the native side looks for Ctrl-C every 100 ms
EVERYTHING = 1 << 62


class DeviceFault(IntEnum):
    """What befell a device: ``DeviceError.fault``, and in native code beside each failed ticket."""

    FAILED = int(_native.DeviceFault.FAILED)
    LOST = int(_native.DeviceFault.LOST)
    NO_MEMORY = int(_native.DeviceFault.NO_MEMORY)


def check_device(choice: DeviceChoice) -> None:
    """Refuse an accelerator that is not there, before anything is read.

    Raises:
        ConfigError: with the reason, and what there is.
    """
    if choice.kind == "emulated":
        return
    reason = cuda.reason_for(_index(choice), cuda.describe())
    if reason:
        raise ConfigError(
            f"device={choice.kind!r} is not possible: {reason}; without a GPU there is {DEVICE_FORM!r}"
        )


def memory_of(choice: DeviceChoice) -> tuple[int, int]:
    """Return the bytes that may be used, the driver's own included, and the driver's own.

    Raises:
        ConfigError: more was asked for than is free.
    """
    if choice.kind == "emulated":
        assert choice.vram_bytes is not None, "an emulated device has the memory that it was given"
        return choice.vram_bytes, 0
    card = card_memory(_index(choice))
    if choice.vram_bytes is None:
        return card.auto_bytes, card.context_bytes
    if choice.vram_bytes > card.free_bytes + card.context_bytes:
        raise ConfigError(
            f"vram={choice.vram_bytes} bytes is more than {choice.kind} has: {card.free_bytes} of "
            f"{card.total_bytes} bytes are free beside the driver's {card.context_bytes}; "
            'ask for less, or for vram="auto"'
        )
    return choice.vram_bytes, card.context_bytes


def _index(choice: DeviceChoice) -> int:
    """Return which card; parse_device has seen that it is a number."""
    return int(choice.kind.partition(":")[2] or 0)


def open_device(choice: DeviceChoice, num_bytes: int) -> Device:
    """Open an accelerator with ``num_bytes`` of memory for slots. Its owner calls ``close``."""
    if choice.kind != "emulated":
        return _native.CudaDevice(str(cuda.LIBRARY), _index(choice), num_bytes)
    return _native.EmulatedDevice(
        num_bytes,
        choice.link_bytes_per_s,
        choice.latency_s,
        EVERYTHING if choice.pinnable_bytes is None else choice.pinnable_bytes,
        choice.to_host_bytes_per_s,
    )


def wait_copy(device: Device, ticket: int) -> None:
    """Wait until a copy has finished; well or not.

    Raises:
        KeyboardInterrupt: within 100 ms of Ctrl-C; the copy goes on.
    """
    while not device.wait(ticket, WAIT_S):
        pass


def wait_launch(device: Device, launch: int) -> None:
    """Wait until a launch has finished; well or not. Interrupts as ``wait_copy``."""
    while not device.wait_launch(launch, WAIT_S):
        pass
