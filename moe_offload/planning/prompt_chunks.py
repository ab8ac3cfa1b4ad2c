"""How a prompt is cut into chunks; experts that are not in memory are read once for each of them.

transformers' layers get chunks of 512 tokens, a constant: torch's rounding depends on how many rows share a
product. Native code gives a token the same bits in any chunk, and needs so little for each of its tokens that
thousands fit into what every budget holds for 512 tokens of transformers' layers. So chunks grow until that
is full, and no expert has to leave for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_offload.config import MIB, PREFILL_CHUNK_TOKENS, ModelSpec
from moe_offload.planning.cost_model import ALLOCATOR_SLACK_BYTES, workspace_bytes
from moe_offload.planning.kv_format import FLOAT32_BYTES

LONGEST_CHUNK_TOKENS = 8192  # a pass over the experts takes less than its products long before
TILE_TOKENS = 512  # of a chunk that attend at once (runtime/native_prompt.py)
EXPERT_PAIRS = 512  # of an expert that are computed at once (runtime/executor.py)
QUANTIZED_COLUMN_BYTES = 3.75  # csrc/cpu/kernels.h: Activations, of one number
SUPERBLOCK = 256  # columns that quantized activations are padded to
PAIR_BYTES = 64  # of a token's choice of one expert, sorted and grouped (runtime/executor.py: Routing)
TOKEN_BYTES = 64  # its id, position and mask
STREAMED_BYTES = 4 * MIB  # at most, gate and up of few pairs (csrc/cpu/expert_kernel.cpp: kMaxRawGateUp)


def constant_chunks(num_tokens: int, chunk_tokens: int = PREFILL_CHUNK_TOKENS) -> list[int]:
    """Return the tokens of each chunk where all have ``chunk_tokens`` but the last."""
    whole, rest = divmod(num_tokens, chunk_tokens)
    return [chunk_tokens] * whole + [rest] * (rest > 0)


def even_chunks(num_tokens: int, longest: int) -> list[int]:
    """Return as few chunks as ``longest`` allows, of lengths that differ by one token at most."""
    count = -(-num_tokens // longest)
    return [num_tokens * (i + 1) // count - num_tokens * i // count for i in range(count)]


def first_needed(num_tokens: int, num_kept: int, num_newcomers: int, top_k: int) -> int:
    """Return from which token on a prompt's last layer is computed; of those before it keys and values are.

    Nothing else of them is seen but by who asks for their logits. Where a prompt would bring the layer's
    experts into memory, all of it is computed, or each answer would begin by waiting for them.

    Args:
        num_kept: tokens whose logits are wanted, the last ones.
        num_newcomers: the layer's experts that are not in memory, as far as there is room for them.
        top_k: experts of a token.
    """
    return 0 if num_newcomers > top_k else num_tokens - num_kept


def longest_chunk(spec: ModelSpec, config: Mapping[str, Any], context_tokens: int) -> int:
    """Return the tokens of a natively computed chunk that fit where 512 of transformers' layers do.

    Args:
        config: the checkpoint's, as in config.json.
    """
    room_bytes = prompt_room_bytes(spec, config, context_tokens)
    tile_bytes, token_bytes = native_prompt_bytes(spec, config)
    most = min(LONGEST_CHUNK_TOKENS, (room_bytes - tile_bytes) // token_bytes)
    return max(PREFILL_CHUNK_TOKENS, most)


def prompt_room_bytes(spec: ModelSpec, config: Mapping[str, Any], context_tokens: int) -> int:
    """Return what a budget holds for a chunk: activations and attention of 512 tokens, without scores."""
    in_layers = workspace_bytes(spec, config, context_tokens=context_tokens, stores_scores=False)
    return in_layers - ALLOCATOR_SLACK_BYTES


def native_prompt_bytes(spec: ModelSpec, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return what a native chunk takes whatever its length, and for each of its tokens.

    A tile: query or product of ``out``, context, keys, values, router scores, the quantized input of a
    product, and an expert's intermediates, plain and quantized. A token: residual and router input, this
    quantized and, for a recorder, copied; its angles; its experts.
    """
    hidden_size, num_heads = spec.hidden_size, int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or hidden_size // num_heads)
    key_size = int(config.get("num_key_value_heads") or num_heads) * head_dim
    widest = max(hidden_size, num_heads * head_dim)
    tile_floats = 2 * widest + 2 * key_size + spec.num_experts
    tile_bytes = TILE_TOKENS * (FLOAT32_BYTES * tile_floats + _quantized_bytes(widest))
    intermediate = max(spec.moe_intermediate_size, int(config.get("intermediate_size") or 0))
    expert_bytes = EXPERT_PAIRS * (FLOAT32_BYTES * intermediate + _quantized_bytes(intermediate))
    streamed_bytes = min(STREAMED_BYTES, EXPERT_PAIRS * FLOAT32_BYTES * 2 * intermediate)
    token_bytes = FLOAT32_BYTES * (3 * hidden_size + head_dim) + _quantized_bytes(hidden_size)
    token_bytes += PAIR_BYTES * spec.top_k + TOKEN_BYTES
    return tile_bytes + expert_bytes + streamed_bytes, token_bytes


def _quantized_bytes(columns: int) -> int:
    return int(QUANTIZED_COLUMN_BYTES * -(-columns // SUPERBLOCK) * SUPERBLOCK)
