"""What an accelerator gives: its link, its experts by tokens, its launches; alone and beside a busy CPU.

Through the interface that every device has (csrc/device/device.h), so an emulated one and a card are measured
by the same lines. Rows come back to the host as a part of their launch, so that experts' times have that way
in them. The link is measured both ways, by whole experts. Its memory holds a few of them meanwhile; the
caller opens and closes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from moe_offload import ops
from moe_offload._native import Device
from moe_offload.errors import ConfigError
from moe_offload.expert_bench import ExpertBench, median_of, work_in_background
from moe_offload.expert_ops import Activation, ExpertKernel
from moe_offload.planning.time_budget import TimeBudget
from moe_offload.profile_schema import Curve, ExpertTime, Figure
from moe_offload.storage.expert_format import ExpertKey, ExpertLayout, GgmlType

WAIT_S = 3600.0  # per native call; it looks for Ctrl-C every 100 ms
MOST_EXPERTS = 4  # in the device's memory at the same time
TOKEN_COUNTS = (1, 4, 16, 64)
PAGE_BYTES = 4096
WHILE_BUSY = "while the CPU multiplied"


@dataclass
class DeviceMeasures:
    """Parts of a profile: [gpu], [link], and experts by tokens."""

    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    expert_times: list[ExpertTime] = field(default_factory=list)


class _OnDevice:
    """Experts of one shape, the same in the bench's memory and in the device's."""

    def __init__(self, device: Device, bench: ExpertBench, layout: ExpertLayout) -> None:
        self.device, self.bench, self.layout = device, bench, layout
        self.kernel = ExpertKernel(layout, Activation())
        self.native = device.make_kernel(self.kernel.native)
        layouts = bench.checkpoint.experts.layouts
        count = min(MOST_EXPERTS, device.num_bytes // bench.slot_bytes, bench.num_slots)
        if count < 1:
            raise ConfigError(
                f"{device.name} has {device.num_bytes} bytes, and an expert takes {bench.slot_bytes}; "
                "give it more"
            )
        same = [key for key in bench.keys if layouts[key.layer_idx].matrices == layout.matrices]
        self.keys: list[ExpertKey] = same[:count]
        self.on_host = bench.load(layout, len(self.keys))

    def target(self, number: int) -> int:
        """Return the address of a slot on the device."""
        return self.device.address + number * self.bench.slot_bytes

    def copy_all(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Copy the experts over the link; ``meanwhile`` is repeated until they are there."""
        tickets = [
            self.device.submit(
                np.array([[self.bench.slot(i), self.target(i), self.bench.slot_bytes]], np.int64), False
            )
            for i in range(len(self.keys))
        ]
        for ticket in tickets:
            while meanwhile is not None and not self.device.wait(ticket, 0.0):
                meanwhile()
            while not self.device.wait(ticket, WAIT_S):
                pass
            failure = self.device.error(ticket)
            self.device.forget(ticket)
            if failure is not None:
                raise ConfigError(f"{self.device.name} refuses a copy: {failure[0]}")

    def bring_back(self, meanwhile: Callable[[], object] | None = None) -> float:
        """Copy the experts back to the host; returns the seconds that the link took.

        Args:
            meanwhile: repeated by another thread until they are there.
        """
        size = self.bench.slot_bytes
        spans = [[self.bench.slot(i), self.target(i), size] for i in range(len(self.keys))]
        with work_in_background(meanwhile):
            return self.device.copy_to_host(np.array(spans, np.int64))

    def launch(self, num_tokens: int, num_experts: int) -> int:
        """Begin ``num_experts`` experts with ``num_tokens`` tokens each; returns a ticket."""
        hidden = torch.ones(num_tokens, self.layout.hidden_size)
        inputs = self.device.upload(hidden.data_ptr(), *hidden.shape)
        store = self.bench.store
        addresses = [a for i in range(num_experts) for a in store.addresses(self.keys[i], self.target(i))]
        return self.device.launch(
            self.native,
            self.kernel.native,
            inputs,
            [key.expert_id for key in self.keys[:num_experts]],
            addresses,
            (np.arange(num_experts + 1) * num_tokens).tolist(),
            list(range(num_tokens)) * num_experts,
            [0] * num_experts,
        )

    def finish(self, launch: int) -> None:
        while not self.device.wait_launch(launch, WAIT_S):
            pass


