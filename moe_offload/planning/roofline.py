"""How fast could it be? Tokens per second from bytes and bandwidths, and the wall that binds.

Pure arithmetic. A decoded token reads its active weights and its keys and values from RAM, and the
experts that are not resident from disk. Reads run beside what is being computed, within limits:

    a miss that was not predicted overlaps with the experts of its layer that are at hand;
    a predicted one overlaps with everything before its layer.

A prompt's chunk reads every expert at most once, whatever the cache holds, and is bound by the disk
or by multiplication.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_offload.config import PREFILL_CHUNK_TOKENS, ModelSpec
from moe_offload.planning.cost_model import TokenBytes
from moe_offload.storage.expert_format import ExpertLayout


@dataclass(frozen=True, slots=True)
class MachineSpeed:
    """What the machine gives to this program.

    Attributes:
        ram_bytes_per_s: reading weights with all threads.
        disk_bytes_per_s: reading whole experts, several in flight.
        macs_per_s: multiply-adds of the prefill kernels with all threads; None: not known.
        token_overhead_s: what a decoded token costs beside bytes.
    """

    ram_bytes_per_s: float
    disk_bytes_per_s: float
    macs_per_s: float | None = None
    token_overhead_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Speed:
    """A prediction: the rate, the seconds that each wall takes alone, and which of them binds."""

    tokens_per_s: float
    walls_s: Mapping[str, float]
    binding: str


def active_macs(spec: ModelSpec, layouts: Mapping[int, ExpertLayout], dense_weights: int) -> int:
    """Return multiply-adds of one prompt token: one for each weight that it uses."""
    per_expert = {
        layer_idx: sum(matrix.rows * matrix.cols for matrix in layout.matrices)
        for layer_idx, layout in layouts.items()
    }
    return dense_weights + sum(spec.top_k * macs for macs in per_expert.values())


def decode_speed(
    token: TokenBytes, machine: MachineSpeed, *, hit_rate: float, predicted_share: float = 0.0
) -> Speed:
    """Return tokens per second of decoding with experts on disk.

    Args:
        hit_rate: share of a token's experts that are resident, 0 to 1.
        predicted_share: share of the others whose read begins before their layer.
    """
    ram_s = token.total_bytes / machine.ram_bytes_per_s
    at_hand_s = hit_rate * token.expert_bytes / machine.ram_bytes_per_s
    disk_s = (1 - hit_rate) * token.expert_bytes / machine.disk_bytes_per_s
    surprise_s = (1 - predicted_share) * disk_s
    reads_and_sums_s = max(ram_s + max(0.0, surprise_s - at_hand_s), disk_s)
    total_s = reads_and_sums_s + machine.token_overhead_s
    walls_s = {"RAM": ram_s, "disk": disk_s, "overhead": machine.token_overhead_s}
    return Speed(1 / total_s, walls_s, max(walls_s, key=lambda wall: walls_s[wall]))


def prefill_speed(
    machine: MachineSpeed,
    *,
    macs_per_token: int,
    dense_bytes: int,
    expert_bytes: int,
    resident_share: float,
    num_tokens: int = PREFILL_CHUNK_TOKENS,
) -> Speed | None:
    """Return tokens per second of one chunk of a prompt; None where ``machine.macs_per_s`` is not known.

    Args:
        expert_bytes: of all experts; a chunk is taken to use every one of them.
        resident_share: of the experts, that need no read.
    """
    if machine.macs_per_s is None:
        return None
    compute_s = num_tokens * macs_per_token / machine.macs_per_s
    walls_s = {
        "RAM": (dense_bytes + expert_bytes) / machine.ram_bytes_per_s,
        "disk": (1 - resident_share) * expert_bytes / machine.disk_bytes_per_s,
        "compute": compute_s,
    }
    binding = max(walls_s, key=lambda wall: walls_s[wall])
    return Speed(num_tokens / walls_s[binding], walls_s, binding)
