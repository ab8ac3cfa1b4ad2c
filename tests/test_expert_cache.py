"""The slot life cycle, on a simulated disk whose reads finish in any order."""

from __future__ import annotations

import random
from functools import partial

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from simulated_disk import FakeArena, SimulatedDisk, make_layouts, make_pool

from moe_offload.errors import CheckpointError
from moe_offload.planning.eviction import LruPolicy, make_policy
from moe_offload.residency.expert_cache import ExpertCache, Step
from moe_offload.stats import OffloadStats
from moe_offload.storage.expert_format import ExpertKey

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2


class Bench:
    """A cache with everything around it."""

    def __init__(
        self, num_slots: int, *, policy: str = "lru", seed: int = 0, concurrent_reads: int = 2
    ) -> None:
        self.layouts = make_layouts(NUM_LAYERS, NUM_EXPERTS)
        self.disk = SimulatedDisk(self.layouts, seed, concurrent_reads)
        self.arena, self.stats, self.seconds = FakeArena(), OffloadStats(), 0.0
        self.pool = make_pool(self.layouts, num_slots, TOP_K)
        self.cache = ExpertCache(
            [self.pool],
            self.layouts,
            self.disk,
            self.arena,
            partial(make_policy, policy),
            self.stats,
            top_k=TOP_K,
            clock=self.tick,
        )

    def tick(self) -> float:
        self.seconds += 1.0
        return self.seconds

    def begin(self, layer_idx: int, *expert_ids: int) -> Step:
        step = self.cache.begin(layer_idx, sorted(expert_ids))
        assert step is not None
        return step

    def finish(self, step: Step) -> None:
        for expert_id in step.pending:
            self.cache.wait(step, expert_id)
        self.check_bytes(step, step.expert_ids)
        self.cache.end(step)

    def run(self, layer_idx: int, *expert_ids: int) -> Step:
        step = self.begin(layer_idx, *expert_ids)
        self.finish(step)
        return step

    def check_bytes(self, step: Step, expert_ids: list[int]) -> None:
        for expert_id in expert_ids:
            address = self.cache.addresses(step.layer_idx, expert_id)[0]
            assert self.disk.contents[address] == ExpertKey(step.layer_idx, expert_id)

    def stream(self, layer_idx: int, expert_ids: list[int]) -> None:
        seen = []
        for expert_id, addresses in self.cache.stream(layer_idx, expert_ids):
            assert self.disk.contents[addresses[0]] == ExpertKey(layer_idx, expert_id)
            seen.append(expert_id)
        assert seen == expert_ids


@pytest.fixture
def bench() -> Bench:
    return Bench(num_slots=10)  # 4 staging, 6 resident


def test_a_second_step_on_the_same_experts_reads_nothing(bench: Bench) -> None:
    bench.run(0, 1, 5)
    step = bench.run(0, 1, 5)
    assert (step.ready, step.pending) == ([1, 5], [])
    assert bench.disk.submitted == [ExpertKey(0, 1), ExpertKey(0, 5)]
    assert (bench.stats.hits, bench.stats.misses) == (2, 2)
    assert bench.stats.demand_bytes == 2 * bench.layouts[0].expert_bytes


def test_a_step_is_classified_before_any_of_its_reads_begins(bench: Bench) -> None:
    """Otherwise an early miss could evict a late hit of the same step."""
    for layer_idx in range(3):
        bench.run(layer_idx, 0, 1)  # full: six residents
    step = bench.begin(0, 0, 7)
    assert (step.ready, step.pending) == ([0], [7])
    bench.finish(step)
    assert ExpertKey(0, 1) not in bench.cache.residents()  # least recent, and not of the step
    assert ExpertKey(0, 0) in bench.cache.residents()


def test_victims_are_chosen_at_the_end_of_a_step(bench: Bench) -> None:
    for layer_idx in range(3):
        bench.run(layer_idx, 0, 1)
    step = bench.begin(0, 6, 7)
    assert bench.stats.evictions == 0
    bench.finish(step)
    assert bench.stats.evictions == 2
    bench.cache.check()


def test_misses_beyond_the_free_slots_evict_first_what_the_step_does_not_need() -> None:
    bench = Bench(num_slots=10)
    for layer_idx in range(3):
        bench.run(layer_idx, 0, 1)
    step = bench.run(0, 0, 1, 2, 3, 4, 5, 6, 7)  # 2 hits, 6 misses, 4 free slots
    assert step.ready == [0, 1]
    bench.cache.check()


