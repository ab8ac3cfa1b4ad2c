"""Measure what an expert costs on the CPU, on the device and on the link: at load, in empty slots."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from moe_offload._native import Device, DeviceKernel
from moe_offload.expert_ops import ExpertKernel
from moe_offload.planning.expert_costs import MeasuredCosts
from moe_offload.residency.accelerator import wait_copy, wait_launch

TOKENS = (1, 4, 16, 64)
MOST_EXPERTS = 4
REPEATS = 3  # the quickest counts
FILL = 0x11  # a small number in every format; untouched pages would all be one page of zeros

Addresses = Callable[[int], Sequence[int]]  # of a slot: first byte of each matrix


class SlotsToMeasure:
    """Some slots that hold nothing yet, on both sides.

    Args:
        ram, vram: their first addresses.
        addresses: of an expert's matrices in the slot at an address.
    """

    def __init__(self, ram: int, vram: int, slot_bytes: int, num_slots: int, addresses: Addresses) -> None:
        count = min(MOST_EXPERTS, num_slots)
        self.ram = [ram + i * slot_bytes for i in range(count)]
        self.vram = [vram + i * slot_bytes for i in range(count)]
        self.slot_bytes, self.addresses = slot_bytes, addresses

    def fill(self) -> None:
        for address in self.ram:
            ctypes.memset(address, FILL, self.slot_bytes)


def measure_costs(
    device: Device, kernel: ExpertKernel, device_kernel: DeviceKernel, slots: SlotsToMeasure
) -> MeasuredCosts:
    """Return the costs of one size of experts; some tens of milliseconds for experts of a MB."""
    slots.fill()
    copy_s = min(_copy_s(device, slots) for _ in range(REPEATS))
    cpu, gpu, start_s = [], [], []
    for num_tokens in TOKENS:
        step = _Step(kernel, num_tokens, len(slots.ram))
        cpu.append((num_tokens, min(step.cpu_s(slots) for _ in range(REPEATS))))
        launches = [step.gpu_s(device, device_kernel, slots) for _ in range(REPEATS)]
        gpu.append((num_tokens, min(one_s for one_s, _ in launches)))
        start_s.append(min(beside_s for _, beside_s in launches))
    return MeasuredCosts(tuple(cpu), tuple(gpu), copy_s, start_s[0])


def _copy_s(device: Device, slots: SlotsToMeasure) -> float:
    before = device.counters()["busy_seconds"]
    for ram, vram in zip(slots.ram, slots.vram, strict=True):
        ticket = device.submit(np.array([[ram, vram, slots.slot_bytes]], np.int64), False)
        wait_copy(device, ticket)
        device.forget(ticket)
    return max(1e-9, (device.counters()["busy_seconds"] - before) / len(slots.ram))


class _Step:
    """``num_experts`` experts with ``num_tokens`` tokens each."""

    def __init__(self, kernel: ExpertKernel, num_tokens: int, num_experts: int) -> None:
        self.kernel, self.num_experts = kernel, num_experts
        self.hidden = torch.ones(num_tokens, kernel.layout.hidden_size)
        self.offsets = (np.arange(num_experts + 1) * num_tokens).astype(np.int32)
        self.tokens = np.tile(np.arange(num_tokens, dtype=np.int32), num_experts)
        self.ids = (np.arange(num_experts) % kernel.layout.num_experts).astype(np.int32)

    def cpu_s(self, slots: SlotsToMeasure) -> float:
        addresses = np.array([slots.addresses(slot) for slot in slots.ram], np.uint64)
        started = time.perf_counter()
        self.kernel.rows(self.hidden, self.ids, addresses, self.offsets, self.tokens)
        return (time.perf_counter() - started) / self.num_experts

    def gpu_s(
        self, device: Device, device_kernel: DeviceKernel, slots: SlotsToMeasure
    ) -> tuple[float, float]:
        """Return an expert's time there, and what the launch took beside computing."""
        ids, offsets, tokens = self.ids.tolist(), self.offsets.tolist(), self.tokens.tolist()
        addresses = [address for slot in slots.vram for address in slots.addresses(slot)]
        started = time.perf_counter()
        inputs = device.upload(self.hidden.data_ptr(), *self.hidden.shape)
        before = device.counters()["compute_seconds"]
        launch = device.launch(
            device_kernel,
            self.kernel.native,
            inputs,
            ids,
            addresses,
            offsets,
            tokens,
            [0] * self.num_experts,
        )
        wait_launch(device, launch)
        device.abandon(launch)
        took_s = time.perf_counter() - started
        computed_s = device.counters()["compute_seconds"] - before
        return computed_s / self.num_experts, max(0.0, took_s - computed_s)
