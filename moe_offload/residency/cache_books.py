"""What native code computed from the cache's slots, booked afterwards."""

from __future__ import annotations

from collections.abc import Sequence

from moe_offload.residency.cache_pools import CachePools
from moe_offload.residency.slot_entry import Entry
from moe_offload.residency.slot_pool import RoutedStep, SlotPool


class CacheBooks(CachePools):
    """Log, counters and policies learn of steps that ran on ``resident_table``."""

    def used_residents(
        self,
        layer_idx: int,
        expert_ids: Sequence[int],
        weights: Sequence[float] | None,
        num_hits: int | None = None,
        above: Sequence[int] = (),
    ) -> None:
        """Count a step that ran on ``resident_table`` as ``begin`` and ``end`` would have.

        Args:
            num_hits: how many of what the router chose were used here; the others in another tier. None: all.
            above: those of them that the tier above served.
        """
        pool = self._pool_of[layer_idx]
        if self._keeps_log_of(pool):
            self.log.add(layer_idx, expert_ids, None, above)
        self._stats.hits += len(expert_ids) if num_hits is None else num_hits
        pool.routed(layer_idx, expert_ids, weights)

    def used_in_run(self, steps: list[RoutedStep], arrived: Sequence[tuple[int, int]] = ()) -> None:
        """Count steps that ran one after the other, as if each had been told alone.

        A token's steps told alone cost as much as a layer does.

        Args:
            arrived: (layer_idx, expert_id) of guesses that were used where they had been read to. Each
                becomes a resident at its layer, and somebody leaves for it. Where a later layer has used
                that one, its bytes are still in its slot: it comes back without being read.
        """
        came: dict[int, list[int]] = {}
        for layer_idx, expert_id in arrived:
            came.setdefault(layer_idx, []).append(expert_id)
        gone: list[Entry] = []
        first = 0
        for i, (layer_idx, expert_ids, _) in enumerate(steps) if came else ():
            back = [e for e in gone if e.key.layer_idx == layer_idx and e.key.expert_id in expert_ids]
            if layer_idx in came or back:
                self._used_at_once(steps[first:i])
                gone += self._used_newcomers(steps[i], came.get(layer_idx, []), back)
                first = i + 1
        self._used_at_once(steps[first:])

    def _used_newcomers(self, step: RoutedStep, came: list[int], back: list[Entry]) -> list[Entry]:
        """Count a step that used guesses which had arrived; return who left for them."""
        layer_idx, expert_ids, weights = step
        pool = self._pool_of[layer_idx]
        if self._keeps_log_of(pool):
            self.log.add(layer_idx, expert_ids, None, ())
        self._stats.prefetch_hits += len(came) + len(back)
        self._stats.hits += len(expert_ids) - len(came) - len(back)
        assert all(self.has_bytes(layer_idx, came)), f"layer {layer_idx}: of {came}, used, some are not there"
        pool.admit_arrived(layer_idx, came)
        for entry in back:
            pool.adopt(entry.key, pool.slot_address(entry.slot))
        pool.routed(layer_idx, expert_ids, weights)
        return self._evict_excess(pool)

    def _evict_excess(self, pool: SlotPool) -> list[Entry]:
        excess = len(pool.residents) - pool.capacity
        return pool.evict(excess, pool.residents.keys()) if excess > 0 else []

    def _used_at_once(self, steps: list[RoutedStep]) -> None:
        """``used_residents`` of steps that nobody came or left between."""
        if not self.booked_in_one(steps):
            for step in steps:
                self.used_residents(*step)

    def booked_in_one(self, steps: list[RoutedStep], above: Sequence[Sequence[int]] = ()) -> bool:
        """``_used_at_once`` in one go; False: nothing was booked, since each step has to be told alone.

        Args:
            above: by step, which experts the tier above served; nothing: it served none.
        """
        if len(self._pools) != 1 or (
            self._keeps_log_of(self._pools[0]) and not self.log.add_steps(steps, above)
        ):
            return False
        used = sum([len(expert_ids) for _, expert_ids, _ in steps])
        self._stats.hits += used - sum(map(len, above))
        self._pools[0].routed_steps(steps)
        return True

    def _keeps_log_of(self, pool: SlotPool) -> bool:
        """Whether somebody may ever leave, here or in the tier above: else the log has nothing to say."""
        return self.keeps_log and not (pool.is_full_size and (pool.above is None or pool.above.is_full_size))
