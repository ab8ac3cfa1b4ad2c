"""What happens to an expert cache between steps: its policies, its memory, the tier above, its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from numpy.typing import NDArray

from moe_offload.errors import CheckpointError, DeviceError
from moe_offload.planning.eviction import EvictionPolicy
from moe_offload.planning.slots import staging_slots
from moe_offload.residency.cache_pools import CachePools
from moe_offload.residency.slot_entry import SlotState
from moe_offload.residency.slot_pool import SlotPool
from moe_offload.storage.expert_format import ExpertKey


class CacheUpkeep(CachePools):
    """Policies to exchange, slots to give back, residents for a tier above to copy from."""

    def policy_states(self) -> list[Mapping[str, NDArray[Any]]]:
        """Return what each pool's policy has learned; empty where it keeps none of it."""
        for pool in self._pools:
            pool.tell_policy()
        states = (getattr(pool.policy, "state", None) for pool in self._pools)
        return [state() if state is not None else {} for state in states]

    def restore_policies(self, states: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        """Let policies go on from ``policy_states`` of the same policies; before any step.

        Raises:
            ValueError, KeyError: a state contradicts itself; the policies are then new ones.
        """
        try:
            for pool, state in zip(self._pools, states, strict=len(states) > 0):
                if state:
                    pool.policy.restore(state)  # type: ignore[attr-defined]
        except (ValueError, KeyError):
            for pool in self._pools:
                pool.policy = self._policy_factory()
            raise

    def use_policy(
        self,
        policy_factory: Callable[[], EvictionPolicy],
        states: Sequence[Mapping[str, NDArray[Any]]] = (),
    ) -> None:
        """Go on with other policies, between steps; the residents stay, and the new policies learn of them.

        Args:
            states: what earlier policies of the kind had learned (``policy_states``).
        """
        assert self._open is None, "a policy is changed between steps"
        self._policy_factory = policy_factory
        for number, pool in enumerate(self._pools):
            policy = policy_factory()
            if number < len(states) and states[number]:
                policy.restore(states[number])  # type: ignore[attr-defined]
            for key in pool.residents:
                policy.on_insert(key)
            pool.policy = policy

    # A faster tier, filled from this one (device_tier.py).

    def put_below(
        self, above: CachePools, finish_copies: Callable[[], None], *, exclusive: bool = True
    ) -> None:
        """Let ``above`` be filled from here.

        Args:
            finish_copies: waits until ``above`` copies nothing that this one holds.
            exclusive: what ``above`` has is the first to leave here where slots are wanted.
        """
        for layer_idx, pool in self._pool_of.items():
            pool.above = above._pool_of.get(layer_idx)
            pool.finish_copies = finish_copies
        self.log.watch_above(above._all_residents, lambda: above.hits_and_needs)
        self.use_division(exclusive=exclusive)

    def use_division(self, staging_per_top_k: float | None = None, exclusive: bool | None = None) -> None:
        """Divide the slots otherwise, between steps; None: as it is.

        Args:
            staging_per_top_k: times top_k, the slots that are kept for reads in flight.
            exclusive: as in ``put_below``.
        """
        assert self._open is None, "slots are divided between steps"
        if exclusive is not None:
            for pool in self._pools:
                pool.exclusive = exclusive
        if staging_per_top_k is None:
            return
        self.finish_reads()
        for pool in self._pools:
            pool.staging_per_top_k = staging_per_top_k
            for entry in list(pool.staged.values()):
                pool.discard(entry)
            pool.num_staging = self._staging(pool, pool.num_slots)
            pool.evict(max(0, len(pool.residents) - pool.capacity), pool.residents.keys())

    def _staging(self, pool: SlotPool, num_slots: int) -> int:
        return staging_slots(num_slots, pool.num_experts, self._top_k, pool.staging_per_top_k)

    def stand_alone(self) -> None:
        """End ``put_below``: the tier above is gone."""
        for pool in self._pools:
            pool.above, pool.finish_copies, pool.held = None, None, {}

    def hold(self, key: ExpertKey) -> int:
        """Keep an expert whose bytes are there until ``let_go``; returns the address of its slot."""
        return self._pool_of[key.layer_idx].hold(key)

    def let_go(self, key: ExpertKey) -> None:
        """End one ``hold``."""
        self._pool_of[key.layer_idx].let_go(key)

    # Memory.

    def give_back(self, num_bytes: int) -> int:
        """Evict by policy and return slots to the system; the cache stays smaller from then on.

        Never below one token's experts, and nothing while a step or stream is open.

        Returns:
            Bytes given back: whole slots, so perhaps more than asked, or less at the minimum.
        """
        given = 0
        while self._pools and self._open is None and given < num_bytes:
            pool = max(self._pools, key=lambda pool: self._spare_slots(pool) * pool.slot_bytes)
            count = min(-(-(num_bytes - given) // pool.slot_bytes), self._spare_slots(pool))
            if count <= 0:
                break
            self._shrink(pool, count)
            given += count * pool.slot_bytes
        return given

    def _spare_slots(self, pool: SlotPool) -> int:
        least = min(self._top_k, max(len(row) for row in pool.table.values()))
        return max(0, pool.num_slots - least)

    def _shrink(self, pool: SlotPool, count: int) -> None:
        """Take ``count`` slots out of a pool for good and hand their pages back."""
        for entry in list(pool.staged.values()):
            pool.discard(entry)
        pool.drain()
        num_slots = pool.num_slots - count
        pool.num_staging = self._staging(pool, num_slots)
        pool.num_slots = num_slots
        pool.evict(max(0, len(pool.residents) - pool.capacity), pool.residents.keys())
        for _ in range(count):
            address = pool.slot_address(pool.free.pop())
            if self.unpin is not None:
                self.unpin(address, pool.slot_bytes)
            self._arena.give_back(address - self._arena.address, pool.slot_bytes)
        self._stats.slots_given_back += count

    def keep_only(self, keys: Iterable[ExpertKey]) -> None:
        """Let all residents leave but ``keys``, between steps, and whatever was being read."""
        assert self._open is None, "residents leave between steps"
        self.finish_reads()
        kept = set(keys)
        for pool in self._pools:
            for entry in list(pool.staged.values()):
                pool.discard(entry)
            others = pool.residents.keys() - kept
            pool.evict(len(others), others)

    def finish_reads(self) -> None:
        """Wait for every read under way; those that fail are dropped."""
        for pool in self._pools:
            for entry in list(pool.staged.values()):
                if entry.state is SlotState.IN_FLIGHT:
                    with suppress(CheckpointError, DeviceError):
                        pool.finish(entry)
            pool.drain()

    def close(self) -> None:
        """Cancel what has not begun and wait for what has: after that nothing writes to the arena."""
        for pool in self._pools:
            for entry in list(pool.staged.values()):
                pool.discard(entry)
        for pool in self._pools:
            pool.drain()
