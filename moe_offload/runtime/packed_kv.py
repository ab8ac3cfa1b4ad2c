"""A key/value cache of fewer bits: every head's row as ggml's Q8_0 blocks, 34 bytes for 32 numbers.

Lossy, and only where ``kv="q8_0"`` asks for it; bench/perplexity.py prints what it costs. A row is
rounded by itself when it arrives and never again, so neither chunks nor budget change a bit. The native
decode step reads the blocks in place; transformers' layers get a layer's rows unpacked, one layer at a
time, which the budget counts (planning.kv_format.unpacked_kv_bytes).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_offload.errors import ConfigError
from moe_offload.planning.kv_format import KV_BLOCK_BYTES, KV_BLOCK_ELEMENTS
from moe_offload.runtime.kv_cache import KVCacheLayer

CODE_MAX = 127


def pack(states: Tensor) -> Tensor:
    """Return (..., head_dim) numbers as (..., head_dim / 32 * 34) bytes; as csrc/decode/packed_cache.cpp."""
    blocks = states.float().reshape(*states.shape[:-1], -1, KV_BLOCK_ELEMENTS)
    amax = blocks.abs().amax(-1, keepdim=True)
    # A number over a tensor would be its reciprocal times the number: rounded twice.
    inverse = torch.where(amax > 0, torch.full_like(amax, CODE_MAX) / amax, 0.0)
    codes = (blocks * inverse).nan_to_num(0.0).round().clamp(-CODE_MAX, CODE_MAX).to(torch.int8)
    scales = (amax / CODE_MAX).half().view(torch.uint8)
    return torch.cat([scales, codes.view(torch.uint8)], -1).flatten(-2)


def unpack(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers of ``pack``'s bytes, rounded once to ``dtype``."""
    blocks = rows.reshape(*rows.shape[:-1], -1, KV_BLOCK_BYTES)
    scales = blocks[..., :2].contiguous().view(torch.float16).float()
    numbers: Tensor = blocks[..., 2:].view(torch.int8) * scales
    return numbers.to(dtype).flatten(-2)


class PackedKVCacheLayer(KVCacheLayer):
    """One layer's keys and values, packed: (batch, heads, capacity, head_dim / 32 * 34) bytes."""

    @property
    def keys(self) -> Any:
        """The used part, unpacked, or None."""
        return unpack(self.stored()[0], self.dtype) if self.is_initialized else None

    @keys.setter
    def keys(self, keys: None) -> None:
        assert keys is None, "keys come through update()"

    @property
    def values(self) -> Any:
        """As ``keys``."""
        return unpack(self.stored()[1], self.dtype) if self.is_initialized else None

    @values.setter
    def values(self, values: None) -> None:
        assert values is None, "values come through update()"

    def _allocate(self, states: Tensor) -> Tensor:
        batch_size, num_heads, _, head_dim = states.shape
        if head_dim % KV_BLOCK_ELEMENTS:
            raise ConfigError(
                f"kv='q8_0' packs cached rows in blocks of {KV_BLOCK_ELEMENTS} numbers, and this model has "
                f"rows of {head_dim}; load it without kv"
            )
        row_bytes = head_dim // KV_BLOCK_ELEMENTS * KV_BLOCK_BYTES
        tokens = self.capacity_tokens // batch_size
        return torch.empty(batch_size, num_heads, tokens, row_bytes, dtype=torch.uint8)

    def _to_storage(self, states: Tensor) -> Tensor:
        return pack(states)


def layer_class(kv: str | None) -> type[KVCacheLayer]:
    """Return what keeps a layer's keys and values in the format ``kv`` (planning.kv_format)."""
    return PackedKVCacheLayer if kv else KVCacheLayer
