"""Key/value caches within the context that was budgeted, over whoever made them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import Cache

from moe_offload.errors import BudgetError
from moe_offload.runtime.kv_cache import KVCache
from moe_offload.runtime.packed_kv import layer_class


class ContextRoom:
    """Who holds how much of ``context_tokens``, over the whole batch.

    Args:
        layer_types: of a cache (kv_cache.make_layers).
        kv: how keys and values are kept (planning.kv_format).
        state_tokens: what one more sequence's running state weighs, in tokens of cache.
    """

    def __init__(
        self,
        context_tokens: int,
        layer_types: Sequence[tuple[str, dict[str, Any]]],
        kv: str | None = None,
        state_tokens: int = 0,
    ) -> None:
        self.context_tokens, self.layer_types = context_tokens, layer_types
        self.kv, self.state_tokens = kv, state_tokens
        self.caches: weakref.WeakSet[KVCache] = weakref.WeakSet()

    def new_cache(self, max_tokens: int | None = None, batch_size: int = 1) -> KVCache:
        """Return an empty key/value cache for ``batch_size`` sequences of up to ``max_tokens``.

        Raises:
            BudgetError: together with the caches still alive it would pass the budgeted context.
        """
        wanted_tokens = self._weight((max_tokens or 1) * batch_size, batch_size)
        if wanted_tokens + self._held_tokens() > self._room_tokens:
            gc.collect()  # a cache that only a reference cycle keeps alive does not count
        held_tokens = self._held_tokens()
        if wanted_tokens + held_tokens > self._room_tokens:
            raise BudgetError(
                f"{batch_size} sequence(s) of up to {max_tokens} tokens need a key/value cache of "
                + self._refusal(wanted_tokens, held_tokens)
            )
        room_tokens = self.context_tokens - self._held_tokens(stateless=True)
        cache = KVCache(self.layer_types, room_tokens, layer_class(self.kv))
        self.caches.add(cache)
        return cache

    def check(self, num_tokens: int, batch_size: int, cache: Cache | None) -> None:
        """Refuse a forward that would pass the budgeted context, whoever made its cache.

        Caches made together are empty and each may fill the whole context, and a caller's own cache
        asks nobody before it grows.

        Raises:
            BudgetError: this call and the other caches in use need more than was budgeted.
        """
        cached_tokens = cache.get_seq_length() if cache is not None else 0
        if isinstance(cache, KVCache):
            self.caches.add(cache)  # it may be a copy of another
        wanted_tokens = self._weight(batch_size * (cached_tokens + num_tokens), batch_size)
        held_tokens = self._held_tokens(besides=cache)
        if wanted_tokens + held_tokens > self._room_tokens:
            gc.collect()
            held_tokens = self._held_tokens(besides=cache)
        if wanted_tokens + held_tokens > self._room_tokens:
            raise BudgetError(
                f"{batch_size} sequence(s) of {cached_tokens + num_tokens} tokens are "
                + self._refusal(wanted_tokens, held_tokens)
            )

    @property
    def _room_tokens(self) -> int:
        """The context and the state of one sequence, in tokens of key/value cache."""
        return self.context_tokens + self.state_tokens

    def _weight(self, num_tokens: int, num_sequences: int) -> int:
        return num_tokens + num_sequences * self.state_tokens

    def _held_tokens(self, besides: Cache | None = None, *, stateless: bool = False) -> int:
        return sum(
            cache.used_tokens if stateless else self._weight(cache.used_tokens, cache.num_sequences)
            for cache in self.caches
            if cache is not besides
        )

    def _refusal(self, wanted_tokens: int, held_tokens: int) -> str:
        """The end of a BudgetError: what was budgeted, what is held, what would do."""
        one_state = self.state_tokens
        beside = f" (each sequence's running state counts as {one_state} of them)" if one_state else ""
        return (
            f"{wanted_tokens} tokens{beside}, but {self._room_tokens} were budgeted"
            + (f" and {held_tokens} are held by caches still alive" if held_tokens else "")
            + f"; load the model with context={wanted_tokens + held_tokens - one_state} "
            "or ask for fewer tokens"
        )
