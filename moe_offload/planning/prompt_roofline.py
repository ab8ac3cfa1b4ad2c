"""How fast could a prompt be? Its chunks one after the other, layer by layer.

Pure arithmetic. A layer's dense products, attention and what it costs beside them come first; only then has
its router spoken. Its experts that are not resident are read while those at hand are computed: the
slower of the two counts, after the first has arrived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from moe_offload.planning.machine_speed import Curve, DecoderShape, MachineSpeed, PromptSpeed
from moe_offload.planning.prompt_chunks import TILE_TOKENS
from moe_offload.planning.roofline import Speed


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of a prompt.

    Attributes:
        cached_tokens: before it.
        used: experts of a layer that its tokens choose, on average over the layers.
        read: those that are not in memory.
    """

    num_tokens: int
    cached_tokens: int
    used: float
    read: float


@dataclass(frozen=True, slots=True)
class PromptWork:
    """What a prompt of a model multiplies and reads.

    Attributes:
        dense_macs: of a token, all layers, without the head.
        expert_macs, expert_bytes: of one expert, on average.
        head_bytes: read once, for the last token.
    """

    dense_macs: int
    expert_macs: int
    expert_bytes: int
    head_bytes: int = 0


def prefill_speed(
    machine: MachineSpeed, shape: DecoderShape, work: PromptWork, chunks: Sequence[Chunk]
) -> Speed | None:
    """Return tokens per second of a prompt; None where nothing is known of the machine's products."""
    prompt = machine.prompt or _by_bandwidths(machine, work)
    if prompt is None:
        return None
    walls_s: dict[str, float] = {}
    total_s = work.head_bytes / machine.ram_bytes_per_s
    for chunk in chunks:
        before_s = _before_experts_s(machine, shape, work, prompt, chunk)
        computed_s, handling_s = (shape.moe_layers * part for part in _experts_s(prompt, shape, chunk))
        latency_s = machine.disk_latency_s * min(1.0, chunk.read)
        read_s = shape.moe_layers * (chunk.read * prompt.read_s + latency_s)
        total_s += before_s["compute"] + before_s["overhead"] + max(computed_s, read_s) + handling_s
        ram_s = shape.moe_layers * chunk.used * work.expert_bytes / _expert_bytes_per_s(machine)
        more = {"RAM": ram_s, "disk": read_s, "compute": before_s["compute"] + computed_s + handling_s}
        for wall, seconds in (more | {"overhead": before_s["overhead"]}).items():
            walls_s[wall] = walls_s.get(wall, 0.0) + seconds
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    return Speed(num_tokens / total_s, walls_s, max(walls_s, key=lambda wall: walls_s[wall]), num_tokens)


def _before_experts_s(
    machine: MachineSpeed, shape: DecoderShape, work: PromptWork, prompt: PromptSpeed, chunk: Chunk
) -> Mapping[str, float]:
    """Return what all the layers take but their experts: products, and what goes with layers and elements."""
    num_tokens, overheads = chunk.num_tokens, machine.overheads
    dense_s = num_tokens * work.dense_macs / value_at(prompt.dense_macs_per_s, min(num_tokens, TILE_TOKENS))
    looked_at = num_tokens * (chunk.cached_tokens + prompt.own_share * num_tokens)
    attention_s = shape.attention_heads * looked_at * prompt.score_s
    elements_s = shape.num_layers * num_tokens * shape.hidden_size * overheads.chunk_element_s
    return {
        "compute": dense_s + attention_s + elements_s,
        "overhead": shape.num_layers * overheads.chunk_layer_s,
    }


def _experts_s(prompt: PromptSpeed, shape: DecoderShape, chunk: Chunk) -> tuple[float, float]:
    """Return the seconds of a layer's experts, reading not waited for, and what reading takes beside."""
    if not chunk.used:
        return 0.0, 0.0
    tokens_each = chunk.num_tokens * shape.top_k / chunk.used
    measured = min(tokens_each, prompt.handling_s[-1][0])  # it does not grow on
    handling_s = chunk.read * value_at(prompt.handling_s, measured)
    return chunk.used * value_at(prompt.expert_s, tokens_each), handling_s


def _expert_bytes_per_s(machine: MachineSpeed) -> float:
    return machine.expert_bytes_per_s or machine.ram_bytes_per_s


def _by_bandwidths(machine: MachineSpeed, work: PromptWork) -> PromptSpeed | None:
    """Return what bandwidths and products say where no chunk of the model was measured."""
    if machine.macs_per_s is None:
        return None
    token_s = work.expert_macs / machine.macs_per_s
    loaded_s = work.expert_bytes / _expert_bytes_per_s(machine)
    few = max(1.0, loaded_s / token_s if token_s else 1.0)  # tokens from which on products bind
    return PromptSpeed(
        dense_macs_per_s=((1, machine.macs_per_s),),
        expert_s=((0, max(loaded_s, 0.0)), (few, few * token_s), (2 * few, 2 * few * token_s)),
        read_s=work.expert_bytes / machine.disk_bytes_per_s,
    )


def value_at(curve: Curve, tokens: float) -> float:
    """Return a curve's value: straight between its points and on from the last two, flat before the first."""
    if len(curve) == 1 or tokens <= curve[0][0]:
        return curve[0][1]
    pairs = list(pairwise(curve))
    (x0, y0), (x1, y1) = next((pair for pair in pairs if tokens <= pair[1][0]), pairs[-1])
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)
