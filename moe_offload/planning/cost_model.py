"""What things cost, in bytes and seconds: the arithmetic of budgets and ceilings.

Pure functions on ints. Legend: T tokens, H hidden_size, I an MLP's intermediate size, K top_k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_offload.config import MIB, PREFILL_CHUNK_TOKENS, ModelSpec
from moe_offload.planning.kv_format import FLOAT32_BYTES, cached_bytes
from moe_offload.storage.expert_format import ExpertLayout

TOKENIZER_BYTES_PER_TOKEN = 1300  # measured: a GGUF's 151k tokens add 145 MiB, 187 MiB while loading
ALLOCATOR_SLACK_BYTES = (
    32 * MIB
)  # what malloc keeps between uses and Python grows by (measured: 20 to 30 MiB)
ATTENTION_WIDTH_IN_HIDDEN_SIZES = 12  # query, key, value before and after rotary, context, its projection
RESIDUAL_WIDTH_IN_HIDDEN_SIZES = 6  # residual, normed, router input, float32 copy, sum of experts, result
MLP_INTERMEDIATES = 3  # gate, up, their product
DELTA_NET_CHUNK_TOKENS = 64  # of transformers' gated delta rule
READER_THREADS = 4  # storage.io.DEFAULT_NUM_IO_THREADS
DEVICE_ALIGNMENT = 256
RANGE_TOKENS = 256  # csrc/decode/token_kernels.h: kRangeTokens
LOGITS_COPIES = 3  # as computed, float32 for sampling, sorted or softmaxed


def tokenizer_bytes(spec: ModelSpec) -> int:
    """Return what a tokenizer takes, its loading included."""
    return TOKENIZER_BYTES_PER_TOKEN * spec.vocab_size


def kv_bytes(
    spec: ModelSpec, *, context_tokens: int, batch_size: int, bytes_per_element: int, kv: str | None = None
) -> int:
    """Return the bytes of a KV cache that holds ``context_tokens`` for every sequence of the batch.

    Args:
        kv: how it is kept, see kv_format.
    """
    return token_kv_bytes(spec, bytes_per_element=bytes_per_element, kv=kv) * context_tokens * batch_size


def token_kv_bytes(spec: ModelSpec, *, bytes_per_element: int, kv: str | None = None) -> int:
    """Return the bytes of one token's keys and values over all layers."""
    return sum(
        cached_bytes(elements, bytes_per_element=bytes_per_element, kv=kv)
        for elements in spec.kv_elements_per_token
    )


def device_workspace_bytes(spec: ModelSpec, num_tokens: int = PREFILL_CHUNK_TOKENS) -> int:
    """Return what one layer's inputs (T, H), gate and up (T K, 2I) and rows (T K, H) take on a device."""
    num_pairs = num_tokens * spec.top_k
    width = 2 * spec.moe_intermediate_size + spec.hidden_size
    return FLOAT32_BYTES * (num_tokens * spec.hidden_size + num_pairs * width)


