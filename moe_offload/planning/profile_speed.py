"""From a profile's figures to what the cost model reckons with."""

from __future__ import annotations

from moe_offload.planning.roofline import MachineSpeed
from moe_offload.profile_schema import DeviceProfile

SUSTAINED_SHARE = 0.75  # of a data sheet's peak


def profile_speed(profile: DeviceProfile, num_layers: int = 0) -> MachineSpeed:
    """Return what a profile's machine gives; data-sheet bandwidths count for three quarters.

    The decode kernels' own rate goes before what memory gives to plain reading.

    Args:
        num_layers: of the model whose ``layer_overhead`` the profile may have.
    """
    throughput = profile.figures["cpu"].get("int8_throughput")
    ram = "kernel_bandwidth" if "kernel_bandwidth" in profile.figures["ram"] else "read_bandwidth"
    return MachineSpeed(
        ram_bytes_per_s=_sustained(profile, "ram", ram),
        disk_bytes_per_s=_sustained(profile, "disk", "read_bandwidth"),
        macs_per_s=throughput.value / 2 if throughput else None,  # a multiply-add is two operations
        token_overhead_s=num_layers * (profile.get("model", "layer_overhead") or 0.0),
    )


def _sustained(profile: DeviceProfile, section: str, name: str) -> float:
    figure = profile.figures[section][name]
    return figure.value * (SUSTAINED_SHARE if figure.source == "datasheet" else 1.0)
