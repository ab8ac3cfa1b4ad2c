"""A prompt's chunks: which experts it would use and read, from a trace or from what its family does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from moe_offload.config import ModelSpec
from moe_offload.header_costs import head_bytes, prompt_weights
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.hit_curves import expected_used
from moe_offload.planning.plans import PoolPlan
from moe_offload.planning.prompt_chunks import constant_chunks, even_chunks, longest_chunk
from moe_offload.planning.prompt_roofline import Chunk, PromptWork
from moe_offload.replay import Event, events, replay_events
from moe_offload.stats import OffloadStats
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.trace import RoutingTrace


def prompt_work(checkpoint: Checkpoint) -> PromptWork:
    """Return what a prompt of the checkpoint multiplies and reads."""
    layouts = checkpoint.experts.layouts.values()
    num_experts = max(1, sum(layout.num_experts for layout in layouts))
    macs = sum(layout.num_experts * sum(m.rows * m.cols for m in layout.matrices) for layout in layouts)
    return PromptWork(
        dense_macs=prompt_weights(checkpoint),
        expert_macs=macs // num_experts,
        expert_bytes=checkpoint.experts.total_bytes // num_experts,
        head_bytes=head_bytes(checkpoint),
    )


def chunk_sizes(
    checkpoint: Checkpoint, num_tokens: int, *, context_tokens: int, is_native: bool, has_device: bool
) -> list[int]:
    """Return the tokens of each chunk of a prompt, as the runtime cuts it.

    Args:
        is_native: native code computes it (runtime/native_families.py).
        has_device: a device computes some of the experts.
    """
    if not is_native or has_device:
        return constant_chunks(num_tokens)
    return even_chunks(num_tokens, longest_chunk(checkpoint.spec, checkpoint.config, context_tokens))


def expected_chunks(spec: ModelSpec, resident_share: float, sizes: Sequence[int]) -> list[Chunk]:
    """Return a first prompt's chunks of ``sizes`` tokens by what the family does.

    The first reads every expert that it uses, and what then stays is read no more.
    """
    chunks: list[Chunk] = []
    cached = 0
    for size in sizes:
        used = expected_used(spec.model_type, spec.num_experts, spec.top_k, size)
        read = used * (1 - resident_share) if chunks else used
        chunks.append(Chunk(size, cached, used, read))
        cached += size
    return chunks


def traced_chunks(
    trace: RoutingTrace,
    pools: Sequence[PoolPlan],
    policy: str,
    sizes: Sequence[int],
    expert_bytes: Mapping[int, int],
) -> list[Chunk] | None:
    """Return the chunks of a prompt that is routed as the trace's first tokens; None where it is shorter."""
    num_tokens = sum(sizes)
    if trace.num_tokens < num_tokens:
        return None
    prompt = replace(trace.head(num_tokens), step_tokens=np.array(sizes, np.int32))
    layers = len(trace.layers)
    used, read = [0] * len(sizes), [0] * len(sizes)
    seen, count = 0, 0

    def note(event: Event, stats: OffloadStats) -> None:
        nonlocal seen, count
        chunk, count = count // layers, count + 1
        num_bytes = stats.stream_bytes + stats.demand_bytes
        used[chunk] += len(event.expert_ids)
        read[chunk] += (num_bytes - seen) // expert_bytes[event.layer_idx]
        seen = num_bytes

    replay_events(
        lambda: events(prompt),
        pools,
        lambda: make_policy(policy),
        expert_bytes,
        trace.num_experts,
        on_event=note,
    )
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        Chunk(size, start, used[i] / layers, read[i] / layers)
        for i, (size, start) in enumerate(zip(sizes, starts, strict=True))
    ]