def aligned(num_bytes: int) -> int:
    """Round up to what every tensor on a device is aligned to."""
    return -(-num_bytes // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT


def dense_workspace_bytes(
    spec: ModelSpec, num_heads: int, head_dim: int, context_tokens: int, intermediate_size: int = 0
) -> int:
    """Return what dense layers take on a device beside weights, keys and values, for one token and for many.

    One token, by range of cached tokens and head: maximum, sum and weighted values (head_dim); twice the
    projections and hidden states, float and quantized; the logits; rows of experts; tables.

    Args:
        intermediate_size: of the widest dense network, 0 where there is none.
    """
    ranges = num_heads * (-(-context_tokens // RANGE_TOKENS) + 1)
    rows = 4 * num_heads * head_dim + (4 + 2 * spec.top_k) * spec.hidden_size
    elements = ranges * (head_dim + 2) + 4 * rows + 2 * spec.vocab_size + 4 * spec.num_experts
    of_tile = dense_tile_bytes(spec, num_heads, head_dim, intermediate_size)
    return FLOAT32_BYTES * elements + of_tile + MIB


def dense_tile_bytes(
    spec: ModelSpec,
    num_heads: int,
    head_dim: int,
    intermediate_size: int,
    num_tokens: int = PREFILL_CHUNK_TOKENS,
) -> int:
    """Return what a tile of a prompt takes there (csrc/cuda/dense_prompt.cu).

    Of each token: residual, router's input and product; query and context; key and value, and both as they
    are cached; angles, scores and choice; the widest of these and of a network's units quantized, and those
    as they are.
    """
    query_size, key_values = num_heads * head_dim, max(spec.kv_elements_per_token, default=0)
    floats = 3 * spec.hidden_size + 2 * query_size + 2 * key_values + head_dim + spec.num_experts
    floats += 2 * spec.top_k + intermediate_size
    packed = max(spec.hidden_size, query_size) + intermediate_size
    return num_tokens * (FLOAT32_BYTES * floats + 2 * packed)


def device_host_bytes(spec: ModelSpec, num_tokens: int = PREFILL_CHUNK_TOKENS) -> int:
    """Return what a device's launches take in RAM: inputs (T, H), rows (T K, H) as they come and in place.

    A prompt's states in dense layers cross in as much: (T, H) there, twice that back.
    """
    return FLOAT32_BYTES * spec.hidden_size * num_tokens * (4 + 2 * spec.top_k)


def state_bytes(spec: ModelSpec) -> int:
    """Return the bytes of one sequence's recurrent and convolution state; counted in float32."""
    return FLOAT32_BYTES * sum(spec.state_elements_per_sequence)


def state_tokens(spec: ModelSpec, *, bytes_per_element: int, kv: str | None = None) -> int:
    """Return how many tokens of key/value cache one sequence's state weighs (0 without any state).

    A budget holds the state of one sequence beside ``context`` tokens; each further sequence of a
    batch takes the place of so many tokens.
    """
    token_bytes = token_kv_bytes(spec, bytes_per_element=bytes_per_element, kv=kv)
    return -(-state_bytes(spec) // token_bytes) if token_bytes else 0


def activation_bytes(
    spec: ModelSpec,
    *,
    context_tokens: int,
    batch_size: int = 1,
    dense_intermediate_size: int = 0,
    num_tokens: int = PREFILL_CHUNK_TOKENS,
) -> int:
    """Return the bytes of activations while one chunk of ``num_tokens`` passes a layer, in float32.

    Conservative: everything that a layer makes is taken to be alive at once, and bf16 models are
    counted as float32, since expert rows and logits are float32 anyway.

    Args:
        dense_intermediate_size: of the widest dense or shared MLP; 0 when there is none.
    """
    residual = RESIDUAL_WIDTH_IN_HIDDEN_SIZES * num_tokens * spec.hidden_size
    attention = ATTENTION_WIDTH_IN_HIDDEN_SIZES * num_tokens * spec.hidden_size
    mask = num_tokens * context_tokens  # one row of the causal mask for every token
    dense_mlp = MLP_INTERMEDIATES * num_tokens * dense_intermediate_size
    expert_rows = num_tokens * (spec.hidden_size + MLP_INTERMEDIATES * spec.moe_intermediate_size)
    routing = LOGITS_COPIES * num_tokens * (spec.num_experts + 2 * spec.top_k)
    logits = LOGITS_COPIES * batch_size * spec.vocab_size
    # What the native ops keep: inputs quantized to int16 with scales and sums, an expert's intermediates.
    widest = max(spec.moe_intermediate_size, dense_intermediate_size)
    native = num_tokens * (spec.hidden_size + 2 * widest)
    return FLOAT32_BYTES * (native + residual + attention + mask + dense_mlp + expert_rows + routing + logits)


def attention_bytes(*, num_heads: int, head_dim: int, context_tokens: int, stores_scores: bool) -> int:
    """Return what attention over a full context makes beside the cache, in float32.

    Keys and values of grouped heads are repeated for every head before a masked attention, and an
    expanded latent (MLA) has that size too. Eager attention also stores its scores: as computed,
    masked and after softmax.
    """
    expanded = 2 * num_heads * head_dim * context_tokens
    scores = 3 * num_heads * PREFILL_CHUNK_TOKENS * context_tokens if stores_scores else 0
    return FLOAT32_BYTES * (expanded + scores)


def running_state_workspace_bytes(config: Mapping[str, Any]) -> int:
    """Return what one chunk of a prompt makes in a layer with a running state, in float32.

    Widths of one token, times how many copies PyTorch's reference makes of them (measured at
    Qwen3-Next's and Granite-4.0-H-Tiny's sizes: 188 of these 248 MiB, 167 of these 288 MiB).
    """
    elements = 0
    if config.get("linear_num_value_heads"):
        heads, key_dim = config["linear_num_value_heads"], config["linear_key_head_dim"]
        head_dim = max(key_dim, config["linear_value_head_dim"])
        conv_dim = 2 * config["linear_num_key_heads"] * key_dim + heads * config["linear_value_head_dim"]
        elements = 16 * heads * head_dim + 6 * conv_dim + 6 * heads * DELTA_NET_CHUNK_TOKENS
    elif config.get("mamba_n_heads"):
        heads, inner = config["mamba_n_heads"], config.get("mamba_expand", 2) * config["hidden_size"]
        chunk_tokens = config.get("mamba_chunk_size", 256)
        elements = 8 * heads * config["mamba_d_state"] + 8 * inner + 6 * heads * chunk_tokens
    elif config.get("conv_L_cache"):
        elements = 6 * config["hidden_size"]
    return int(FLOAT32_BYTES * PREFILL_CHUNK_TOKENS * elements)


def scale_copies_bytes(layouts: Mapping[int, ExpertLayout]) -> int:
    """Return what the reader's threads keep while they put codes and scales together: the scales."""
    scales = (matrix.scale_bytes for layout in layouts.values() for matrix in layout.matrices)
    return READER_THREADS * max(scales, default=0)


def workspace_bytes(
    spec: ModelSpec, config: Mapping[str, Any], *, context_tokens: int, stores_scores: bool
) -> int:
    """Return the bytes beside weights and cache while a prompt runs: activations, attention, slack.

    Args:
        config: the checkpoint's config.json; keys that it leaves out have no part in the shape.
        stores_scores: the family runs eager attention.
    """
    num_heads = int(config["num_attention_heads"])
    head_dim = config.get("head_dim") or spec.hidden_size // num_heads
    latent_dims = [config.get(name) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
    activations = activation_bytes(
        spec,
        context_tokens=context_tokens,
        dense_intermediate_size=config.get("intermediate_size") or 0,
    )
    attention = attention_bytes(
        num_heads=num_heads,
        head_dim=max(head_dim, sum(latent_dims)),
        context_tokens=context_tokens,
        stores_scores=stores_scores,
    )
    return activations + attention + running_state_workspace_bytes(config) + ALLOCATOR_SLACK_BYTES


@dataclass(frozen=True)
class TokenBytes:
    """What one decoded token reads, in the bytes of the file: the floor under any decoder's time."""

    dense_bytes: int  # attention, routers, shared experts, norms, head
    expert_bytes: int  # top_k of every layer
    kv_bytes: int  # keys and values of the tokens before it

    @property
    def total_bytes(self) -> int:
        return self.dense_bytes + self.expert_bytes + self.kv_bytes


def decode_floor_s(
    token: TokenBytes, *, ram_bytes_per_s: float, missed_bytes: float = 0.0, disk_bytes_per_s: float = 1.0
) -> float:
    """Return the least seconds of a token: memory and disk are read at full speed, at the same time.

    Args:
        missed_bytes: what a token needs and memory does not hold.
    """
    return max(token.total_bytes / ram_bytes_per_s, missed_bytes / disk_bytes_per_s)


def prefill_floor_s(streamed_bytes: float, disk_bytes_per_s: float) -> float:
    """Return the least seconds of a prompt whose experts come from disk: each is read once a chunk."""
    return streamed_bytes / disk_bytes_per_s