def test_a_step_of_more_experts_than_slots_is_left_to_the_stream() -> None:
    bench = Bench(num_slots=2)
    assert bench.cache.begin(0, [1, 2, 3]) is None
    assert bench.disk.submitted == [] and bench.stats.misses == 0
    bench.stream(0, [1, 2, 3])


def test_a_pool_with_a_slot_for_every_expert_never_evicts_and_reads_each_once() -> None:
    bench = Bench(num_slots=NUM_LAYERS * NUM_EXPERTS)
    assert bench.pool.num_staging == 0
    for _ in range(2):
        for layer_idx in range(NUM_LAYERS):
            bench.cache.prefetch([ExpertKey(layer_idx, 3)])
            bench.stream(layer_idx, list(range(0, NUM_EXPERTS, 2)))
            bench.run(layer_idx, *range(NUM_EXPERTS))
    assert bench.stats.evictions == 0
    assert len(bench.disk.submitted) == len(set(bench.disk.submitted)) == NUM_LAYERS * NUM_EXPERTS
    assert bench.cache.has_every_expert


def test_a_pool_with_a_slot_for_every_expert_waits_for_an_abandoned_read_rather_than_evict() -> None:
    bench = Bench(num_slots=NUM_LAYERS * NUM_EXPERTS)
    step = bench.begin(0, 0)
    bench.disk.reads[0].state = "reading"
    bench.cache.abort(step)
    for layer_idx in range(NUM_LAYERS):
        bench.run(layer_idx, *range(layer_idx == 0, NUM_EXPERTS))
        bench.disk.reads[0].state = "reading"
    bench.run(0, 0)
    assert bench.stats.evictions == 0
    assert bench.cache.has_every_expert


def test_with_top_k_slots_everything_streams_through_them() -> None:
    bench = Bench(num_slots=TOP_K)
    for step in range(4):
        bench.run(step % NUM_LAYERS, step, step + 1)
        bench.cache.prefetch([ExpertKey((step + 1) % NUM_LAYERS, 7), ExpertKey(0, 0)])
        bench.disk.advance()
    assert bench.cache.residents() == []


def test_a_finished_prefetch_is_useful_and_a_running_one_late(bench: Bench) -> None:
    bench.cache.prefetch([ExpertKey(1, 2)])
    bench.disk.advance()
    bench.cache.prefetch([ExpertKey(1, 3)])
    step = bench.begin(1, 2, 3)
    assert (step.ready, step.pending) == ([2], [3])
    assert not bench.disk.reads[1].speculative  # promoted
    bench.finish(step)
    size = bench.layouts[1].expert_bytes
    assert (bench.stats.prefetch_useful_bytes, bench.stats.prefetch_late_bytes) == (size, size)
    assert (bench.stats.prefetch_hits, bench.stats.misses, bench.stats.demand_bytes) == (1, 1, 0)
    assert len(bench.disk.submitted) == 2


def test_late_guesses_and_misses_are_pending_together(bench: Bench) -> None:
    bench.cache.prefetch([ExpertKey(1, 3)])
    step = bench.begin(1, 1, 3, 5)
    assert (step.ready, step.pending) == ([], [1, 3, 5])
    bench.finish(step)


def test_a_guess_that_a_step_claims_is_not_overwritten(bench: Bench) -> None:
    bench.cache.prefetch([ExpertKey(1, 2)])
    bench.disk.advance()
    step = bench.begin(1, 2)
    bench.cache.prefetch([ExpertKey(2, expert_id) for expert_id in range(8)])
    bench.finish(step)
    assert bench.stats.prefetch_wasted_bytes == 0


def test_a_stream_shares_its_slots_with_no_guess(bench: Bench) -> None:
    stream = bench.cache.stream(0, [1, 2])
    next(stream)
    bench.cache.prefetch([ExpertKey(1, 1)])
    assert ExpertKey(1, 1) not in bench.disk.submitted
    stream.close()


def test_the_router_cancels_queued_guesses_that_it_contradicts(bench: Bench) -> None:
    bench.cache.prefetch([ExpertKey(1, 2), ExpertKey(1, 3), ExpertKey(2, 4)])
    bench.cache.contradict(1, [3])
    assert bench.disk.cancelled == [ExpertKey(1, 2)]
    assert bench.stats.prefetch_cancelled == 1
    bench.cache.check()


