"""How fast could it be? Tokens per second from bytes, bandwidths and what a step costs beside bytes.

Pure arithmetic. A decoded token reads its active weights and its keys and values from RAM, and the
experts that are not resident from disk. A layer's misses are read together while its experts at hand are
computed; what that does not hide is waited for. What is read ahead (prefetch) is not counted: the
runtime keeps that up only where it measures a gain.

A prompt's chunk reads every expert at most once, whatever the cache holds, and multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import comb

from moe_offload.config import PREFILL_CHUNK_TOKENS, ModelSpec
from moe_offload.planning.cost_model import TokenBytes
from moe_offload.storage.expert_format import ExpertLayout


@dataclass(frozen=True, slots=True)
class Overheads:
    """What the program costs beside bytes, in seconds; measured by runtime/yardstick.py.

    Attributes:
        native_layer_s: of a layer in the native decode step, every expert resident.
        python_layer_s: the same where Python decides between router and experts.
        modules_layer_s: of a layer on transformers' modules.
        miss_s: of an expert that was not resident, beside its reading.
        token_s: of generate()'s loop, for a token.
        chunk_layer_s: of a layer for a chunk of a prompt.
        chunk_expert_s: of an expert's call in a chunk.
        chunk_element_s: of an element of a token's hidden state, for a layer of a chunk.
        attention_score_s: of one head and one cached token in decoding, the cache's bytes at hand.
    """

    native_layer_s: float = 0.0
    python_layer_s: float = 0.0
    modules_layer_s: float = 0.0
    miss_s: float = 0.0
    token_s: float = 0.0
    chunk_layer_s: float = 0.0
    chunk_expert_s: float = 0.0
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
class MachineSpeed:
    """What the machine gives to this program.

    Attributes:
        ram_bytes_per_s: a token's dense matrices with all threads.
        disk_bytes_per_s: reading whole experts, several in flight.
        macs_per_s: multiply-adds of the prefill kernels with all threads; None: not known.
        expert_bytes_per_s: one token's experts, computed in one call; None: as ``ram_bytes_per_s``.
        expert_macs_per_s: a chunk's experts, by as many tokens as one gets; None: as ``macs_per_s``.
        disk_latency_s: of reading an expert alone, beyond its share of ``disk_bytes_per_s``.
    """

    ram_bytes_per_s: float
    disk_bytes_per_s: float
    macs_per_s: float | None = None
    expert_bytes_per_s: float | None = None
    expert_macs_per_s: float | None = None
    disk_latency_s: float = 0.0
    overheads: Overheads = field(default_factory=Overheads)
    device: DeviceSpeed | None = None


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What of a model and its placement decides a step's costs beside bytes.

    Attributes:
        is_native: the native decode step computes it.
        all_resident: every expert has a slot of its own, so that nothing is decided between layers.
    """

    num_layers: int
    moe_layers: int
    top_k: int
    num_experts: int = 0  # of a layer
    hidden_size: int = 0
    attention_scores: int = 0  # of a token: heads x cached tokens, all layers
    is_native: bool = True
    all_resident: bool = False


@dataclass(frozen=True, slots=True)
class Speed:
    """A prediction: the rate, the seconds that each wall takes alone, and which of them binds."""

    tokens_per_s: float
    walls_s: Mapping[str, float]
    binding: str


def active_expert_macs(spec: ModelSpec, layouts: Mapping[int, ExpertLayout]) -> int:
    """Return the multiply-adds of one prompt token in its experts: one for each weight that it uses."""
    per_layer = (sum(m.rows * m.cols for m in layout.matrices) for layout in layouts.values())
    return sum(spec.top_k * macs for macs in per_layer)


def decode_speed(
    token: TokenBytes,
    machine: MachineSpeed,
    shape: DecoderShape,
    *,
    hit_rate: float,
    device_rate: float | None = None,
) -> Speed:
    """Return tokens per second of decoding with experts on disk.

    Args:
        hit_rate: share of a token's experts that are resident, 0 to 1.
        device_rate: share that is in an accelerator's memory; None: there is none.
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
    misses = shape.moe_layers * shape.top_k * (1 - hit_rate)
    overhead_s = _step_overhead_s(machine.overheads, shape) + misses * machine.overheads.miss_s
    disk_s = (1 - hit_rate) * token.expert_bytes / machine.disk_bytes_per_s
    stall_s = _stall_s(token, machine, shape, experts_s, hit_rate)
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


def _stall_s(
    token: TokenBytes, machine: MachineSpeed, shape: DecoderShape, experts_s: float, hit_rate: float
) -> float:
    """Return a token's expected waiting: layer by layer, misses as independent draws."""
    uses = shape.moe_layers * shape.top_k
    if not uses:
        return 0.0
    read_s = token.expert_bytes / uses / machine.disk_bytes_per_s
    at_hand_s = experts_s / uses
    waits = (
        comb(shape.top_k, misses)
        * (1 - hit_rate) ** misses
        * hit_rate ** (shape.top_k - misses)
        * max(0.0, machine.disk_latency_s + misses * read_s - (shape.top_k - misses) * at_hand_s)
        for misses in range(1, shape.top_k + 1)
    )
    return shape.moe_layers * sum(waits)


def prefill_speed(
    machine: MachineSpeed,
    shape: DecoderShape,
    *,
    dense_macs: int,
    expert_macs: int,
    dense_bytes: int,
    expert_bytes: int,
    resident_share: float,
    num_tokens: int = PREFILL_CHUNK_TOKENS,
) -> Speed | None:
    """Return tokens per second of a first prompt; None where ``machine.macs_per_s`` is not known.

    Its first chunk reads every expert that it uses; what then stays resident is read no more.

    Args:
        dense_macs, expert_macs: of one token.
        expert_bytes: of all experts.
        resident_share: of the experts, once the first chunk is through.
    """
    if machine.macs_per_s is None:
        return None
    chunks = -(-num_tokens // PREFILL_CHUNK_TOKENS)
    used = share_used(shape.num_experts, shape.top_k, min(num_tokens, PREFILL_CHUNK_TOKENS))
    experts_s = max(
        num_tokens * expert_macs / (machine.expert_macs_per_s or machine.macs_per_s),
        chunks * used * expert_bytes / (machine.expert_bytes_per_s or machine.ram_bytes_per_s),
    )
    overheads = machine.overheads
    layer_s = overheads.chunk_layer_s + used * shape.num_experts * overheads.chunk_expert_s
    elements_s = num_tokens * shape.hidden_size * overheads.chunk_element_s
    walls_s = {
        "RAM": chunks * (dense_bytes + used * expert_bytes) / machine.ram_bytes_per_s,
        "disk": used * (1 + (chunks - 1) * (1 - resident_share)) * expert_bytes / machine.disk_bytes_per_s,
        "compute": num_tokens * dense_macs / machine.macs_per_s
        + experts_s
        + shape.num_layers * (chunks * layer_s + elements_s),
    }
    binding = max(walls_s, key=lambda wall: walls_s[wall])
    return Speed(num_tokens / walls_s[binding], walls_s, binding)


def share_used(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Return the share of a layer's experts that a chunk is expected to use, all equally probable."""
    return 1.0 if num_experts <= top_k else float(1 - (1 - top_k / num_experts) ** num_tokens)
