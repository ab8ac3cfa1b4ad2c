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

WALLS = ("RAM", "disk", "compute", "overhead")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of a prompt.

    Attributes:
        cached_tokens: before it.
        used: experts of a layer that its tokens choose, on average over the layers, ``last`` left out.
        read: those that are not in memory.
        fresh: of those, how many go into slots that nothing was in, whose pages the system has yet to make.
        last: the end of the chunk that alone goes through all of the last layer; None: all of it does.
    """

    num_tokens: int
    cached_tokens: int
    used: float
    read: float
    last: Chunk | None = None
    fresh: float = 0.0

    @property
    def num_skipped(self) -> int:
        """Tokens of which the last layer makes keys and values only."""
        return 0 if self.last is None else self.num_tokens - self.last.num_tokens


@dataclass(frozen=True, slots=True)
class PromptWork:
    """What a prompt of a model multiplies and reads.

    Attributes:
        dense_macs: of a token, all layers, without the head.
        expert_macs, expert_bytes: of one expert, on average.
        head_bytes: read once, for the last token.
        skipped_macs: of a token of which the last layer makes keys and values only, what it saves.
    """

    dense_macs: int
    expert_macs: int
    expert_bytes: int
    head_bytes: int = 0
    skipped_macs: int = 0


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
        total_s += before_s["compute"] + before_s["overhead"]
        parts = [before_s]
        for layers, tokens in _layers(shape, chunk):
            computed_s, handling_s = (layers * part for part in _experts_s(prompt, shape, tokens))
            latency_s = machine.disk_latency_s * min(1.0, tokens.read)
            read_s = layers * (tokens.read * prompt.read_s + latency_s)
            total_s += max(computed_s, read_s) + handling_s
            ram_s = layers * tokens.used * work.expert_bytes / _expert_bytes_per_s(machine)
            parts.append({"RAM": ram_s, "disk": read_s, "compute": computed_s + handling_s})
        for wall in WALLS:
            walls_s[wall] = walls_s.get(wall, 0.0) + sum(part.get(wall, 0.0) for part in parts)
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    return Speed(num_tokens / total_s, walls_s, max(walls_s, key=lambda wall: walls_s[wall]), num_tokens)


def _layers(shape: DecoderShape, chunk: Chunk) -> list[tuple[int, Chunk]]:
    """Return how many layers with experts there are for which tokens."""
    if chunk.last is None:
        return [(shape.moe_layers, chunk)]
    return [(shape.moe_layers - 1, chunk), (1, chunk.last)]


def _before_experts_s(
    machine: MachineSpeed, shape: DecoderShape, work: PromptWork, prompt: PromptSpeed, chunk: Chunk
) -> Mapping[str, float]:
    """Return what all the layers take but their experts: products, and what goes with layers and elements."""
    num_tokens, skipped, overheads = chunk.num_tokens, chunk.num_skipped, machine.overheads
    dense_macs = num_tokens * work.dense_macs - skipped * work.skipped_macs
    dense_s = dense_macs / value_at(prompt.dense_macs_per_s, min(num_tokens, TILE_TOKENS))
    looked_at, less = (
        count * (chunk.cached_tokens + prompt.own_share * count) for count in (num_tokens, skipped)
    )
    attention_s = shape.attention_heads * (looked_at - less / shape.num_layers) * prompt.score_s
    passed = shape.num_layers * num_tokens - skipped
    elements_s = passed * shape.hidden_size * overheads.chunk_element_s
    return {
        "compute": dense_s + attention_s + elements_s,
        "overhead": shape.num_layers * overheads.chunk_layer_s,
    }


def _experts_s(prompt: PromptSpeed, shape: DecoderShape, chunk: Chunk) -> tuple[float, float]:
    """Return the seconds of a layer's experts, reading not waited for, and what reading takes beside."""
    if not chunk.used:
        return 0.0, 0.0
    tokens_each = chunk.num_tokens * shape.top_k / chunk.used
    handling_s = chunk.read * _as_measured(prompt.handling_s, tokens_each)
    handling_s += chunk.fresh * _as_measured(prompt.fresh_s, tokens_each)
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


def _as_measured(curve: Curve, tokens: float) -> float:
    """Return a curve's value, which does not grow on after its last point."""
    return value_at(curve, min(tokens, curve[-1][0]))


def value_at(curve: Curve, tokens: float) -> float:
    """Return a curve's value: straight between its points and on from the last two, flat before the first."""
    if len(curve) == 1 or tokens <= curve[0][0]:
        return curve[0][1]
    pairs = list(pairwise(curve))
    (x0, y0), (x1, y1) = next((pair for pair in pairs if tokens <= pair[1][0]), pairs[-1])
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)