def test_a_prefetch_neither_evicts_nor_takes_the_slots_of_a_step(bench: Bench) -> None:
    for layer_idx in range(3):
        bench.run(layer_idx, 0, 1)
    step = bench.begin(0, 4, 5)
    bench.cache.prefetch([ExpertKey(1, expert_id) for expert_id in range(2, 8)])
    assert len(bench.disk.submitted) == 6 + 2 + 2  # of four staging slots, the step has two
    bench.finish(step)
    assert bench.stats.evictions == 2


def test_a_finished_guess_makes_room_for_one_that_is_needed_sooner(bench: Bench) -> None:
    for expert_id in range(4):
        bench.cache.prefetch([ExpertKey(1, expert_id)])
        bench.disk.advance()
    bench.cache.prefetch([ExpertKey(2, 0)])  # comes after layer 1
    assert bench.disk.submitted[-1] == ExpertKey(1, 3)
    bench.cache.prefetch([ExpertKey(0, 0)])
    assert bench.disk.submitted[-1] == ExpertKey(0, 0)
    bench.cache.prefetch([ExpertKey(2, 0)], after_layer=1)  # now layer 1 comes with the next token only
    assert bench.disk.submitted[-1] == ExpertKey(2, 0)
    bench.cache.check()


def test_guesses_of_one_call_do_not_overwrite_one_another(bench: Bench) -> None:
    guesses = [ExpertKey(1, expert_id) for expert_id in range(5)]
    bench.cache.prefetch(guesses[:4])
    for _ in range(4):
        bench.disk.advance()
    bench.cache.prefetch(guesses)  # four staging slots, all of them hold better guesses than the fifth
    assert bench.disk.submitted == guesses[:4]
    assert bench.stats.prefetch_wasted_bytes == 0


def test_a_prefetch_of_what_is_in_memory_or_on_its_way_reads_nothing(bench: Bench) -> None:
    bench.run(0, 1)
    bench.cache.prefetch([ExpertKey(0, 1), ExpertKey(0, 2), ExpertKey(0, 2)])
    bench.cache.prefetch([ExpertKey(0, 2)])
    assert bench.disk.submitted == [ExpertKey(0, 1), ExpertKey(0, 2)]


def test_guesses_that_have_begun_do_not_keep_a_step_from_its_slots() -> None:
    """All slots are being written when a step comes that needs none of them."""
    bench = Bench(num_slots=TOP_K)
    bench.cache.prefetch([ExpertKey(1, 0), ExpertKey(1, 1)])
    for read in bench.disk.reads.values():
        read.state = "reading"
    step = bench.begin(0, 5, 6)
    bench.finish(step)
    assert bench.stats.prefetch_wasted_bytes == 2 * bench.layouts[1].expert_bytes
    bench.cache.check()


def test_a_failed_read_names_itself_and_a_retry_reads_again(bench: Bench) -> None:
    bench.disk.failing.add(ExpertKey(0, 2))
    step = bench.begin(0, 1, 2)
    with pytest.raises(CheckpointError, match="expert_id=2"):
        for expert_id in step.pending:
            bench.cache.wait(step, expert_id)
    bench.cache.abort(step)
    bench.cache.check()
    bench.disk.failing.clear()
    bench.run(0, 1, 2)
    assert bench.disk.submitted.count(ExpertKey(0, 2)) == 2


def test_a_guess_whose_read_failed_is_simply_read_again(bench: Bench) -> None:
    bench.disk.failing.add(ExpertKey(0, 2))
    bench.cache.prefetch([ExpertKey(0, 2)])
    bench.disk.advance()
    bench.disk.failing.clear()
    assert bench.run(0, 2).pending == [2]


def test_an_interrupted_wait_leaves_a_usable_cache_without_blocking(bench: Bench) -> None:
    step = bench.begin(0, 1, 2)
    bench.disk.reads[0].state = "reading"
    bench.disk.interrupt_next_wait = True
    with pytest.raises(KeyboardInterrupt):
        bench.cache.wait(step, 1)
    bench.cache.abort(step)
    assert [read.state for read in bench.disk.reads.values()] == ["reading", "ended"]
    bench.cache.check()
    bench.run(0, 1, 2)


def test_stall_seconds_are_those_of_waits(bench: Bench) -> None:
    bench.run(0, 1, 2)
    assert bench.stats.stall_s == 2.0  # two waits, one tick each
    bench.run(0, 1, 2)
    assert bench.stats.stall_s == 2.0


