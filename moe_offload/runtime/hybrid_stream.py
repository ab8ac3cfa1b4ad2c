"""One layer of a prompt on device and CPU together: experts stream past both caches.

What is resident on the device is launched at once. The others come through RAM one after the other, and each
goes where the scheduler says: the CPU computes it, or it is copied to a lent slot and computed there, while
the CPU goes on. Copies, device and CPU overlap; a lent slot is used again when its launch has ended.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from moe_offload._native import DeviceInputs
from moe_offload.errors import ConfigError, DeviceError
from moe_offload.planning.scheduler import static_split
from moe_offload.residency.accelerator import wait_copy
from moe_offload.runtime.hybrid import HybridLayer, StepRows, divided
from moe_offload.storage.expert_format import ExpertKey

MOST_LENT = 4  # slots: two being copied, one computed, one just free
DONE = 2  # csrc/io/direct_read.h: TicketState


def stream_layer(layer: HybridLayer, rows: StepRows) -> None:
    """Compute all rows of a step of many tokens."""
    layer.layers.tier.absorb()
    started = time.perf_counter()
    with layer.layers.tier.cache.lend(layer.layer_idx, MOST_LENT) as slots:
        stream = _Stream(layer, rows, deque(slots))
        try:
            stream.run()
        except BaseException:
            stream.abort()
            raise
    if layer.layers.prompts is not None and stream.failure is None and stream.static_s > 0.0:
        layer.layers.prompts.record(time.perf_counter() - started, stream.static_s)
    stream.end()


@dataclass
class _Stream:
    """A layer under way. ``Copies`` of prompt_stream.py."""

    layer: HybridLayer
    rows: StepRows
    free: deque[int]  # lent slots that nothing uses
    inputs: DeviceInputs | None = None
    launches: deque[tuple[int, list[int], int]] = field(default_factory=deque)  # (ticket, experts, lent slot)
    copies: dict[int, int] = field(default_factory=dict)  # by expert: its ticket
    failed: list[int] = field(default_factory=list)
    failure: DeviceError | None = None
    static_s: float = 0.0  # what a static split is expected to take

    def __post_init__(self) -> None:
        self.tier, self.ram = self.layer.layers.tier, self.layer.layers.ram
        self.uses = dict(
            zip(self.rows.expert_ids, np.diff(np.array(self.rows.pair_offsets)).tolist(), strict=True)
        )

    def run(self) -> None:
        layer_idx, ids = self.layer.layer_idx, self.rows.expert_ids
        there = self.tier.cache.are_resident(layer_idx, ids)
        work = self.layer.work(self.rows, there)
        choice = self.layer.layers.prompt_scheduler(work).on_gpu
        resident, to_copy = divided(ids, there, choice)
        self.static_s = static_split(work).finish_s
        if not self.free:
            to_copy = []
        on_cpu = [i for i in ids if i not in {*resident, *to_copy}]
        if resident:
            self._launch(resident, self.tier.cache.resident_addresses(layer_idx, resident), 0, 0)
        order = alternate(to_copy, on_cpu)
        stream = self.ram.stream(layer_idx, order, [self.uses[i] for i in order], self)
        try:
            for expert_id, addresses in stream:
                if expert_id in to_copy and self.failure is None:
                    self._send(expert_id, addresses)
                else:
                    self.layer.layers.counters.cpu_experts += 1
                    cpu_s = self.layer.compute(self.rows, [expert_id], list(addresses))
                    self.layer.layers.counters.cpu_s += cpu_s
        finally:
            stream.close()
        while self.launches:
            self._collect()
        self._forget_copies()
        if self.failed:
            self._redo()

    def _send(self, expert_id: int, addresses: Sequence[int]) -> None:
        """Copy an expert to a lent slot and launch it there; waits while all slots are in use."""
        while not self.free:
            self._collect()
        slot = self.free.popleft()
        key = ExpertKey(self.layer.layer_idx, expert_id)
        ticket, there = self.tier.source.copy(key, addresses[0], slot)
        self.copies[expert_id] = ticket
        self.layer.layers.counters.copied_experts += 1
        self._launch([expert_id], list(there), ticket, slot)

    def _launch(self, expert_ids: list[int], addresses: list[int], after: int, slot: int) -> None:
        tickets = [after] * len(expert_ids)
        self.layer.layers.counters.device_experts += len(expert_ids)
        try:
            if self.inputs is None:
                self.inputs = self.layer.upload(self.rows)
            launch = self.layer.launch(self.rows, self.inputs, expert_ids, addresses, tickets)
        except DeviceError as error:
            self.failure = error
            self.failed += expert_ids
            if slot:
                self.free.append(slot)
        else:
            self.launches.append((launch, expert_ids, slot))

    def _collect(self) -> None:
        """Wait for the oldest launch."""
        launch, expert_ids, slot = self.launches[0]
        error = self.layer.collect(self.rows, launch, expert_ids)
        self.launches.popleft()
        if slot:
            self.free.append(slot)
        if error is not None:
            self.failure = error
            self.failed += expert_ids

    def under_way(self, expert_id: int) -> bool:
        ticket = self.copies.get(expert_id)
        return ticket is not None and self.tier.device.state(ticket) < DONE

    def finish(self, expert_id: int) -> None:
        wait_copy(self.tier.device, self.copies[expert_id])

    def _redo(self) -> None:
        """Compute on the CPU what the device did not."""
        self.layer.layers.counters.redone_experts += len(self.failed)
        for expert_id, addresses in self.ram.stream(self.layer.layer_idx, sorted(self.failed)):
            self.layer.compute(self.rows, [expert_id], list(addresses))

    def _forget_copies(self) -> None:
        for ticket in self.copies.values():
            wait_copy(self.tier.device, ticket)
            self.tier.device.forget(ticket)

    def end(self) -> None:
        """Fill free slots of the device with what the prompt used most; tell of a failure."""
        if self.failure is not None:
            self.layer.failed(self.failure)
        if self.tier.is_on:
            by_use = sorted(self.uses, key=lambda i: (-self.uses[i], i))
            self.tier.fill(self.layer.layer_idx, by_use)

    def abort(self) -> None:
        for launch, _, _ in self.launches:
            with suppress(ConfigError):  # its rows were collected, and then the interrupt came
                self.tier.device.abandon(launch)


def alternate(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Return both, taking turns in proportion to their lengths: both sides have work all the time."""
    if not first or not second:
        return [*first, *second]
    few, many = sorted((first, second), key=len)
    share = -(-len(many) // len(few))
    groups = [many[start : start + share] for start in range(0, len(many), share)]
    return [
        i
        for one, group in zip_longest(few, groups)
        for i in (*([one] if one is not None else []), *(group or []))
    ]
