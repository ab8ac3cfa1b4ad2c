"""Whose slot is freed for whom, in a pool of slots of one byte size."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from moe_offload.planning.eviction import EvictionPolicy
from moe_offload.planning.plans import PoolPlan
from moe_offload.residency.slot_entry import ON_ITS_WAY, Entry, ExpertSource, SlotState
from moe_offload.residency.slot_reads import SlotReads
from moe_offload.stats import OffloadStats
from moe_offload.storage.expert_format import ExpertKey, ExpertLayout

UNTOLD_PASSES = 64  # that a policy learns of late

RoutedStep = tuple[int, Sequence[int], Sequence[float] | None]  # layer_idx, expert_ids, weights


class SlotPool(SlotReads):
    """A pool with a policy for its residents, and an order in which everything else gives way."""

    def __init__(
        self,
        plan: PoolPlan,
        layouts: Mapping[int, ExpertLayout],
        store: ExpertSource,
        policy: EvictionPolicy,
        stats: OffloadStats,
        first_address: int,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(plan, layouts, store, policy, stats, first_address, clock)
        self._untold: deque[RoutedStep] = deque(maxlen=UNTOLD_PASSES * len(plan.layers))  # see routed
        self.above: SlotPool | None = None  # of a faster tier, filled from here: what it has may leave first
        self.held: dict[ExpertKey, int] = {}  # copies to there that are under way, by expert
        self.exclusive = True
        self.finish_copies: Callable[[], None] | None = None  # waits until nothing is held
        self._layers_end = max(plan.layers) + 1

    def routed(self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float] | None) -> None:
        """Show the policy a step; later, if ever, while every expert has a slot: nobody is to leave then."""
        if self.is_full_size:
            self._untold.append((layer_idx, expert_ids, weights))
        else:
            self.policy.on_route(layer_idx, expert_ids, weights)

    def routed_steps(self, steps: list[RoutedStep]) -> None:
        """``routed`` of several steps that nothing came between."""
        if self.is_full_size:
            self._untold.extend(steps)
        elif (on_routes := getattr(self.policy, "on_routes", None)) is not None:
            on_routes(steps)
        else:
            for step in steps:
                self.policy.on_route(*step)

    def tell_policy(self) -> None:
        """Show the policy what was put off."""
        while self._untold:
            self.policy.on_route(*self._untold.popleft())

    def evict(self, count: int, candidates: Collection[ExpertKey]) -> list[Entry]:
        """Free the slots of ``count`` residents that the policy chooses among ``candidates``; return them.

        Where tiers are exclusive, what the one above has goes first: its bytes would be here twice.
        """
        self.tell_policy()
        if self.held and count:
            candidates = self._not_held(count, candidates)
        above = self.above if self.exclusive and count else None
        twice = above.residents.keys() & candidates if above is not None else set()
        if len(twice) < count:
            once = set(candidates) - twice if twice else candidates
            victims = [*twice, *self.policy.victims(once, count - len(twice))]
        else:
            victims = self.policy.victims(twice, count)
        assert len(set(victims)) == count, f"{self.policy.name} chose {victims}, wanted {count} residents"
        gone = [self.residents[key] for key in victims]
        for entry in gone:
            assert not entry.pins, f"{self.policy.name} chose {entry.key}, which is pinned"
            self.policy.on_evict(entry.key)
            self._remove(entry)
        self.stats.evictions += count
        return gone

    def _not_held(self, count: int, candidates: Collection[ExpertKey]) -> Collection[ExpertKey]:
        """Return the candidates from which nothing is being copied: all of them, where those are too few."""
        free = set(candidates) - self.held.keys()
        if len(free) >= count:
            return free
        assert self.finish_copies is not None
        self.finish_copies()
        return candidates

    def hold(self, key: ExpertKey) -> int:
        """Keep an expert whose bytes are there in its place until ``let_go``; returns its slot's address."""
        entry = self.find(key)
        assert entry is not None and entry.state is not SlotState.IN_FLIGHT, f"{key} is not in memory"
        self.held[key] = self.held.get(key, 0) + 1
        return self.slot_address(entry.slot)

    def let_go(self, key: ExpertKey) -> None:
        """End one ``hold``; none is left of those that ``recover`` ended."""
        count = self.held.get(key, 0) - 1
        if count > 0:
            self.held[key] = count
        else:
            self.held.pop(key, None)

    def make_room(self, count: int) -> None:
        """Free slots until there are ``count``, dearest last.

        First abandoned reads that have finished, then what was read at the start and is not resident yet
        (coldest first), then speculation nobody claimed (oldest first),
        then residents, then waiting for reads that nobody wants any more. Where every expert has a
        slot of its own only such a read can be in the way.
        """
        self.reap()
        if self.is_full_size:
            self.drain()
            return
        for entry in [*reversed(self.warming.values()), *self.unclaimed()]:
            if len(self.free) >= count:
                return
            if self.settle(entry):
                self.discard(entry)
        if len(self.free) < count:
            unpinned = {key for key, entry in self.residents.items() if not entry.pins}
            self.evict(min(count - len(self.free), len(unpinned)), unpinned)
        while len(self.free) < count:
            assert self.draining, f"{count} slots wanted, {len(self.free)} free, the others pinned"
            self._drain_one(self.draining[0])

    def make_room_for_hint(self, key: ExpertKey, after_layer: int) -> bool:
        """Find a slot for a prefetch: a staging slot that no step claims, or that of a finished guess
        that nobody claimed and that is needed later than ``key``: the one needed last.

        Args:
            after_layer: the layer that has just routed; the next one is the first to be needed.
        """
        if self._room_for_guesses() > 0:
            return True
        num_free = len(self.free)
        farthest = self._finished_beyond(after_layer, self._layers_until(key.layer_idx, after_layer))
        if farthest:
            self.discard(farthest[0])
        return len(self.free) > num_free  # also where one turned out to have failed

    def lend(self, most: int, after_layer: int, reach: int) -> list[int]:
        """Return the addresses of at most ``most`` slots that native code may begin guesses in.

        They are those that ``make_room_for_hint`` would find for guesses of the next ``reach`` layers: free
        ones, and those of finished guesses, which give way where a read is booked there. The loan ends with
        ``take_back``; nobody else may look for a slot before.
        """
        room = self._room_for_guesses()  # first: it may free some
        first = len(self.free) - max(0, min(room, most))
        self.lent = self.free[first:][::-1]
        del self.free[first:]  # last: an interrupt leaves them in both lists rather than in none
        if len(self.lent) < most:
            farthest = self._finished_beyond(after_layer, after_layer + reach)[: most - len(self.lent)]
            self.exchanged = {entry.slot: entry for entry in farthest}
        return [self.slot_address(slot) for slot in (*reversed(self.exchanged), *self.lent)]

    def _room_for_guesses(self) -> int:
        """Return how many slots a guess may have without another giving way."""
        if self.draining:
            self.reap()
        if self.is_full_size:
            return len(self.free)
        num_guesses = len(self.staged) - len(self.warming) + len(self.draining)
        return min(len(self.free), self.num_staging - num_guesses)

    def _finished_beyond(self, after_layer: int, distance: int) -> list[Entry]:
        """Return the finished guesses needed more than ``distance`` ahead, the one needed last first."""
        found = []
        for entry in self.unclaimed():
            entry_distance = self._layers_until(entry.key.layer_idx, after_layer)
            if entry_distance <= distance:
                continue
            if entry.state is SlotState.IN_FLIGHT:
                self.settle(entry)
            if entry.state is SlotState.STAGED:
                found.append((entry_distance, entry))
        found.sort(key=lambda pair: -pair[0])
        return [entry for _, entry in found]

    def _layers_until(self, layer_idx: int, after_layer: int) -> int:
        """Return how far ahead a layer is: those up to ``after_layer`` come again with the next token."""
        return layer_idx if layer_idx > after_layer else layer_idx + self._layers_end

    def guessed_bytes(self) -> int:
        """Return the bytes of speculative reads that no step has claimed and that have not finished."""
        if not self.guesses:
            return 0
        return sum(entry.num_bytes for entry in self.guesses.values() if not self.store.done(entry.ticket))

    def free_one(self) -> None:
        """Free a slot for a stream that has none: what nobody waits for is in the way."""
        self.drain()
        if not self.free and self.warming:
            self.discard(next(reversed(self.warming.values())))
            self.drain()

    def preload(self, keys: Iterable[ExpertKey]) -> None:
        """Queue the reads of experts that shall become residents: as many as there is room for."""
        room = min(len(self.free), self.capacity - len(self.residents) - len(self.warming))
        for key in keys:
            if room <= 0:
                return
            if self.find(key) is None:
                entry = self.read(key, speculative=True)
                self.no_guess(entry)
                self.warming[key] = entry
                room -= 1

    def absorb(self) -> None:
        """Make residents of what ``preload`` has read meanwhile, as long as there is room."""
        for entry in list(self.warming.values()):
            under_way = entry.state is SlotState.IN_FLIGHT and not self.store.done(entry.ticket)
            if under_way or self.settle(entry) is None:  # whoever waited for all reads has settled some
                continue
            self.stats.warm_bytes += entry.num_bytes
            del self.warming[entry.key]
            if len(self.residents) < self.capacity:
                self.admit(entry)
            else:
                self.discard(entry)

    def show_arrived(self, *, shown: bool) -> int:
        """Put staged experts, or no more, into the table that native code computes from; returns how many."""
        num_shown = 0
        for entry in list(self.staged.values()):
            if self.settle(entry) is None or entry.state is not SlotState.STAGED:
                continue
            row = self.resident_table[entry.key.layer_idx][entry.key.expert_id]
            row[:] = entry.addresses
            if not shown:
                row[0] = ON_ITS_WAY
            num_shown += shown
        return num_shown

    def admit_arrived(self, layer_idx: int, expert_ids: Iterable[int]) -> int:
        """Make residents of those that are staged, somebody having used them; returns how many."""
        found = [self.table[layer_idx][expert_id] for expert_id in expert_ids]
        arrived = [entry for entry in found if entry is not None and entry.state is SlotState.STAGED]
        for entry in arrived:
            self.claim(entry)
            self.admit(entry)
        return len(arrived)

    def recover(self, policy: EvictionPolicy) -> None:
        """Make the books agree again after an interrupt between any two instructions; never blocks.

        Finished residents stay; all else is given up. A slot that neither list nor entry accounts
        for may have a read under way that nobody knows: it is never used again.
        """
        in_table = (entry for row in self.table.values() for entry in row if entry is not None)
        owners = [*self.residents.values(), *self.staged.values(), *in_table]
        entries = {entry.slot: entry for entry in owners}
        self.residents, self.staged, self.guesses, self.warming, self.held = {}, {}, {}, {}, {}
        for layer_idx, row in self.table.items():
            row[:] = [None] * len(row)
            self.resident_table[layer_idx][:] = 0
        for slot in self.exchanged:  # a read may be under way there that nobody knows
            entries.pop(slot, None)
        self.lent, self.exchanged = [], {}
        drained = {slot for _, slot in self.draining}
        self.draining = [pair for pair in self.draining if not self.was_forgotten(pair[0])]
        known_free = set(self.free) - drained - entries.keys()
        known_free |= drained - {slot for _, slot in self.draining}
        self.free = sorted(known_free, reverse=True)
        for slot, entry in entries.items():
            if slot not in drained:
                self._recover_entry(entry)
        self.num_slots = len(self.free) + len(self.draining) + len(self.residents)
        self.policy = policy
        self._untold.clear()
        for key in self.residents:
            policy.on_insert(key)

    def _recover_entry(self, entry: Entry) -> None:
        """Keep a resident; free a slot whose read is over; leave one whose read is not to drain."""
        entry.pins = 0
        if entry.state is SlotState.RESIDENT and self.find(entry.key) is None:
            self.residents[entry.key] = entry
            self.table[entry.key.layer_idx][entry.key.expert_id] = entry
            self.resident_table[entry.key.layer_idx][entry.key.expert_id] = entry.addresses
            return
        if entry.state is SlotState.IN_FLIGHT and not self.was_forgotten(entry.ticket):
            if not self.store.cancel(entry.ticket):
                self.draining.append((entry.ticket, entry.slot))
                return
            self.store.forget(entry.ticket)
        self.free.append(entry.slot)

    def check(self) -> None:
        super().check()
        assert self.held.keys() <= self.residents.keys(), f"{self.held} are held and not resident"
