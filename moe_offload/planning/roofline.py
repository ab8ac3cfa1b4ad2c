"""How fast could it be? Tokens per second of decoding, from bytes, bandwidths and what is beside them.

Pure arithmetic. A decoded token reads its active weights and its keys and values from RAM, and the
experts that are not resident from disk. A layer's misses are read together while its experts at hand are
computed, then computed as they arrive; what that does not hide is waited for. Reading ahead (prefetch) counts
where it gains, as the runtime keeps it up only there. For prompts see prompt_roofline.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_offload.planning.cost_model import TokenBytes
from moe_offload.planning.machine_speed import DecoderShape, DeviceSpeed, MachineSpeed
from moe_offload.planning.plans import DensePlan
from moe_offload.planning.stalls import Stalls, independent_misses


@dataclass(frozen=True, slots=True)
class Speed:
    """A prediction: the rate, the seconds that each wall takes alone, and which of them binds.

    Attributes:
        num_tokens: that ``walls_s`` are of.
        ahead_gain: what reading ahead adds to the rate, as a share of that without; 0: it does not pay.
    """

    tokens_per_s: float
    walls_s: Mapping[str, float]
    binding: str
    num_tokens: int = 1
    ahead_gain: float = 0.0

    def walls(self) -> str:
        """Return in words which wall binds, and how far each is: its milliseconds alone."""
        walls = (f"{wall} {seconds * 1e3:.3g} ms" for wall, seconds in self.walls_s.items() if seconds)
        return f"{self.binding} binds ({', '.join(walls)})"


def decode_speed(
    token: TokenBytes,
    machine: MachineSpeed,
    shape: DecoderShape,
    *,
    hit_rate: float,
    device_rate: float | None = None,
    misses: Sequence[float] | None = None,
    device_dense: DensePlan | None = None,
) -> Speed:
    """Return tokens per second of decoding with experts on disk.

    Args:
        hit_rate: share of a token's experts that are resident, 0 to 1.
        device_rate: share that is in an accelerator's memory; None: there is none.
        misses: share of a layer's steps with 0, 1, ... top_k misses; None: they are independent draws.
        device_dense: the dense layers that the accelerator computes; None: the CPU computes all.
    """
    cpu_bytes_per_s = machine.expert_bytes_per_s or machine.ram_bytes_per_s
    experts_s = token.expert_bytes / cpu_bytes_per_s
    device_walls: dict[str, float] = {}
    if device_rate is not None and machine.device is not None:
        experts_s, device_walls = _shared_experts(token, machine.device, cpu_bytes_per_s, shape, device_rate)
    attention_s = max(
        token.kv_bytes / machine.ram_bytes_per_s, shape.attention_scores * machine.overheads.attention_score_s
    )
    dense_s = token.dense_bytes / machine.ram_bytes_per_s + attention_s
    if device_dense is not None and not device_dense.is_empty and machine.device is not None:
        there_s = _device_dense_s(token, machine.device, device_dense)
        kept = device_dense.first_layer / device_dense.num_layers
        weights_s = max(0, token.dense_bytes - device_dense.weight_bytes) / machine.ram_bytes_per_s
        dense_s = weights_s + kept * attention_s + there_s
        device_walls["VRAM"] = device_walls.get("VRAM", 0.0) + there_s
    ram_s = dense_s + experts_s
    shares = independent_misses(shape.top_k, hit_rate) if misses is None else misses
    stalls = Stalls(token, machine, shape, experts_s)
    disk_s = stalls.disk_s(hit_rate)
    total_s = plain_s = stalls.plain_s(shares, ram_s, disk_s)
    if machine.ahead is not None and shape.is_native:
        total_s = min(plain_s, stalls.verified_ahead_s(shares, machine.ahead, ram_s, disk_s))
    walls_s = {"RAM": ram_s, "disk": disk_s, "overhead": stalls.of(shares)[0], **device_walls}
    binding = max(walls_s, key=lambda wall: walls_s[wall])
    return Speed(1 / total_s, walls_s, binding, ahead_gain=plain_s / total_s - 1)


def _device_dense_s(token: TokenBytes, device: DeviceSpeed, dense: DensePlan) -> float:
    """Return how long the device reads its dense layers' weights, keys and values for a token."""
    layers = 1 - dense.first_layer / dense.num_layers
    return (dense.weight_bytes + layers * token.kv_bytes) / device.bytes_per_s


def _shared_experts(
    token: TokenBytes, device: DeviceSpeed, cpu_bytes_per_s: float, shape: DecoderShape, device_rate: float
) -> tuple[float, dict[str, float]]:
    """Return a token's experts on the device and beside it, and the walls that come with a device.

    What is not in the device's memory is computed by the CPU or copied, so that both end together.
    """
    device_s = device_rate * token.expert_bytes / device.bytes_per_s
    rest_s = (1 - device_rate) * token.expert_bytes / (cpu_bytes_per_s + device.link_bytes_per_s)
    walls_s = {"VRAM": device_s, "link": rest_s}
    return max(device_s, rest_s) + shape.moe_layers * device.step_s, walls_s
