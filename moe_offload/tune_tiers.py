"""The tiers of a machine for one model: everything that measure_tiers knows, as parts of a profile."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import torch

from moe_offload import measure, measure_tiers, ops
from moe_offload._native import Device
from moe_offload.config import MIB
from moe_offload.expert_bench import ExpertBench, expert_bench
from moe_offload.measure_device import measure_device
from moe_offload.measure_experts import LayerExperts
from moe_offload.planning.time_budget import Clock, TimeBudget
from moe_offload.profile_schema import Curve, ExpertTime, Figure
from moe_offload.residency.machine_state import machine_state
from moe_offload.residency.memory import available_bytes, total_bytes
from moe_offload.storage.checkpoint import Checkpoint

WEIGHTS_BYTES = measure.WEIGHTS_BYTES
LEAST_WEIGHTS_BYTES = 8 * MIB

Say = Callable[[str, float], None]  # what is being done, and the share that is done


@dataclass(frozen=True)
class DeviceCosts:
    """Seconds of one token's expert on the device, of an expert over the link, of a launch and its end."""

    expert_s: float
    copy_s: float
    step_s: float


@dataclass
class Tiers:
    """Parts of a profile, and the few numbers that the cost model takes from them."""

    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    expert_times: list[ExpertTime] = field(default_factory=list)
    kernel_by_threads: dict[int, float] = field(default_factory=dict)
    device: DeviceCosts | None = None

    @property
    def disk(self) -> float:
        return self.figures["disk"]["read_bandwidth"].value

    @property
    def disk_busy(self) -> float:
        return self.figures["disk"]["read_bandwidth_busy"].value


