"""From a profile's figures to what the cost model reckons with."""

from __future__ import annotations

from dataclasses import replace

from moe_offload.planning.machine_speed import (
    SUBMIT_S,
    DeviceSpeed,
    MachineSpeed,
    Overheads,
    ReadAhead,
    SeenGain,
)
from moe_offload.profile_schema import DeviceProfile

SUSTAINED_SHARE = 0.75  # of a data sheet's peak
TYPICAL_LAUNCH_S = 10e-6  # of a kernel, and of waiting for one, where a profile does not say: an estimate


# What a step costs beside bytes where a profile does not say: measured on 2 cores of an AVX-512 server by
# runtime/yardstick.py, rounded.
TYPICAL_OVERHEADS = Overheads(
    native_layer_s=10e-6, python_layer_s=20e-6, modules_layer_s=1.1e-3, forward_s=400e-6,
    stalled_layer_s=150e-6, token_s=100e-6, chunk_layer_s=1.1e-3,
)  # fmt: skip
FEW_STALLS = 0.1  # of the layers
STALLED_PER_CLEAN = 5.0  # what a miss adds, in a layer's overhead without one and its share of a forward's
MORE_IN_PYTHON_S = TYPICAL_OVERHEADS.python_layer_s - TYPICAL_OVERHEADS.native_layer_s


def profile_speed(profile: DeviceProfile) -> MachineSpeed:
    """Return what a profile's machine gives; a data sheet's bandwidths and products count for three quarters.

    The decode kernels' own rate goes before what memory gives to plain reading.
    """
    submit_s = profile.get("model", "submit_time")
    operations_per_s = (
        _sustained(profile, "cpu", "int8_throughput") if "int8_throughput" in profile.figures["cpu"] else None
    )
    ram = "kernel_bandwidth" if "kernel_bandwidth" in profile.figures["ram"] else "read_bandwidth"
    return MachineSpeed(
        ram_bytes_per_s=_sustained(profile, "ram", ram),
        disk_bytes_per_s=_sustained(profile, "disk", "read_bandwidth"),
        macs_per_s=None if operations_per_s is None else operations_per_s / 2,  # a multiply-add is two
        disk_latency_s=profile.get("disk", "latency") or 0.0,
        submit_s=SUBMIT_S if submit_s is None else submit_s,
        ahead=_ahead(profile),
        overheads=_overheads(*(profile.get("model", name) for name in ("layer_overhead", "stall_overhead"))),
        device=_device(profile),
    )


def _ahead(profile: DeviceProfile) -> ReadAhead | None:
    """Return what the profile's predictor does; None where nothing was measured, or nothing is read ahead."""
    recall, layer_s = profile.get("model", "missed_recall", "recall"), profile.get("model", "predict_time")
    if recall is None or layer_s is None or not profile.settings.get("prefetch", True):
        return None
    speedup, hit_rate = (profile.get("model", f"prefetch_{name}") for name in ("speedup", "hit_rate"))
    seen = None if speedup is None or hit_rate is None else SeenGain(speedup, hit_rate)
    return ReadAhead(recall, layer_s, profile.get("model", "missed_recall") is not None, seen)


def _device(profile: DeviceProfile) -> DeviceSpeed | None:
    """Return the GPU and its link; None without one of its own memory."""
    if not profile.has("gpu") or not profile.has("link"):
        return None
    launch_s, sync_s = (profile.get("gpu", name) for name in ("launch_latency", "sync_latency"))
    return DeviceSpeed(
        bytes_per_s=_sustained(profile, "gpu", "read_bandwidth"),
        link_bytes_per_s=_sustained(profile, "link", "to_device_bandwidth"),
        step_s=(launch_s or TYPICAL_LAUNCH_S) + (sync_s or TYPICAL_LAUNCH_S),
    )


def _overheads(layer_s: float | None, stalled_s: float | None) -> Overheads:
    """Return the typical ones, with a layer's of the native step, and what misses add, as measured.

    Args:
        layer_s: a run's, so a forward's own are divided among its layers.
    """
    found = TYPICAL_OVERHEADS
    if layer_s is not None:
        in_python_s = layer_s + MORE_IN_PYTHON_S
        found = replace(found, native_layer_s=layer_s, python_layer_s=in_python_s, forward_s=0.0)
    return found if stalled_s is None else replace(found, stalled_layer_s=stalled_s)


def split_overhead(
    layer_s: float, stalled_share: float, clean_layer_s: float | None = None
) -> tuple[float, float | None]:
    """Return what a layer that misses nothing costs beside bytes and waiting, and what misses add to it.

    A run under one budget shows only their sum, and a plan is of any budget: it is divided in the typical
    proportion.

    Args:
        layer_s: the mean over a run's layers.
        stalled_share: of these layers, those with a miss; few tell nothing of what one adds (None).
        clean_layer_s: of a layer that misses nothing, where other runs showed it.
    """
    if stalled_share < FEW_STALLS:
        return layer_s, None
    if clean_layer_s is not None:
        return clean_layer_s, max(0.0, layer_s - clean_layer_s) / stalled_share
    clean_s = layer_s / (1 + stalled_share * STALLED_PER_CLEAN)
    return clean_s, STALLED_PER_CLEAN * clean_s


def _sustained(profile: DeviceProfile, section: str, name: str) -> float:
    figure = profile.figures[section][name]
    return figure.value * (SUSTAINED_SHARE if figure.source == "datasheet" else 1.0)
