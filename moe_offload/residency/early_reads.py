"""Guesses that native code reads while a token's layers run in one call: slots lent before, books after.

The door to ``_native.EarlyReads``, which does what ``Prefetcher.look_ahead_one`` does. Between ``begin``
and ``end`` no slot is looked for elsewhere. Whatever interrupts, ``end`` may be called again: it books what
was begun since, once.
"""

from __future__ import annotations

from typing import Any

from moe_offload import _native
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.prefetch_pace import Pace
from moe_offload.storage.expert_format import ExpertKey
from moe_offload.storage.expert_store import ExpertStore

LENT_SLOTS = 8  # of each pool: more than are read between two returns, as a rule


class EarlyReads:
    """``native`` may read into slots of ``cache`` between ``begin`` and ``end``.

    Args:
        one_token: of the predictor, made natively (predictors/one_token.py).

    Attributes:
        has_lent: between ``begin`` and ``end``.
    """

    def __init__(self, cache: ExpertCache, store: ExpertStore, one_token: Any, pace: Pace) -> None:
        self._cache, self._store, self._pace = cache, store, pace
        self.has_lent = False
        self.native = _native.EarlyReads(store.reader, one_token.native, pace.layers)
        for layer_idx, pool in cache.pool_numbers().items():
            segments = store.segments(layer_idx)
            assert segments is not None, "who puts blocks together reads through Python"
            table, row = cache.resident_table(layer_idx), one_token.history_row(layer_idx)
            firsts = [store.addresses(ExpertKey(layer_idx, i), 0) for i in range(len(segments))]
            num_bytes = cache.expert_bytes(layer_idx)
            self.native.add_layer(layer_idx, segments, firsts, num_bytes, pool, row, table)

    @staticmethod
    def serves(cache: ExpertCache, one_token: Any) -> ExpertStore | None:
        """Return the store of all experts where native code can begin reads from it; else None."""
        store = cache.store
        if getattr(one_token, "native", None) is None or not isinstance(store, ExpertStore):
            return None
        if any(store.segments(layer_idx) is None for layer_idx in cache.pool_numbers()):
            return None
        return store

    def begin(self, threshold: float, depth: int, free_bytes: float, after_layer: int) -> _native.EarlyReads:
        """Lend slots and tell what holds now, unless they are lent; ``end`` takes them back.

        Args:
            depth: layers ahead that are asked for.
            free_bytes: of reads under way that hold up nobody.
            after_layer: the layer that has just routed; -1: none has.
        """
        if self.has_lent:
            return self.go_on()
        self.has_lent = True
        self.native.set(threshold, depth, self._pace.bytes_per_s, free_bytes, self._cache.stats.stall_s)
        self.native.lend(self._cache.lend_for_guesses(LENT_SLOTS, after_layer, depth))
        return self.native

    def go_on(self) -> _native.EarlyReads:
        """Tell what was waited for since ``begin``; what was lent then still is."""
        self.native.set_stall_s(self._cache.stats.stall_s)
        return self.native

    def end(self) -> list[tuple[int, int]]:
        """Book what was read and cancelled, and take the other slots back.

        Returns:
            (layer_idx, expert_id) of guesses that had arrived when a run came to their layer, and that it
            used, in that order; ``cache.used_in_run`` has to hear of them.
        """
        if not self.has_lent:
            return []
        self.native.lend([])
        events, used = self.native.events(), self.native.used()
        for is_read, layer_idx, expert_id, address, ticket in events:
            key = ExpertKey(layer_idx, expert_id)
            if is_read:
                self._store.adopt(ticket, key)
                self._cache.book_guess(key, address, ticket)
            else:
                self._cache.book_cancelled(key, ticket)
        if events or used:
            self.native.clear_events()
        self._cache.take_back()
        self.has_lent = False
        return used