def measure_all(
    checkpoint: Checkpoint,
    budget: TimeBudget,
    say: Say,
    clock: Clock = time.perf_counter,
    device: Device | None = None,
) -> Tiers:
    """Measure memory, disk, kernels and experts, each alone and then while the others work.

    Args:
        device: an open accelerator, whose link and experts are measured, too.
    """
    tiers = Tiers()
    weights_bytes = min(WEIGHTS_BYTES, max(LEAST_WEIGHTS_BYTES, available_bytes() // 4))
    weights = measure.random_weights(weights_bytes)
    with expert_bench(checkpoint, clock) as bench:
        parts: list[tuple[str, Callable[[TimeBudget], None]]] = [
            ("memory", lambda share: _memory(tiers, weights, share)),
            ("kernels", lambda share: _kernels(tiers, bench, weights, share)),
            ("disk", lambda share: _disk(tiers, bench, share)),
            ("experts by tokens", lambda share: _experts(tiers, bench, share)),
            ("each while the others work", lambda share: _busy(tiers, bench, weights, share)),
            ("everything at once", lambda share: _together(tiers, bench, weights, share)),
        ]
        if device is not None:
            parts.append(("the device", lambda share: _device(tiers, bench, device, share)))
        for number, ((name, part), share) in enumerate(zip(parts, budget.shares(len(parts)), strict=True)):
            say(f"measuring {name}", number / len(parts))
            part(share)
    return tiers


def _figure(value: float, note: str = "") -> Figure:
    return Figure(value, "measured", note)


def _memory(tiers: Tiers, weights: torch.Tensor, share: TimeBudget) -> None:
    curve = measure_tiers.ram_by_threads(weights, share)
    tiers.curves["ram"] = {"read_bandwidth_by_threads": curve}
    threads, best = max(curve.points, key=lambda point: point[1])
    limit = machine_state().cgroup_limit_bytes
    tiers.figures["ram"] = {
        "capacity": _figure(psutil.virtual_memory().total if limit is None else total_bytes()),
        **({} if limit is None else {"cgroup_limit": _figure(limit)}),
        "read_bandwidth": _figure(best, f"{threads:.0f} threads"),
    }


def _kernels(tiers: Tiers, bench: ExpertBench, weights: torch.Tensor, share: TimeBudget) -> None:
    shares = share.shares(2)
    tiers.kernel_by_threads = measure_tiers.kernel_by_threads(bench.checkpoint, weights, next(shares))
    name = measure.main_format(bench.checkpoint).name
    threads = ops.usable_cores()
    tiers.figures["ram"]["kernel_bandwidth"] = _figure(
        tiers.kernel_by_threads[threads], f"one token's product in {name}, {threads} threads"
    )
    tiers.figures["cpu"] = {
        "physical_cores": _figure(psutil.cpu_count(logical=False) or threads),
        "usable_cores": _figure(threads, "affinity, cgroup quota, cores"),
        "int8_throughput": _figure(
            2 * measure.macs_per_s(measure.main_format(bench.checkpoint), weights),
            f"{measure.PROMPT_TOKENS} tokens in {name}, {threads} threads",
        ),
        **measure_tiers.pool_latencies(next(shares)),
    }


def _disk(tiers: Tiers, bench: ExpertBench, share: TimeBudget) -> None:
    shares = share.shares(3)
    by_depth = measure_tiers.disk_by_depth(bench, next(shares))
    by_size = measure_tiers.disk_by_size(bench, next(shares))
    depth, best = max(by_depth.points, key=lambda point: point[1])
    mode, _ = bench.store.reader.file_mode(0)
    tiers.curves["disk"] = {"read_bandwidth_by_size": by_size, "read_bandwidth_by_depth": by_depth}
    tiers.figures["disk"] = {
        "read_bandwidth": _figure(best, f"whole experts, {depth:.0f} in flight, {mode} reads"),
        "latency": _figure(measure_tiers.disk_latency_s(bench, next(shares)), "of one page"),
    }


def _experts(tiers: Tiers, bench: ExpertBench, share: TimeBudget) -> None:
    shares = share.shares(2)
    tiers.expert_times = measure_tiers.expert_times(bench, next(shares), busy=False)
    tiers.expert_times += measure_tiers.expert_times(bench, next(shares), busy=True)
    expert_bytes = max(layout.expert_bytes for layout in bench.checkpoint.experts.layouts.values())
    layer = LayerExperts(bench, next(iter(bench.checkpoint.experts.layouts)))
    tiers.figures["model"] = {
        "expert_size": _figure(expert_bytes, "in the file"),
        "submit_time": _figure(layer.submit_s(), "of an expert's read"),
    }


def _busy(tiers: Tiers, bench: ExpertBench, weights: torch.Tensor, share: TimeBudget) -> None:
    """Measure again what ``_memory``, ``_kernels`` and ``_disk`` measured alone."""
    shares, beside = share.shares(4), measure_tiers.products(bench.checkpoint, weights)
    by_threads = measure_tiers.ram_by_threads(weights, next(shares), bench)
    tiers.curves["ram"]["read_bandwidth_by_threads_busy"] = by_threads
    tiers.curves["disk"] |= {
        "read_bandwidth_by_depth_busy": measure_tiers.disk_by_depth(bench, next(shares), beside),
        "read_bandwidth_by_size_busy": measure_tiers.disk_by_size(bench, next(shares), beside),
    }
    tiers.figures["cpu"] |= measure_tiers.pool_latencies(next(shares), bench)


def _together(tiers: Tiers, bench: ExpertBench, weights: torch.Tensor, share: TimeBudget) -> None:
    kernel, disk = measure_tiers.together(bench, weights, share)
    tiers.figures["ram"]["kernel_bandwidth_busy"] = _figure(kernel, "while experts were read from the disk")
    tiers.figures["disk"]["read_bandwidth_busy"] = _figure(disk, "while the kernel ran")


def _device(tiers: Tiers, bench: ExpertBench, device: Device, share: TimeBudget) -> None:
    found = measure_device(device, bench, share)
    tiers.figures |= found.figures
    tiers.expert_times += found.expert_times
    gpu, expert_bytes = found.figures["gpu"], tiers.figures["model"]["expert_size"].value
    tiers.device = DeviceCosts(
        expert_s=found.expert_times[0].curve.points[0][1],
        copy_s=expert_bytes / found.figures["link"]["to_device_bandwidth_busy"].value,
        step_s=gpu["launch_latency"].value + gpu["sync_latency"].value,
    )
