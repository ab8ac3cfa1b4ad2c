"""Where a device's slots are filled from: the slots in RAM, by copies over the link.

The same ``ExpertSource`` that disks are for RAM, so one cache serves both tiers. An expert keeps its
layout: a copy is one span from the first byte of its matrices to the last.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_offload.errors import DeviceError
from moe_offload.residency.accelerator import Device, DeviceFault, wait_copy
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.slot_entry import ExpertSource
from moe_offload.storage.expert_format import ExpertKey, ExpertLayout

DONE, CANCELLED = 2, 4  # csrc/io/direct_read.h: TicketState


class DeviceSource:
    """Copies from ``ram``, which keeps an expert in its place while it is being copied.

    Args:
        store: what ``ram`` reads from; it knows where in a slot an expert's matrices begin.
        layouts: by layer index.
    """

    def __init__(
        self, device: Device, ram: ExpertCache, store: ExpertSource, layouts: Mapping[int, ExpertLayout]
    ) -> None:
        self.device, self._ram, self._store = device, ram, store
        self._matrix_bytes = {i: [m.num_bytes for m in layout.matrices] for i, layout in layouts.items()}
        self.keys: dict[int, ExpertKey] = {}  # of tickets not yet forgotten
        self.log: dict[int, ExpertKey] | None = None  # of all tickets from now on, where somebody asks

    def read(self, key: ExpertKey, slot_address: int, *, speculative: bool) -> int:
        """Queue the copy of an expert whose bytes are in RAM."""
        ram_slot = self._ram.hold(key)
        try:
            first, num_bytes = self._span(key, self._store.addresses(key, ram_slot))
            span = np.array([[first, slot_address + first - ram_slot, num_bytes]], np.int64)
            ticket = self.device.submit(span, speculative)
        except BaseException:
            self._ram.let_go(key)
            raise
        self.keys[ticket] = key
        self._note(ticket, key)
        return ticket

    def copy(self, key: ExpertKey, first: int, slot_address: int) -> tuple[int, tuple[int, ...]]:
        """Queue the copy of an expert to a slot that is no cache's.

        The caller keeps the expert in its place, and forgets the ticket with ``device.forget``.

        Args:
            first: the first byte of the first of its matrices, in the layout's order.

        Returns:
            The ticket, and the addresses of the matrices there.
        """
        addresses = self._store.addresses(key, slot_address)
        lowest, num_bytes = self._span(key, addresses)
        span = np.array([[first + lowest - addresses[0], lowest, num_bytes]], np.int64)
        ticket = self.device.submit(span, False)
        self._note(ticket, key)
        return ticket, addresses

    def _span(self, key: ExpertKey, addresses: tuple[int, ...]) -> tuple[int, int]:
        """Return the first byte and the number of bytes that hold all matrices, in any order."""
        ends = map(sum, zip(addresses, self._matrix_bytes[key.layer_idx], strict=True))
        return min(addresses), max(ends) - min(addresses)

    def _note(self, ticket: int, key: ExpertKey) -> None:
        if self.log is not None:
            self.log[ticket] = key

    def done(self, ticket: int) -> bool:
        return self.device.state(ticket) >= DONE

    def wait(self, ticket: int) -> None:
        """Wait for a copy and forget it.

        Raises:
            DeviceError: it failed.
            KeyboardInterrupt: within 100 ms of Ctrl-C; the copy goes on, the ticket stays valid.
        """
        wait_copy(self.device, ticket)
        message, fault = self.device.error(ticket) or ("", DeviceFault.FAILED)
        if self.device.state(ticket) == CANCELLED:
            message = "the copy was cancelled before it began"
        key = self.keys.get(ticket)
        self.forget(ticket)
        if message:
            where = f" (expert {key.expert_id} of layer {key.layer_idx})" if key is not None else ""
            raise DeviceError(f"{message}{where}", int(fault))

    def promote(self, ticket: int) -> bool:
        return self.device.promote(ticket)

    def cancel(self, ticket: int) -> bool:
        return self.device.cancel(ticket)

    def forget(self, ticket: int) -> bool:
        forgotten = self.device.forget(ticket)
        key = self.keys.pop(ticket, None) if forgotten else None
        if key is not None:
            self._ram.let_go(key)
        return forgotten

    def forget_holds(self) -> None:
        """Let nothing go for copies that were begun: RAM's own recovery has ended what it held."""
        self.keys.clear()

    def addresses(self, key: ExpertKey, slot_address: int) -> tuple[int, ...]:
        return self._store.addresses(key, slot_address)

    def expert_bytes(self, key: ExpertKey) -> int:
        return self._store.expert_bytes(key)