def test_a_stream_reads_each_missing_expert_once_and_evicts_nothing(bench: Bench) -> None:
    for layer_idx in range(3):
        bench.run(layer_idx, 0, 1)
    before, residents = len(bench.disk.submitted), bench.cache.residents()
    bench.stream(1, list(range(NUM_EXPERTS)))
    assert bench.disk.submitted[before:] == [ExpertKey(1, expert_id) for expert_id in range(2, 8)]
    assert bench.cache.residents() == residents
    assert bench.stats.stream_bytes == 6 * bench.layouts[1].expert_bytes
    assert (bench.stats.hits, bench.stats.misses) == (0, 6)  # decode's counters stay decode's


def test_a_stream_fills_only_the_layers_share_of_a_cold_cache(bench: Bench) -> None:
    """Otherwise the first layer of the first prompt takes every slot."""
    for layer_idx in range(3):
        bench.stream(layer_idx, list(range(NUM_EXPERTS)))
    assert bench.cache.residents() == [ExpertKey(layer, expert) for layer in range(3) for expert in (0, 1)]


def test_a_stream_keeps_the_experts_that_most_tokens_chose(bench: Bench) -> None:
    for _ in bench.cache.stream(0, [1, 3, 5, 7], num_tokens=[1, 9, 2, 8]):
        pass
    assert bench.cache.residents() == [ExpertKey(0, 3), ExpertKey(0, 7)]


def test_a_stream_reads_ahead_through_the_free_slots(bench: Bench) -> None:
    stream = bench.cache.stream(0, list(range(NUM_EXPERTS)))
    next(stream)
    assert len(bench.disk.submitted) == NUM_EXPERTS  # ten free slots, eight experts
    stream.close()


def test_a_stream_gives_out_residents_together(bench: Bench) -> None:
    bench.run(1, 2, 5)
    batches = [[expert_id for expert_id, _ in batch] for batch in bench.cache.stream_batches(1, [2, 5])]
    assert batches == [[2, 5]]


@pytest.mark.parametrize("seed", range(8))
def test_a_batch_ends_with_what_was_read(seed: int) -> None:
    """Its slot is then free for the next read, whatever residents were computed with it."""
    bench = Bench(num_slots=10, seed=seed)
    there = {1, 2, 5}
    bench.run(0, *there)
    batches = [[i for i, _ in batch] for batch in bench.cache.stream_batches(0, list(range(NUM_EXPERTS)))]
    assert [i for batch in batches for i in batch] == list(range(NUM_EXPERTS))
    assert all(there.issuperset(batch[:-1]) for batch in batches)
    assert any(len(batch) > 1 for batch in batches)


@pytest.mark.parametrize("consumed", range(NUM_EXPERTS))
def test_a_stream_closed_early_leaves_a_usable_cache(consumed: int) -> None:
    bench = Bench(num_slots=4, seed=consumed)
    stream = bench.cache.stream(0, list(range(NUM_EXPERTS)))
    for _ in range(consumed):
        next(stream)
    stream.close()
    bench.cache.check()
    bench.stream(0, list(range(NUM_EXPERTS)))
    bench.cache.check()


def test_a_read_that_fails_in_a_stream_leaves_a_usable_cache() -> None:
    bench = Bench(num_slots=4)
    bench.disk.failing.add(ExpertKey(0, 5))
    with pytest.raises(CheckpointError, match="expert_id=5"):
        bench.stream(0, list(range(NUM_EXPERTS)))
    bench.cache.check()
    bench.disk.failing.clear()
    bench.stream(0, list(range(NUM_EXPERTS)))


def test_a_stream_whose_slots_all_hold_later_guesses_still_moves() -> None:
    """Every staging slot held a guess for a late expert, and the first one had nowhere to go."""
    bench = Bench(num_slots=TOP_K)
    bench.cache.prefetch([ExpertKey(0, 6), ExpertKey(0, 7)])
    bench.stream(0, list(range(NUM_EXPERTS)))
    bench.cache.check()


def test_a_stream_waits_for_slots_that_abandoned_reads_still_write() -> None:
    bench = Bench(num_slots=TOP_K)
    bench.cache.prefetch([ExpertKey(1, 6), ExpertKey(1, 7)])
    for read in bench.disk.reads.values():
        read.state = "reading"
    bench.stream(0, list(range(NUM_EXPERTS)))
    bench.cache.check()