def measure_device(device: Device, bench: ExpertBench, budget: TimeBudget) -> DeviceMeasures:
    """Return link, experts and latencies of an open device.

    Raises:
        ConfigError: it has no room for an expert, or copies fail.
    """
    found, shapes = DeviceMeasures(), bench.shapes()
    shares = budget.shares(7 + 2 * len(shapes))
    parts = [_OnDevice(device, bench, layout) for layout in shapes.values()]
    first = parts[0]
    found.figures["link"] = _link(first, shares)
    for part, (name, hidden_size, intermediate_size) in zip(parts, shapes, strict=True):
        part.copy_all()
        for busy in (False, True):
            curve = _expert_curve(part, next(shares), busy)
            time = ExpertTime(device.name, name, hidden_size, intermediate_size, curve, busy)
            found.expert_times.append(time)
    single_s = found.expert_times[0].curve.points[0][1]
    found.figures["gpu"] = {
        "vram": Figure(device.num_bytes, "measured", "for slots"),
        "read_bandwidth": Figure(
            parts[0].layout.expert_bytes / single_s, "measured", "of one token's expert, by its kernel"
        ),
        **_latencies(parts[0], next(shares), busy=False),
        **_latencies(parts[0], next(shares), busy=True),
    }
    return found


def _link(part: _OnDevice, shares: Iterator[TimeBudget]) -> dict[str, Figure]:
    num_bytes = len(part.keys) * part.bench.slot_bytes
    multiply = _multiplication()

    def link_s(meanwhile: Callable[[], object] | None) -> float:
        before = part.device.counters()["busy_seconds"]
        part.copy_all(meanwhile)
        return max(1e-9, part.device.counters()["busy_seconds"] - before)

    def page_s() -> float:
        span = np.array([[part.bench.slot(0), part.target(0), PAGE_BYTES]], np.int64)
        return max(1e-8, part.device.copy_to_host(span))

    alone_s = median_of(lambda: link_s(None), next(shares))
    busy_s = median_of(lambda: link_s(multiply), next(shares))  # not the clock's: a product outlasts a copy
    back_s = median_of(part.bring_back, next(shares))
    back_busy_s = median_of(lambda: part.bring_back(multiply), next(shares))
    what, busy = f"{len(part.keys)} experts", WHILE_BUSY
    return {
        "to_device_bandwidth": Figure(num_bytes / alone_s, "measured", what),
        "to_device_bandwidth_busy": Figure(num_bytes / busy_s, "measured", busy),
        "to_host_bandwidth": Figure(num_bytes / max(1e-9, back_s), "measured", what),
        "to_host_bandwidth_busy": Figure(num_bytes / max(1e-9, back_busy_s), "measured", busy),
        "latency": Figure(median_of(page_s, next(shares)), "measured", "of a page to the host"),
    }


def _multiplication() -> Callable[[], object]:
    """Return what keeps the CPU busy: products of a matrix of 4 MiB."""
    x, weights = torch.randn(1, 1024), torch.zeros(1 << 22, dtype=torch.uint8)
    return lambda: ops.linear(x, weights, GgmlType.F32, 1024, 1024)


def _expert_curve(part: _OnDevice, budget: TimeBudget, busy: bool) -> Curve:
    points = []
    for count, share in zip(TOKEN_COUNTS, budget.shares(len(TOKEN_COUNTS)), strict=True):

        def run(count: int = count) -> float:
            before = part.device.counters()["compute_seconds"]
            launch = part.launch(count, len(part.keys))
            part.finish(launch)
            part.device.abandon(launch)
            seconds = part.device.counters()["compute_seconds"] - before
            return max(1e-8, seconds) / len(part.keys)

        with work_in_background(_multiplication() if busy else None):
            points.append((float(count), median_of(run, share)))
    note = f"{len(part.keys)} experts in a launch" + (f", {WHILE_BUSY}" if busy else "")
    return Curve(tuple(points), "measured", note)


def _latencies(part: _OnDevice, share: TimeBudget, *, busy: bool) -> dict[str, Figure]:
    """Return what beginning a launch takes, and what waiting for it takes beside its computing."""
    begins: list[float] = []

    def wait() -> float:
        before, started = part.device.counters()["compute_seconds"], time.perf_counter()
        launch = part.launch(1, 1)
        begun = time.perf_counter()
        part.finish(launch)
        ended = time.perf_counter()
        part.device.abandon(launch)
        begins.append(begun - started)
        computed_s = part.device.counters()["compute_seconds"] - before
        return max(1e-7, ended - begun - computed_s)

    with work_in_background(_multiplication() if busy else None):
        sync_s = median_of(wait, share)
    suffix, note = ("_busy", f", {WHILE_BUSY}") if busy else ("", "")
    launch_s = float(np.median(begins))
    return {
        f"launch_latency{suffix}": Figure(launch_s, "measured", f"one expert, called from Python{note}"),
        f"sync_latency{suffix}": Figure(sync_s, "measured", f"beside computing{note}"),
    }
