"""Key/value cache of fixed capacity: allocated once per layer, cropped and reordered in place.

transformers' DynamicCache concatenates for every token (4.4 ms a layer at 4,096 tokens) and grows
without asking anyone. This one is sized from the budget: ``capacity_tokens`` counts tokens over the
whole batch, so four beams of 1,000 tokens need what one sequence of 4,000 needs. Memory is touched
as tokens arrive. Sliding-window layers keep every token and are masked, which allows cropping. Recurrent
and convolution states are transformers' own; a sequence's state is counted in the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from moe_offload.errors import BudgetError
from moe_offload.runtime.state_layer import StateLayer


class KVCacheLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values: (batch, heads, capacity, head_dim), ``num_tokens`` of them in use.

    Multi-head latent attention caches its latent here (one head, keys and values of unlike width).
    """

    def __init__(self, capacity_tokens: int) -> None:
        super().__init__()
        self.capacity_tokens = capacity_tokens
        self.num_tokens = 0
        self.row_shape = 0, 0  # heads and head_dim of what it holds
        self.mirrored_tokens = 0  # that device_dense.py's copy on a device has as they are here

    @property
    def keys(self) -> Any:
        """The used part, or None; the name is the one that transformers reads."""
        return self.stored()[0] if self.is_initialized else None

    @keys.setter
    def keys(self, keys: None) -> None:
        """Take the None that transformers begins with."""
        assert keys is None, "keys come through update()"

    @property
    def values(self) -> Any:
        """As ``keys``."""
        return self.stored()[1] if self.is_initialized else None

    @values.setter
    def values(self, values: None) -> None:
        assert values is None, "values come through update()"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch that arrives first."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.row_shape = key_states.shape[1], key_states.shape[3]
        self._key_storage = self._allocate(key_states)
        self._value_storage = self._allocate(value_states)
        self._addresses = self._key_storage.data_ptr(), self._value_storage.data_ptr()
        self.is_initialized = True

    def _allocate(self, states: Tensor) -> Tensor:
        batch_size, num_heads, _, head_dim = states.shape
        return states.new_empty(batch_size, num_heads, self.capacity_tokens // batch_size, head_dim)

    def _to_storage(self, states: Tensor) -> Tensor:
        """Return states as they are kept."""
        return states

    def __getstate__(self) -> dict[str, Any]:
        """What a copy begins with: the used part, so that a copy takes no more memory than what it holds."""
        state = vars(self) | {"mirrored_tokens": 0}
        if self.is_initialized:
            state["held"] = [states.clone() for states in self.stored()]
            for name in ("_key_storage", "_value_storage", "_addresses"):
                del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with what ``__getstate__`` returned, in memory of this layer's own."""
        held = state.pop("held", None)
        self.__dict__.update(state)
        if held is not None:
            self._keep(*held)

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        """Make the storage anew, with these at its begin."""
        tokens = self.capacity_tokens // keys.shape[0]
        self._key_storage, self._value_storage = (_in_room_for(states, tokens) for states in (keys, values))
        self._addresses = self._key_storage.data_ptr(), self._value_storage.data_ptr()

    def stored(self) -> tuple[Tensor, Tensor]:
        """Return views of the used part as it is kept."""
        return self._key_storage[:, :, : self.num_tokens], self._value_storage[:, :, : self.num_tokens]

    @property
    def num_sequences(self) -> int:
        """Rows of the batch that it holds tokens of; 0 when it is empty."""
        return int(self._key_storage.shape[0]) if self.is_initialized and self.num_tokens else 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, new, head_dim) and return all cached keys and values.

        Raises:
            BudgetError: more tokens than the capacity that was reserved.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.mirrored_tokens = min(self.mirrored_tokens, self.num_tokens)
        end = self.num_tokens + key_states.shape[-2]
        if end > self._key_storage.shape[-2]:
            raise BudgetError(_too_many(self._key_storage.shape[-2], key_states.shape[0], end))
        self._key_storage[:, :, self.num_tokens : end] = self._to_storage(key_states)
        self._value_storage[:, :, self.num_tokens : end] = self._to_storage(value_states)
        self.num_tokens = end
        return self.keys, self.values

    def addresses(self, num_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
        """Return where one sequence's keys and values begin, for native code that appends by itself."""
        if not self.is_initialized:
            nothing = torch.empty(1, num_heads, 0, head_dim, dtype=dtype)
            self.lazy_initialization(nothing, nothing)
        return self._addresses

    def storage_addresses(self) -> tuple[int, int]:
        """Return where keys and values begin; something is cached."""
        return self._addresses

    def has_room_for(self, num_new: int, num_tokens: int, dtype: torch.dtype) -> bool:
        """Whether this layer holds ``num_tokens`` of one sequence and can take ``num_new`` more."""
        if self.num_tokens != num_tokens or num_tokens + num_new > self.capacity_tokens:
            return False
        return not self.is_initialized or (self._key_storage.shape[0] == 1 and self.dtype == dtype)

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_max_length(self) -> int:
        """No maximum as far as transformers' mask code is concerned; ``update`` enforces ours."""
        return -1

    def reset(self) -> None:
        """Forget every token; the memory goes back with the storage."""
        if not self.is_initialized:
            return
        self.num_tokens = self.mirrored_tokens = 0
        del self._key_storage, self._value_storage
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens (transformers passes a negative count)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        if self.is_initialized:
            self.num_tokens = max(0, self.num_tokens + tokens_to_remove)
            self.mirrored_tokens = min(self.mirrored_tokens, self.num_tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row b hold what row ``beam_idx[b]`` held (beam search)."""
        self.mirrored_tokens = 0
        if self.num_tokens:
            for states in self.stored():
                states.copy_(states.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times; the capacity is shared by more rows afterwards."""
        self._rebuild(lambda states: states.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        self._rebuild(lambda states: states[indices])

    def _rebuild(self, change: Callable[[Tensor], Tensor]) -> None:
        """Make the storage anew from what ``change`` makes of the used part."""
        self.mirrored_tokens = 0
        if not self.num_tokens:
            return
        keys, values = (change(states) for states in self.stored())
        tokens = self.capacity_tokens // keys.shape[0]
        if self.num_tokens > tokens:
            raise BudgetError(_too_many(tokens, keys.shape[0], self.num_tokens))
        self._keep(keys, values)


def _in_room_for(states: Tensor, tokens: int) -> Tensor:
    """Return a storage of ``tokens`` tokens that begins with ``states``."""
    storage = states.new_empty(*states.shape[:2], tokens, states.shape[3])
    storage[:, :, : states.shape[2]] = states
    return storage


def _too_many(held_tokens: int, num_sequences: int, wanted_tokens: int) -> str:
    return (
        f"the key/value cache holds {held_tokens} tokens for each of {num_sequences} sequences, but "
        f"{wanted_tokens} were asked for; load the model with context={wanted_tokens * num_sequences} or "
        "more, or let go of caches that were made before this one and still count"
    )


MakeLayer = Callable[[int], KVCacheLayer]


def make_layers(
    layer_types: Sequence[tuple[str, dict[str, Any]]],
    capacity_tokens: int,
    make_layer: MakeLayer = KVCacheLayer,
) -> list[Any]:
    """Return one cache layer for each (transformers' layer type, its arguments)."""
    layers: list[Any] = []
    for kind, kwargs in layer_types:
        if kind in ("full_attention", "sliding_attention", "chunked_attention"):
            layers.append(make_layer(capacity_tokens))
        elif kind in ("linear_attention", "conv"):
            layers.append(StateLayer(**kwargs))
        else:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs))
    return layers


class KVCache(Cache):  # type: ignore[misc]
    """Cache of every decoder layer, ``capacity_tokens`` over the whole batch.

    Args:
        layer_types: by layer, transformers' name of its attention and the cache layer's arguments.
        make_layer: makes an attention layer's cache of so many tokens.
    """

    def __init__(
        self,
        layer_types: Sequence[tuple[str, dict[str, Any]]],
        capacity_tokens: int,
        make_layer: MakeLayer = KVCacheLayer,
    ) -> None:
        super().__init__(layers=make_layers(layer_types, capacity_tokens, make_layer))
        self.capacity_tokens, self.make_layer = capacity_tokens, make_layer

    @property
    def num_sequences(self) -> int:
        """Rows of the batch that it holds; 0 when it is empty."""
        for layer in self.layers:
            if isinstance(layer, KVCacheLayer):
                if layer.num_sequences:
                    return layer.num_sequences
                continue
            keys = getattr(layer, "keys", None)
            if keys is not None and keys.ndim == 4 and keys.shape[-2]:
                return int(keys.shape[0])
        return 0

    @property
    def used_tokens(self) -> int:
        """Tokens held, over the whole batch."""
        return int(self.get_seq_length()) * self.num_sequences

    @property
    def can_forget(self) -> bool:
        """Whether ``crop_to`` works: no layer keeps a running state."""
        return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)

    def has_room_for(self, num_new: int, dtype: torch.dtype) -> bool:
        """Whether every layer holds the same tokens of one sequence and can take ``num_new`` more."""
        num_tokens = self.get_seq_length()
        for layer in self.layers:
            if not (isinstance(layer, KVCacheLayer) and layer.has_room_for(num_new, num_tokens, dtype)):
                return False
        return True

    def is_of(self, num_layers: int, row_shape: tuple[int, int]) -> bool:
        """Whether it is empty or holds what so many layers with such rows have made; all rows are alike."""
        first = self.layers[0]
        return len(self.layers) == num_layers and (not first.is_initialized or first.row_shape == row_shape)

    def grew_by(self, num_tokens: int) -> None:
        """Count the tokens that native code has written behind the others in every layer."""
        for layer in self.layers:
            layer.num_tokens += num_tokens

    def crop_to(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens of every sequence.

        Raises:
            ConfigError: fewer than it holds, and a layer keeps a running state.
        """
        length = self.get_seq_length()
        for layer in self.layers:
            held = layer.get_seq_length() if hasattr(layer, "get_seq_length") else length
            layer.crop(min(0, num_tokens - held))
