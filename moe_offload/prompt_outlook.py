"""A prompt's chunks: which experts it would use and read, from a trace or from what its family does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from moe_offload.config import ModelSpec
from moe_offload.header_sizes import head_bytes, prompt_weights, skipped_weights
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.hit_curves import expected_used
from moe_offload.planning.plans import PoolPlan
from moe_offload.planning.prompt_chunks import constant_chunks, even_chunks, first_needed, longest_chunk
from moe_offload.planning.prompt_roofline import Chunk, PromptWork
from moe_offload.replay import Event, events, pools_by_layer
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
        skipped_macs=skipped_weights(checkpoint),
    )


def skips_last_layer(spec: ModelSpec, *, is_native: bool, has_device: bool) -> bool:
    """Whether a prompt's last layer may compute a part of the tokens only (prompt_chunks.first_needed)."""
    return is_native and not has_device and spec.num_hidden_layers - 1 in spec.moe_layers


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


def expected_chunks(
    spec: ModelSpec, resident_share: float, sizes: Sequence[int], *, skips_last: bool = False
) -> list[Chunk]:
    """Return a first prompt's chunks of ``sizes`` tokens by what the family does.

    The first reads every expert that it uses, and what then stays is read no more.

    Args:
        skips_last: see ``skips_last_layer``.
    """
    chunks: list[Chunk] = []
    cached, kept = 0, resident_share * spec.num_experts
    layer_share = int(kept)  # a layer's prompt fills no more than that
    held = last_held = 0.0  # experts in memory of any layer, and of the last
    for size in sizes:
        used, last_used = (
            expected_used(spec.model_type, spec.num_experts, spec.top_k, tokens) for tokens in (size, 1)
        )
        missed = 1 - resident_share if chunks else 1.0
        held = max(held, min(layer_share, used))
        room = kept * len(spec.moe_layers) - held * (len(spec.moe_layers) - 1) - last_held
        newcomers = round(max(0.0, min(spec.num_experts - last_held, room)))
        skipped = first_needed(size, 1, newcomers, spec.top_k) if skips_last else 0
        last = Chunk(1, cached + skipped, last_used, last_used * missed) if skipped else None
        last_held = max(last_held, min(layer_share, used if last is None else last.used))
        chunks.append(Chunk(size, cached, used, used * missed, last))
        cached += size
    return chunks


def with_fresh_slots(chunks: Sequence[Chunk], slots: float) -> list[Chunk]:
    """Return a first prompt's chunks with the slots that each is the first to use, of ``slots`` a layer."""
    found: list[Chunk] = []
    for chunk in chunks:
        fresh = min(chunk.read, slots)
        found.append(replace(chunk, fresh=fresh))
        slots -= fresh
    return found


def traced_chunks(
    trace: RoutingTrace,
    pools: Sequence[PoolPlan],
    policy: str,
    sizes: Sequence[int],
    expert_bytes: Mapping[int, int],
    *,
    skips_last: bool = False,
) -> list[Chunk] | None:
    """Return the chunks of a prompt that is routed as the trace's first tokens; None where it is shorter.

    Args:
        skips_last: see ``skips_last_layer``; what is then in memory decides.
    """
    num_tokens = sum(sizes)
    if trace.num_tokens < num_tokens:
        return None
    prompt = replace(trace.head(num_tokens), step_tokens=np.array(sizes, np.int32))
    by_layer = pools_by_layer(
        partial(events, prompt),
        pools,
        lambda: make_policy(policy),
        expert_bytes,
        trace.num_experts,
        OffloadStats(),
    )
    layers, last_layer = len(trace.layers), trace.layers[-1]
    used, read = [0] * len(sizes), [0] * len(sizes)
    parts: list[Chunk | None] = [None] * len(sizes)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for number, event in enumerate(events(prompt)):
        chunk, pool = number // layers, by_layer[event.layer_idx]
        if skips_last and event.layer_idx == last_layer:
            newcomers = pool.num_newcomers(last_layer)
            if skipped := first_needed(sizes[chunk], 1, newcomers, trace.top_k):
                token = starts[chunk] + skipped
                event = _token_past_policies(prompt, token)
                parts[chunk] = Chunk(1, token, trace.top_k, len(pool.absent(event)))
        if parts[chunk] is None:
            used[chunk] += len(event.expert_ids)
            read[chunk] += len(pool.absent(event))
        pool.route(event)
    return [
        Chunk(size, starts[i], used[i] / counted, read[i] / counted, last)
        for i, (size, last) in enumerate(zip(sizes, parts, strict=True))
        for counted in (layers - (last is not None),)
    ]


def _token_past_policies(trace: RoutingTrace, token: int) -> Event:
    """Return what the last layer's router chose for one token, served as a prompt is."""
    chosen = sorted(trace.experts[token, -1].tolist())
    return Event(trace.layers[-1], chosen, None, [1] * len(chosen))
