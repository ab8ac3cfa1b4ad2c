"""Key/value cache of fixed capacity: allocated once per layer, cropped and reordered in place.

transformers' DynamicCache concatenates for every token (4.4 ms a layer at 4,096 tokens) and grows
without asking anyone. This one is sized from the budget: ``capacity_tokens`` counts tokens over the
whole batch, so four beams of 1,000 tokens need what one sequence of 4,000 needs. Memory is touched
as tokens arrive. Sliding-window layers keep every token and are masked, which allows cropping.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from moe_offload.errors import BudgetError


class KVCacheLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values: (batch, heads, capacity, head_dim), ``num_tokens`` of them in use.

    Multi-head latent attention caches its latent here (one head, keys and values of unlike width).
    """

    keys: Any  # the used part, or None; the names are those that transformers reads
    values: Any

    def __init__(self, capacity_tokens: int) -> None:
        super().__init__()
        self.capacity_tokens = capacity_tokens
        self.num_tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch that arrives first."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._key_storage = self._allocate(key_states)
        self._value_storage = self._allocate(value_states)
        self.is_initialized = True
        self._show()

    def _allocate(self, states: Tensor) -> Tensor:
        batch_size, num_heads, _, head_dim = states.shape
        return states.new_empty(batch_size, num_heads, self.capacity_tokens // batch_size, head_dim)

    def _show(self) -> None:
        self.keys = self._key_storage[:, :, : self.num_tokens]
        self.values = self._value_storage[:, :, : self.num_tokens]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, new, head_dim) and return all cached keys and values as views.

        Raises:
            BudgetError: more tokens than the capacity that was reserved.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.num_tokens + key_states.shape[-2]
        if end > self._key_storage.shape[-2]:
            batch_size = key_states.shape[0]
            raise BudgetError(
                f"the key/value cache holds {self._key_storage.shape[-2]} tokens for each of {batch_size} "
                f"sequences, but {end} were asked for; load the model with context={end * batch_size} or more"
            )
        self._key_storage[:, :, self.num_tokens : end] = key_states
        self._value_storage[:, :, self.num_tokens : end] = value_states
        self.num_tokens = end
        self._show()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_max_length(self) -> int:
        """No maximum as far as transformers' mask code is concerned; ``update`` enforces ours."""
        return -1

    def reset(self) -> None:
        """Forget every token; the memory goes back with the storage."""
        if not self.is_initialized:
            return
        self.num_tokens = 0
        self.keys = self.values = None
        del self._key_storage, self._value_storage
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens (transformers passes a negative count)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        if self.is_initialized:
            self.num_tokens = max(0, self.num_tokens + tokens_to_remove)
            self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row b hold what row ``beam_idx[b]`` held (beam search)."""
        if self.num_tokens:
            self.keys.copy_(self.keys.index_select(0, beam_idx))
            self.values.copy_(self.values.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times; the capacity is shared by more rows afterwards."""
        if self.num_tokens:
            self._rebuild(self.keys.repeat_interleave(repeats, 0), self.values.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        if self.num_tokens:
            self._rebuild(self.keys[indices], self.values[indices])

    def _rebuild(self, keys: Tensor, values: Tensor) -> None:
        num_tokens = self.num_tokens
        self.reset()
        self.update(keys, values)
        assert self.num_tokens == num_tokens


class KVCache(Cache):  # type: ignore[misc]
    """Cache of every decoder layer, ``capacity_tokens`` over the whole batch."""

    def __init__(self, num_hidden_layers: int, capacity_tokens: int) -> None:
        super().__init__(layers=[KVCacheLayer(capacity_tokens) for _ in range(num_hidden_layers)])
        self.capacity_tokens = capacity_tokens

    @property
    def used_tokens(self) -> int:
        """Tokens held, over the whole batch."""
        layer = self.layers[0]
        return layer.num_tokens * layer.keys.shape[0] if layer.num_tokens else 0

    def crop_to(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens of every sequence."""
        for layer in self.layers:
            layer.crop(min(0, num_tokens - layer.num_tokens))