def test_slots_given_back_leave_by_policy_and_their_pages_too() -> None:
    bench = Bench(num_slots=10)
    for layer_idx in range(3):
        bench.run(layer_idx, 0, 1)
    slot_bytes = bench.pool.slot_bytes
    unpinned: list[tuple[int, int]] = []
    bench.cache.unpin = lambda address, num_bytes: unpinned.append((address, num_bytes))
    assert bench.cache.give_back(3 * slot_bytes - 1) == 3 * slot_bytes
    assert [num_bytes for _, num_bytes in bench.arena.given_back] == [slot_bytes] * 3
    assert unpinned == [(bench.arena.address + at, n) for at, n in bench.arena.given_back]
    assert bench.stats.slots_given_back == 3
    assert bench.cache.residents() == [ExpertKey(1, 1), ExpertKey(2, 0), ExpertKey(2, 1)]
    bench.cache.check()
    for layer_idx in range(3):
        bench.run(layer_idx, 4, 5)
    bench.cache.check()


def test_a_cache_never_gives_back_the_slots_of_one_token() -> None:
    bench = Bench(num_slots=10)
    bench.run(0, 0, 1)
    assert bench.cache.give_back(1 << 40) == 8 * bench.pool.slot_bytes
    assert bench.cache.give_back(1) == 0
    bench.run(1, 6, 7)
    bench.cache.check()


def test_a_full_cache_that_gives_back_gets_staging_slots() -> None:
    bench = Bench(num_slots=NUM_LAYERS * NUM_EXPERTS)
    for layer_idx in range(NUM_LAYERS):
        bench.run(layer_idx, *range(NUM_EXPERTS))
    assert bench.cache.give_back(1) == bench.pool.slot_bytes
    bench.cache.check()
    for layer_idx in range(NUM_LAYERS):
        bench.run(layer_idx, *range(NUM_EXPERTS))
    bench.cache.check()


def test_close_ends_every_read(bench: Bench) -> None:
    bench.cache.prefetch([ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(0, 2)])
    bench.disk.advance()
    bench.cache.close()
    assert {read.state for read in bench.disk.reads.values()} == {"ended"}


@pytest.mark.parametrize("policy", ["lru", "ewma"])
@pytest.mark.parametrize("num_slots", [2, 3, 5, 10, 20, 24])
def test_the_same_trace_gives_the_same_residents_however_reads_finish(num_slots: int, policy: str) -> None:
    trace_random = random.Random(num_slots)
    trace = [(i % NUM_LAYERS, trace_random.sample(range(NUM_EXPERTS), TOP_K)) for i in range(60)]
    histories = []
    for seed in range(3):
        bench, history = Bench(num_slots, policy=policy, seed=seed, concurrent_reads=seed + 1), []
        for layer_idx, expert_ids in trace:
            bench.run(layer_idx, *expert_ids)
            history.append(bench.cache.residents())
        histories.append(history)
    assert histories[0] == histories[1] == histories[2]


def test_a_policy_that_names_a_pinned_expert_is_found_out() -> None:
    class Stubborn(LruPolicy):
        def victims(self, candidates, count):  # type: ignore[no-untyped-def]
            return list(self._residents)[-count:]

    bench = Bench(num_slots=10)
    for layer_idx in range(3):
        bench.run(layer_idx, 0, 1)
    bench.cache._pools[0].policy.__class__ = Stubborn
    with pytest.raises(AssertionError, match="pinned"):
        bench.begin(2, *range(NUM_EXPERTS))


EXPERT_SETS = st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=NUM_EXPERTS).map(sorted)
LAYERS = st.integers(0, NUM_LAYERS - 1)
KEYS = st.builds(ExpertKey, LAYERS, st.integers(0, NUM_EXPERTS - 1))


