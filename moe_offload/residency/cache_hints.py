"""Reads that no step has asked for: guesses about the next layers, and a start where the last run ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_offload.residency.cache_pools import CachePools
from moe_offload.storage.expert_format import ExpertKey


class CacheHints(CachePools):
    """Speculation gives way to what a step needs; residents never give way to speculation."""

    def prefetch(self, keys: Iterable[ExpertKey], *, after_layer: int | None = None) -> None:
        """Start speculative reads, in order of ``keys``, into staging slots that no step claims.

        Drops what is in memory or on its way, and the rest when there is no room. A finished
        speculation that nobody claimed makes room (wasted) for one that is needed sooner; a resident
        never does.

        Args:
            after_layer: the layer that has just routed; None: the open step's, or none has.
        """
        if isinstance(self._open, int):
            return  # a stream uses all the slots
        if after_layer is None:
            after_layer = self._open.layer_idx if self._open is not None else -1
        for key in keys:
            pool = self._pool_of[key.layer_idx]
            if pool.find(key) is None and pool.make_room_for_hint(key, after_layer):
                pool.read(key, speculative=True)

    def contradict(self, layer_idx: int, expert_ids: Iterable[int]) -> None:
        """Cancel queued speculation of a layer whose router chose ``expert_ids`` instead."""
        pool = self._pool_of[layer_idx]
        if not pool.guesses:
            return
        guesses = [entry for entry in pool.guesses.values() if entry.key.layer_idx == layer_idx]
        if guesses:
            chosen = {int(expert_id) for expert_id in expert_ids}
            for entry in guesses:
                if entry.key.expert_id not in chosen:
                    pool.cancel(entry)

    def guessed_bytes(self, layer_idx: int) -> int:
        """Return the bytes of guesses being read or about to be, for the pool of a layer."""
        return self._pool_of[layer_idx].guessed_bytes()

    # Guesses that native code reads (early_reads.py).

    def lend_for_guesses(self, most: int, after_layer: int, reach: int) -> list[list[int]]:
        """Return by pool the addresses of at most ``most`` slots for guesses of the next ``reach`` layers.

        None while a stream is open: it uses all the slots. The loan ends with ``take_back``.
        """
        if isinstance(self._open, int):
            return []
        return [pool.lend(most, after_layer, reach) for pool in self._pools]

    def book_guess(self, key: ExpertKey, slot_address: int, ticket: int) -> None:
        """Take note of a read that was begun in a lent slot; again: nothing happens."""
        self._pool_of[key.layer_idx].book(key, slot_address, ticket)

    def book_cancelled(self, key: ExpertKey, ticket: int) -> None:
        """Take note of a guess's read that was cancelled; again: nothing happens."""
        pool = self._pool_of[key.layer_idx]
        entry = pool.guesses.get(key)
        if entry is not None and entry.ticket == ticket:
            pool.cancel(entry)

    def take_back(self) -> None:
        """End the loan: slots that nothing was booked for are free again."""
        for pool in self._pools:
            pool.take_back()

    # The start of a run (warm_start.py).

    def preload(self, keys: Iterable[ExpertKey]) -> None:
        """Queue reads of experts that shall become residents, in order, as far as there is room.

        They are the last in the reader's queue and give way to whatever a step or a prompt needs;
        ``absorb`` makes residents of what has arrived.
        """
        wanted = list(keys)
        for pool in self._pools:
            pool.preload(key for key in wanted if key.layer_idx in pool.table)

    def preload_share(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        """``preload`` some of a layer's experts, as far as its share of the pool goes."""
        pool = self._pool_of[layer_idx]
        row = pool.table[layer_idx]
        held = sum(entry is not None for entry in row)
        share = pool.capacity * len(row) // pool.num_experts
        absent = [i for i in expert_ids if row[i] is None][: max(0, share - held)]
        pool.preload(ExpertKey(layer_idx, expert_id) for expert_id in absent)

    @property
    def is_warming(self) -> bool:
        """Whether reads of ``preload`` have not become residents yet."""
        return any(pool.warming for pool in self._pools)

    def absorb(self) -> None:
        """Make residents of what ``preload`` has read meanwhile; nothing while a step or stream is open."""
        if self._open is None and self.is_warming:
            for pool in self._pools:
                pool.absorb()
