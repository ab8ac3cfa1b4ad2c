"""How fast could it be? Tokens per second of decoding, from bytes, bandwidths and what is beside them.

Pure arithmetic. A decoded token reads its active weights and its keys and values from RAM, and the
experts that are not resident from disk. A layer's misses are read together while its experts at hand are
computed, then computed as they arrive; what that does not hide is waited for. What is read ahead
(prefetch) is not counted: the runtime keeps that up only where it measures a gain. For prompts see
prompt_roofline.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import comb

from moe_offload.planning.cost_model import TokenBytes

Curve = tuple[tuple[float, float], ...]  # (tokens, value), ascending


@dataclass(frozen=True, slots=True)
class Overheads:
    """What the program costs beside bytes, in seconds; measured by runtime/yardstick.py.

    Attributes:
        native_layer_s: of a layer in the native decode step, every expert resident.
        python_layer_s: the same where Python decides between router and experts.
        modules_layer_s: of a layer on transformers' modules.
        stalled_layer_s: of a layer that waits for misses, beside their reading: threads have fallen asleep.
        token_s: of generate()'s loop, for a token.
        chunk_layer_s: of a layer for a chunk of a prompt, however many tokens it has.
        chunk_element_s: of an element of a token's hidden state, for a layer of a chunk.
        attention_score_s: of one head and one cached token in decoding, the cache's bytes at hand.
    """

    native_layer_s: float = 0.0
    python_layer_s: float = 0.0
    modules_layer_s: float = 0.0
    stalled_layer_s: float = 0.0
    token_s: float = 0.0
    chunk_layer_s: float = 0.0
    chunk_element_s: float = 0.0
    attention_score_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """What an accelerator above RAM gives; every figure of a profile's [gpu] and [link].

    Attributes:
        bytes_per_s: experts in its memory.
        link_bytes_per_s: copies to it; they take from the CPU what it would compute later than the device.
        step_s: launch of a layer's experts and waiting for them.
    """

    bytes_per_s: float
    link_bytes_per_s: float
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PromptSpeed:
    """What the machine gives to a prompt's chunk of this model.

    Attributes:
        dense_macs_per_s: of a dense product, by tokens.
        expert_s: of an expert in memory, by the tokens that chose it.
        read_s: from one expert to the next where all come from disk and computing does not hold them up.
        handling_s: what reading an expert takes from those that compute.
        score_s: of attention, for one head, one token and one that it looks at.
        own_share: of its own chunk's tokens, how many a token's attention computes: half where it skips those
            that come later, all where it computes and masks them.
    """

    dense_macs_per_s: Curve
    expert_s: Curve
    read_s: float
    handling_s: float = 0.0
    score_s: float = 0.0
    own_share: float = 1.0


@dataclass(frozen=True, slots=True)
class MachineSpeed:
    """What the machine gives to this program.

    Attributes:
        ram_bytes_per_s: a token's dense matrices with all threads.
        disk_bytes_per_s: a decode step's misses, one more among those that are read together.
        macs_per_s: multiply-adds of the prefill kernels with all threads; None: not known.
        expert_bytes_per_s: one token's experts, computed in one call; None: as ``ram_bytes_per_s``.
        disk_latency_s: of a decode step's first miss, beyond its share of ``disk_bytes_per_s``.
        prompt: as measured with the model; None: by ``macs_per_s`` and ``disk_bytes_per_s``.
    """

    ram_bytes_per_s: float
    disk_bytes_per_s: float
    macs_per_s: float | None = None
    expert_bytes_per_s: float | None = None
    disk_latency_s: float = 0.0
    prompt: PromptSpeed | None = None
    overheads: Overheads = field(default_factory=Overheads)
    device: DeviceSpeed | None = None


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What of a model and its placement decides a step's costs beside bytes.

    Attributes:
        attention_heads: of all layers that attend.
        attention_scores: of a token: heads x cached tokens, all layers.
        is_native: the native decode step computes it.
        all_resident: every expert has a slot of its own, so that nothing is decided between layers.
    """

    num_layers: int
    moe_layers: int
    top_k: int
    num_experts: int = 0  # of a layer
    hidden_size: int = 0
    attention_heads: int = 0
    attention_scores: int = 0
    is_native: bool = True
    all_resident: bool = False


