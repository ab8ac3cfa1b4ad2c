"""An expert in a slot, and what reads it there."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from moe_offload.storage.expert_format import ExpertKey

ON_ITS_WAY = 1  # in place of an address (csrc/decode/resident_table.h)


class ExpertSource(Protocol):
    """What the cache asks of storage/expert_store.py; tests put a simulated disk here.

    Every ticket ends in exactly one ``wait`` that returns or raises CheckpointError, or in one
    ``cancel`` that returned True, followed by ``forget``.
    """

    def read(self, key: ExpertKey, slot_address: int, *, speculative: bool) -> int:
        """Queue the reads of an expert; a demand read goes before every queued speculative one."""

    def done(self, ticket: int) -> bool:
        """Whether ``wait`` would not block: finished, well or not."""

    def wait(self, ticket: int) -> None:
        """Block until the bytes are in the slot and forget the ticket, also when it raises this.

        Raises:
            CheckpointError: the read failed.
            DeviceError: it was a copy to a device, and failed.
        """

    def promote(self, ticket: int) -> bool:
        """Turn a speculative read into a demand read, where it has not begun."""

    def cancel(self, ticket: int) -> bool:
        """Take back a read that has not begun; False when it has, and the slot is still written."""

    def forget(self, ticket: int) -> bool:
        """Drop the record of a read that was cancelled."""

    def addresses(self, key: ExpertKey, slot_address: int) -> tuple[int, ...]:
        """First byte of each of the expert's matrices in the slot."""

    def expert_bytes(self, key: ExpertKey) -> int:
        """Bytes of the expert in the file."""


class SlotState(Enum):
    """Of an expert that has a slot; drawn in expert_cache.py."""

    IN_FLIGHT = "in flight"
    STAGED = "staged"  # its bytes are there; not resident (yet)
    RESIDENT = "resident"


@dataclass(slots=True, eq=False)
class Entry:
    """An expert in a slot."""

    key: ExpertKey
    slot: int
    addresses: tuple[int, ...]
    num_bytes: int
    ticket: int  # meaningful while in flight
    state: SlotState
    unclaimed: bool  # speculative, and no step has asked for it yet
    pins: int = 0
