"""Rows of experts on the emulated device: the CPU's bits, copies waited for, faults, giving up."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from op_cases import EXPERT_CASES, activations
from test_expert_ops import Layer
from torch import Tensor

from moe_offload import _native
from moe_offload.errors import ConfigError

MIB = 1 << 20
SLOT = 4 * MIB
PLAIN = next(case for case in EXPERT_CASES if not case.bias)


class OnDevice:
    """A layer's experts, one slot each on a device, and a step's pairs of all of them."""

    slot_bytes = SLOT

    def __init__(self, device: _native.Device, layer: Layer, num_tokens: int) -> None:
        self.device, self.layer, self.kernel = device, layer, layer.kernel()
        self.native = device.make_kernel(self.kernel.native)
        self.hidden = activations(num_tokens, layer.case.hidden_size, seed=7)
        self.ids = list(range(layer.num_experts))
        rng = np.random.default_rng(3)
        chosen = [np.flatnonzero(rng.random(num_tokens) < 0.7).tolist() or [0] for _ in self.ids]
        self.offsets = np.cumsum([0, *map(len, chosen)]).astype(np.int32)
        self.tokens = np.concatenate(chosen).astype(np.int32)

    def address(self, expert_id: int, matrix: int) -> int:
        """Of a matrix in its expert's slot, unaligned as in a file."""
        before = sum(part.nbytes for part in self.layer.memory[expert_id][:matrix])
        return self.device.address + expert_id * self.slot_bytes + 13 + before

    def copy(self, expert_id: int) -> int:
        parts = self.layer.memory[expert_id]
        rows = [[p.ctypes.data, self.address(expert_id, i), p.nbytes] for i, p in enumerate(parts)]
        return self.device.submit(np.array(rows, np.int64), False)

    def launch(self, after: list[int]) -> int:
        inputs = self.device.upload(self.hidden.data_ptr(), *self.hidden.shape)
        addresses = [self.address(e, m) for e in self.ids for m in range(len(self.layer.matrices))]
        return self.device.launch(
            self.native,
            self.kernel.native,
            inputs,
            self.ids,
            addresses,
            self.offsets.tolist(),
            self.tokens.tolist(),
            after,
        )

    def collect(self, launch: int) -> Tensor:
        """(P, H), last pair first."""
        out = torch.full((len(self.tokens), self.layer.case.hidden_size), torch.nan)
        assert self.device.wait_launch(launch, 30)
        places = list(range(len(self.tokens)))[::-1]
        assert self.device.collect(launch, out.data_ptr(), places) is None
        return out

    def cpu_rows(self) -> Tensor:
        addresses = np.array([[p.ctypes.data for p in self.layer.memory[e]] for e in self.ids], np.uint64)
        ids = np.array(self.ids, np.int32)
        return self.kernel.rows(self.hidden, ids, addresses, self.offsets, self.tokens)


@pytest.fixture
def device() -> Iterator[_native.EmulatedDevice]:
    device = _native.EmulatedDevice(16 * MIB, 1e9, 1e-5)
    yield device
    device.close()


@pytest.mark.parametrize("case", EXPERT_CASES, ids=lambda case: case.name)
def test_rows_have_the_cpus_bits(device: _native.EmulatedDevice, case) -> None:
    """More tokens than a tile has; copies under way when the launch is made."""
    work = OnDevice(device, Layer(case), num_tokens=50)
    launch = work.launch([work.copy(expert_id) for expert_id in work.ids])
    assert torch.equal(work.collect(launch).flip(0), work.cpu_rows())


def test_what_is_there_is_computed_while_the_rest_is_copied() -> None:
    device = _native.EmulatedDevice(16 * MIB, 4e6, 0)  # an expert takes tens of milliseconds
    try:
        work = OnDevice(device, Layer(PLAIN), num_tokens=2)
        assert device.wait(work.copy(0), 30)
        device.record_events(100)
        launch = work.launch([0, *(work.copy(expert_id) for expert_id in work.ids[1:])])
        assert torch.equal(work.collect(launch).flip(0), work.cpu_rows())
        events = device.take_events()
        copies = [e for e in events if e[0] == 0]
        computed = [e for e in events if e[0] == 1]
        assert sum(amount for _, _, amount, _, _ in computed) == len(work.ids)
        assert computed[0][4] < max(end for _, _, _, _, end in copies), "waited for all copies"
        assert computed[-1][3] >= max(end for _, _, _, _, end in copies), "did not wait"
    finally:
        device.close()