@dataclass(frozen=True, slots=True)
class Speed:
    """A prediction: the rate, the seconds that each wall takes alone, and which of them binds.

    Attributes:
        num_tokens: that ``walls_s`` are of.
    """

    tokens_per_s: float
    walls_s: Mapping[str, float]
    binding: str
    num_tokens: int = 1

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
) -> Speed:
    """Return tokens per second of decoding with experts on disk.

    Args:
        hit_rate: share of a token's experts that are resident, 0 to 1.
        device_rate: share that is in an accelerator's memory; None: there is none.
        misses: share of a layer's steps with 0, 1, ... top_k misses; None: they are independent draws.
    """
    cpu_bytes_per_s = machine.expert_bytes_per_s or machine.ram_bytes_per_s
    experts_s = token.expert_bytes / cpu_bytes_per_s
    device_walls: dict[str, float] = {}
    if device_rate is not None and machine.device is not None:
        experts_s, device_walls = _shared_experts(token, machine.device, cpu_bytes_per_s, shape, device_rate)
    attention_s = max(
        token.kv_bytes / machine.ram_bytes_per_s, shape.attention_scores * machine.overheads.attention_score_s
    )
    ram_s = token.dense_bytes / machine.ram_bytes_per_s + attention_s + experts_s
    shares = independent_misses(shape.top_k, hit_rate) if misses is None else misses
    stalled = shape.moe_layers * (1 - shares[0])
    overhead_s = _step_overhead_s(machine.overheads, shape) + stalled * machine.overheads.stalled_layer_s
    disk_s = (1 - hit_rate) * token.expert_bytes / machine.disk_bytes_per_s
    stall_s = _stall_s(token, machine, shape, experts_s, shares)
    total_s = max(ram_s + overhead_s + stall_s, disk_s)
    walls_s = {"RAM": ram_s, "disk": disk_s, "overhead": overhead_s, **device_walls}
    return Speed(1 / total_s, walls_s, max(walls_s, key=lambda wall: walls_s[wall]))


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


def _step_overhead_s(overheads: Overheads, shape: DecoderShape) -> float:
    layer_s = overheads.python_layer_s
    if not shape.is_native:
        layer_s = overheads.modules_layer_s
    elif shape.all_resident:
        layer_s = overheads.native_layer_s
    return shape.num_layers * layer_s + overheads.token_s


def independent_misses(top_k: int, hit_rate: float) -> list[float]:
    """Return the probabilities that 0, 1, ... of a layer's experts miss."""
    return [
        comb(top_k, misses) * (1 - hit_rate) ** misses * hit_rate ** (top_k - misses)
        for misses in range(top_k + 1)
    ]


def _stall_s(
    token: TokenBytes, machine: MachineSpeed, shape: DecoderShape, experts_s: float, shares: Sequence[float]
) -> float:
    """Return a token's expected waiting, layer by layer."""
    uses = shape.moe_layers * shape.top_k
    if not uses:
        return 0.0
    read_s = token.expert_bytes / uses / machine.disk_bytes_per_s
    expected = sum(
        share * _layer_stall_s(misses, shape.top_k, machine.disk_latency_s, read_s, experts_s / uses)
        for misses, share in enumerate(shares)
        if misses
    )
    return shape.moe_layers * expected


def _layer_stall_s(misses: int, top_k: int, latency_s: float, read_s: float, expert_s: float) -> float:
    """Return what a layer waits: until the last miss is there and computed, all others behind its reading."""
    arrived_s = latency_s + misses * read_s
    return max(0.0, arrived_s + expert_s - top_k * expert_s)
