"""Split a long forward into chunks, so that activations have a bounded size.

transformers' layers get chunks of 512 tokens, native code longer ones (planning/prompt_chunks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from moe_offload.config import PREFILL_CHUNK_TOKENS
from moe_offload.planning.prompt_chunks import constant_chunks

# Asked for these, a caller wants tensors of the whole sequence at once; chunks would be a nuisance.
WHOLE_SEQUENCE_KEYS = ("labels", "output_attentions", "output_hidden_states", "output_router_logits")

Forward = Callable[..., Any]
OnChunk = Callable[[int, int, int], None]  # (first token, tokens in this chunk, tokens in all)


def sequence_shape(inputs: dict[str, Any]) -> tuple[int, int]:
    """Return (batch_size, query tokens) of a forward's arguments."""
    tokens = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs["inputs_embeds"]
    return int(tokens.shape[0]), int(tokens.shape[1])


def needs_chunks(inputs: dict[str, Any]) -> bool:
    """Whether the call has more than one chunk of tokens and only wants logits back."""
    batch_size, num_tokens = sequence_shape(inputs)
    mask, kept = inputs.get("attention_mask"), inputs.get("logits_to_keep", 0)
    return (
        batch_size * num_tokens > PREFILL_CHUNK_TOKENS
        and all(inputs.get(key) is None or inputs[key] is False for key in WHOLE_SEQUENCE_KEYS)
        and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
        and isinstance(kept, int)
        and kept >= 0  # of a negative number transformers leaves out the first ones
    )


def constant_sizes(inputs: dict[str, Any]) -> list[int]:
    """Return the tokens of each chunk for transformers' layers, whose rounding the batch may not change."""
    batch_size, num_tokens = sequence_shape(inputs)
    return constant_chunks(num_tokens, max(1, PREFILL_CHUNK_TOKENS // batch_size))


def run_in_chunks(
    forward: Forward, inputs: dict[str, Any], cache: Cache, sizes: Sequence[int], on_chunk: OnChunk
) -> Any:
    """Run ``forward`` chunk by chunk on ``cache`` and return the last output with all kept logits.

    Args:
        sizes: tokens of each chunk, of every sequence.
    """
    _, num_tokens = sequence_shape(inputs)
    past_tokens = cache.get_seq_length()
    first_kept = num_tokens - (inputs.get("logits_to_keep", 0) or num_tokens)
    kept_logits = []
    for end, size in zip(accumulate(sizes), sizes, strict=True):
        start = end - size
        on_chunk(start, size, num_tokens)
        kept = end - max(start, first_kept)
        chunk = _slice_inputs(inputs, start, end, past_tokens)
        output = forward(**{**chunk, "past_key_values": cache, "logits_to_keep": max(kept, 1)})
        if kept > 0:
            kept_logits.append(output.logits)
    output.logits = torch.cat(kept_logits, dim=1) if len(kept_logits) > 1 else kept_logits[0]
    return output


def _slice_inputs(inputs: dict[str, Any], start: int, end: int, past_tokens: int) -> dict[str, Any]:
    """Cut what has a value per query token to [start, end); masks cover the past as well."""
    _, num_tokens = sequence_shape(inputs)
    chunk = dict(inputs)
    for key in ("input_ids", "inputs_embeds"):
        if chunk.get(key) is not None:
            chunk[key] = chunk[key][:, start:end]
    for key in ("position_ids", "cache_position"):
        if chunk.get(key) is not None and chunk[key].shape[-1] == num_tokens:
            chunk[key] = chunk[key][..., start:end]
    if chunk.get("attention_mask") is not None:
        chunk["attention_mask"] = chunk["attention_mask"][:, : past_tokens + end]
    return chunk