def test_a_failed_copy_fails_the_launch_that_waits_for_it(device: _native.EmulatedDevice) -> None:
    work = OnDevice(device, Layer(PLAIN), num_tokens=2)
    device.inject(after=1)
    launch = work.launch([work.copy(expert_id) for expert_id in work.ids])
    assert device.wait_launch(launch, 30)
    failure = device.collect(launch, 0, [0] * len(work.tokens))
    assert failure == ("a copy to the emulated device failed", _native.DeviceFault.FAILED)
    launch = work.launch([work.copy(expert_id) for expert_id in work.ids])
    assert torch.equal(work.collect(launch).flip(0), work.cpu_rows()), "the next one is as if nothing was"


def test_no_memory_is_told_from_other_faults(device: _native.EmulatedDevice) -> None:
    work = OnDevice(device, Layer(PLAIN), num_tokens=2)
    device.inject_no_memory(1)
    launch = work.launch([0] * len(work.ids))
    assert device.wait_launch(launch, 30)
    _, fault = device.collect(launch, 0, [0] * len(work.tokens)) or ("", None)
    assert fault == _native.DeviceFault.NO_MEMORY


def test_a_launch_that_waits_for_a_copy_can_be_given_up() -> None:
    device = _native.EmulatedDevice(16 * MIB, 10.0, 0)  # ten bytes a second
    try:
        work = OnDevice(device, Layer(PLAIN), num_tokens=2)
        source = np.zeros(1, np.uint8)
        slow = device.submit(np.array([[source.ctypes.data, device.address, 1]], np.int64), False)
        launch = work.launch([slow] * len(work.ids))
        assert not device.wait_launch(launch, 0.01)
        device.abandon(launch)
        with pytest.raises(ConfigError, match="unknown"):
            device.launch_is_done(launch)
    finally:
        device.close()


def test_rows_come_back_over_the_link_to_the_host() -> None:
    """Its bandwidth is in what a launch takes, and counted apart."""
    device = _native.EmulatedDevice(16 * MIB, 1e9, 0, to_host_bytes_per_s=1e5)
    try:
        work = OnDevice(device, Layer(PLAIN), num_tokens=2)
        device.record_events(100)
        launch = work.launch([work.copy(expert_id) for expert_id in work.ids])
        assert torch.equal(work.collect(launch).flip(0), work.cpu_rows())
        num_bytes = 4 * len(work.tokens) * work.layer.case.hidden_size
        counters = device.counters()
        assert counters["returned_bytes"] == num_bytes
        assert num_bytes / 1e5 <= counters["return_seconds"] <= counters["compute_seconds"]
        (rows,) = [event for event in device.take_events() if event[0] == 2]
        assert rows[1:3] == (launch, num_bytes) and rows[4] - rows[3] >= num_bytes * 1e4 - 1
    finally:
        device.close()


def test_pageable_memory_is_copied_at_half_the_speed() -> None:
    device = _native.EmulatedDevice(16 * MIB, 100 * MIB, 0, pinnable_bytes=MIB)
    try:
        source = np.zeros(2 * MIB, np.uint8)
        assert device.pin(source.ctypes.data, len(source)) == MIB
        device.record_events(10)
        for offset in (0, MIB):
            ticket = device.submit(
                np.array([[source.ctypes.data + offset, device.address, MIB]], np.int64), False
            )
            assert device.wait(ticket, 30)
        pinned, pageable = (end - begin for *_, begin, end in device.take_events())
        assert pinned >= 10_000_000 and pageable >= 20_000_000, "faster than the link"
    finally:
        device.close()