class CacheMachine(RuleBasedStateMachine):
    """Anything in any order; after every rule the invariants hold and no read is lost or ended twice."""

    @initialize(
        num_slots=st.integers(TOP_K, NUM_LAYERS * NUM_EXPERTS), policy=st.sampled_from(["lru", "ewma"])
    )
    def start(self, num_slots: int, policy: str) -> None:
        self.bench = Bench(num_slots, policy=policy, seed=num_slots)
        self.cache, self.disk, self.stats = self.bench.cache, self.bench.disk, self.bench.stats
        self.needs = 0

    @rule(
        layer_idx=LAYERS,
        expert_ids=EXPERT_SETS,
        guesses=st.lists(KEYS),
        order=st.randoms(use_true_random=False),
    )
    def step(
        self, layer_idx: int, expert_ids: list[int], guesses: list[ExpertKey], order: random.Random
    ) -> None:
        self.cache.contradict(layer_idx, expert_ids)
        step = self.cache.begin(layer_idx, expert_ids)
        if step is None:
            self.stream(layer_idx, expert_ids, 99)
            return
        self.needs += len(expert_ids)
        assert sorted(step.ready + step.pending) == expert_ids
        self.cache.prefetch(guesses)
        pending, usable = list(step.pending), list(step.ready)
        order.shuffle(pending)
        try:
            for expert_id in pending:
                self.cache.wait(step, expert_id)
                usable.append(expert_id)
                self.bench.check_bytes(step, usable)
        except CheckpointError:
            self.cache.abort(step)
        else:
            self.cache.end(step)

    @rule(layer_idx=LAYERS, expert_ids=EXPERT_SETS, guesses=st.lists(KEYS))
    def interrupted_step(self, layer_idx: int, expert_ids: list[int], guesses: list[ExpertKey]) -> None:
        self.cache.prefetch(guesses)
        step = self.cache.begin(layer_idx, expert_ids)
        if step is not None:
            self.needs += len(expert_ids)
            self.cache.abort(step)

    @rule(layer_idx=LAYERS, expert_ids=EXPERT_SETS, stop_after=st.integers(0, 2 * NUM_EXPERTS))
    def stream(self, layer_idx: int, expert_ids: list[int], stop_after: int) -> None:
        before, residents = len(self.disk.submitted), self.cache.residents()
        stream, seen = self.cache.stream(layer_idx, expert_ids), []
        try:
            for expert_id, addresses in stream:
                assert self.disk.contents[addresses[0]] == ExpertKey(layer_idx, expert_id)
                seen.append(expert_id)
                if len(seen) == stop_after:
                    break
        except CheckpointError:
            pass
        else:
            assert seen == expert_ids[:stop_after] if stop_after else seen == expert_ids
        stream.close()
        read = self.disk.submitted[before:]
        assert len(read) == len(set(read)), "an expert was read twice"
        assert set(residents) <= set(self.cache.residents()), "a stream evicted"

    @rule(keys=st.lists(KEYS, max_size=10))
    def prefetch(self, keys: list[ExpertKey]) -> None:
        evictions = self.stats.evictions
        self.cache.prefetch(keys)
        assert self.stats.evictions == evictions, "a guess evicted"

    @rule(count=st.integers(1, 4))
    def time_passes(self, count: int) -> None:
        for _ in range(count):
            self.disk.advance()

    @rule(key=KEYS)
    def disk_fails(self, key: ExpertKey) -> None:
        self.disk.failing.add(key)

    @rule()
    def disk_recovers(self) -> None:
        self.disk.failing.clear()

    @rule(num_slots=st.integers(1, 5))
    def memory_runs_short(self, num_slots: int) -> None:
        slot_bytes = self.bench.pool.slot_bytes
        given = self.cache.give_back(num_slots * slot_bytes)
        assert given <= num_slots * slot_bytes

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        for key in self.cache.residents():
            entry = self.cache._pools[0].find(key)
            assert entry is not None and self.disk.contents[entry.addresses[0]] == key
        assert self.stats.hits + self.stats.prefetch_hits + self.stats.misses == self.needs

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            assert {read.state for read in self.disk.reads.values()} <= {"ended"}


TestAnyOrderOfEvents = CacheMachine.TestCase
TestAnyOrderOfEvents.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_a_policy_is_left_alone_while_nobody_can_leave_and_told_when_somebody_must() -> None:
    """With a slot for every expert its book-keeping would only slow the steps."""
    bench = Bench(num_slots=3 * NUM_EXPERTS)
    told: list[list[int]] = []
    policy = bench.cache._pools[0].policy
    on_route = policy.on_route
    policy.on_route = lambda layer, ids, weights: (told.append(list(ids)), on_route(layer, ids, weights))
    for layer_idx in range(3):
        bench.run(layer_idx, *range(NUM_EXPERTS))
    bench.run(2, 0, 1)
    assert told == []
    bench.cache.give_back(2 * bench.pool.slot_bytes)
    assert told == [*([list(range(NUM_EXPERTS))] * 3), [0, 1]]
    bench.run(1, 5)
    assert told[-1] == [5]
    bench.cache.check()
