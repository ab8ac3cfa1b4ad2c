"""The device tier's pure parts and its books in RAM: budgets, admission, costs, holds, order of victims."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_disk import ARENA_ADDRESS, SimulatedDisk

from moe_offload import _native
from moe_offload.config import DeviceChoice, ModelSpec, parse_device
from moe_offload.errors import BudgetError
from moe_offload.planning.admission import SecondMiss, most_under_way
from moe_offload.planning.correction import MOST_CORRECTION, RunningCorrection
from moe_offload.planning.cost_model import device_workspace_bytes
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.expert_costs import MeasuredCosts, RunningCosts
from moe_offload.planning.impact import by_impact
from moe_offload.planning.placement import plan_device
from moe_offload.planning.plans import PoolPlan
from moe_offload.planning.prefetch_plan import Guess, plan_reads
from moe_offload.planning.scheduler import SCHEDULERS, LayerWork, finish_s
from moe_offload.planning.token_moves import TokenMoves, divide, moves_of, savings_of
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.runtime.hybrid_stream import alternate
from moe_offload.stats import OffloadStats
from moe_offload.storage.expert_format import ExpertKey, ExpertLayout, GgmlType, MatrixFormat, RowOrder

GATE_UP, DOWN = MatrixFormat(GgmlType.Q4_0, 128, 64), MatrixFormat(GgmlType.Q4_0, 64, 64)
LAYOUTS = {i: ExpertLayout(i, 8, RowOrder.GATE_UP, (GATE_UP, DOWN)) for i in range(2)}
SPEC = ModelSpec("toy", 64, 2, 100, 128, 8, 2, 64, (0, 1), (1, 1))
SLOT = LAYOUTS[0].slot_bytes


def test_a_device_is_named_with_units() -> None:
    back = parse_device("emulated:vram=512MiB,link=12GB/s,to_host=3GB/s", None)
    assert back is not None and (back.link_bytes_per_s, back.to_host_bytes_per_s) == (12e9, 3e9)
    assert parse_device("emulated:vram=512MiB,link=12GB/s,latency=1ms,pinned=1GiB", None) == DeviceChoice(
        "emulated", 512 << 20, 12e9, 1e-3, 1 << 30
    )
    assert parse_device("emulated:vram=512MiB", "1GiB") == parse_device("emulated:vram=512MiB", None)
    assert parse_device("emulated:link=1GB/s", "3MiB") == DeviceChoice("emulated", 3 << 20, 1e9)
    assert parse_device("cpu", None) is parse_device(None, None) is None


def test_a_larger_device_never_has_fewer_slots_and_stays_within_its_memory() -> None:
    fixed, before = device_workspace_bytes(SPEC), 0
    for extra in range(2, 20):
        vram_bytes = fixed + 100 + extra * SLOT + 7
        plan = plan_device(SPEC, LAYOUTS, vram_bytes=vram_bytes, context_bytes=100)
        (pool,) = plan.pools
        assert pool.num_slots == min(extra, 16) >= before
        assert plan.context_bytes + plan.workspace_bytes + plan.expert_bytes <= vram_bytes
        before = pool.num_slots
    with pytest.raises(BudgetError, match=f"would do is {fixed + 2 * SLOT} bytes"):
        plan_device(SPEC, LAYOUTS, vram_bytes=fixed + 2 * SLOT - 1, context_bytes=0)


def test_only_what_missed_before_is_admitted() -> None:
    second = SecondMiss(num_slots=1)  # remembers four
    keys = [ExpertKey(0, i) for i in range(6)]
    assert not any(second.admits(key) for key in keys[:4])
    assert second.admits(keys[3]) and not second.admits(keys[3]), "admitted once, it starts anew"
    assert not second.admits(keys[4]) and not second.admits(keys[0]), "the oldest was forgotten"
    second.remember(keys[5])
    assert second.admits(keys[5])


def test_costs_follow_what_steps_show() -> None:
    costs = RunningCosts(MeasuredCosts(((1, 1e-3), (4, 2e-3)), ((1, 1e-4),), 5e-4))
    tokens = np.array([1, 4, 7])
    assert costs.cpu_s(tokens) == pytest.approx([1e-3, 2e-3, 3e-3])
    work = costs.work(tokens, np.array([True, False, False]), np.array([True, True, False]))
    assert work.copy_s == 5e-4 and work.gpu_s == pytest.approx([1e-4] * 3) and work.in_ram.all()
    for _ in range(100):
        costs.saw_cpu(float(costs.cpu_s(tokens).sum()), 12e-3)
        costs.saw_copies(costs.copy_s, 1e-3)
    assert costs.cpu_s(tokens).sum() == pytest.approx(12e-3, rel=0.01)
    assert costs.copy_s == pytest.approx(1e-3, rel=0.01) and costs.gpu_factor == 1.0
    costs.saw_gpu(0.0, 1.0)
    assert costs.gpu_factor == 1.0, "what was expected to take no time shows nothing"


def test_costs_of_all_sizes_and_the_prefetcher_share_what_was_measured() -> None:
    speeds = RunningCorrection({"disk_bytes_per_s": 1e9})
    measured = MeasuredCosts(((1, 1e-3), (4, 2e-3)), ((1, 1e-4),), 5e-4)
    small, large = RunningCosts(measured, speeds, " of 5 bytes"), RunningCosts(measured, speeds)
    for _ in range(200):
        small.saw_cpu(small.cpu_factor, 3.0)
        large.saw_copies(1.0, 1e6)
    assert small.of_one_token() == pytest.approx((3e-3, 1e-4, 5e-4, 0.0), rel=0.01)
    assert large.of_one_token() == pytest.approx((1e-3, 1e-4, 5e-4 * MOST_CORRECTION, 0.0), rel=0.01)
    shown = speeds.as_dict()
    assert shown["expert_cpu_s of 5 bytes"]["estimate"] == pytest.approx(3e-3, rel=0.01)
    assert shown["expert_cpu_s"] == {"expected": 1e-3, "estimate": 1e-3, "measurements": 0}
    assert shown["expert_copy_s"]["measurements"] == 200 and shown["disk_bytes_per_s"]["measurements"] == 0


@given(st.lists(st.integers(0, 50), unique=True), st.integers(0, 50))
def test_taking_turns_loses_nobody_and_starts_both_sides_early(ids: list[int], split: int) -> None:
    first, second = ids[:split], ids[split:]
    order = alternate(first, second)
    assert sorted(order) == sorted(ids)
    for part in (first, second):
        assert [i for i in order if i in part] == part
    if first and second:
        lengths = sorted((len(first), len(second)))
        latest = -(-lengths[1] // lengths[0])
        assert order.index(first[0]) <= latest and order.index(second[0]) <= latest


class TwoTiers:
    """RAM under a device's cache of as many slots, two of them staging, on simulated disks."""

    def __init__(self, num_slots: int = 6) -> None:
        pool = PoolPlan(SLOT, (0, 1), 16, num_slots, num_staging=2)
        self.disk, self.link = SimulatedDisk(LAYOUTS), SimulatedDisk(LAYOUTS, seed=1)
        self.waited, self.held = 0, set[ExpertKey]()
        self.ram, self.device = (
            ExpertCache(
                [pool], LAYOUTS, source, _Memory(), lambda: make_policy("lru"), OffloadStats(), top_k=2
            )
            for source in (self.disk, self.link)
        )
        self.ram.put_below(self.device, self.finish)

    def finish(self) -> None:
        self.waited += 1
        for key in list(self.held):
            self.ram.let_go(key)
        self.held.clear()

    @staticmethod
    def use(cache: ExpertCache, layer_idx: int, expert_ids: list[int]) -> None:
        step = cache.begin(layer_idx, expert_ids)
        assert step is not None
        for expert_id in step.pending:
            cache.wait(step, expert_id)
        cache.end(step)


class _Memory:
    address = ARENA_ADDRESS

    def give_back(self, offset: int, num_bytes: int) -> None:
        pass


def test_ram_evicts_first_what_the_device_has() -> None:
    tiers = TwoTiers()
    for ids in ([0, 1], [2, 3]):
        tiers.use(tiers.ram, 0, ids)
    tiers.use(tiers.device, 0, [2, 3])  # the most recent, which LRU would keep
    tiers.use(tiers.ram, 0, [4, 5])
    assert [key.expert_id for key in tiers.ram.residents()] == [0, 1, 4, 5]
    assert tiers.ram.absent(0, [2, 6]) == [6], "nothing is read ahead that the device has"
    tiers.ram.check()


def test_what_is_being_copied_stays_in_its_place_until_the_copy_ends() -> None:
    tiers = TwoTiers()
    for ids in ([0, 1], [2, 3]):
        tiers.use(tiers.ram, 0, ids)
    tiers.held = {ExpertKey(0, 0)}
    tiers.ram.hold(ExpertKey(0, 0))
    tiers.use(tiers.ram, 0, [4, 5])
    assert [key.expert_id for key in tiers.ram.residents()] == [0, 3, 4, 5] and tiers.waited == 0
    for ids in ([6, 7], [1, 2], [3, 4]):
        tiers.use(tiers.ram, 1, ids)
    assert ExpertKey(0, 0) in tiers.ram.residents() and tiers.waited == 0
    tiers.ram.let_go(ExpertKey(0, 0))
    tiers.use(tiers.ram, 0, [6, 7])
    assert ExpertKey(0, 0) not in tiers.ram.residents()
    tiers.ram.check()


def test_where_nothing_may_stay_the_end_of_a_step_waits_for_its_copies() -> None:
    tiers = TwoTiers(num_slots=2)
    step = tiers.ram.begin(0, [0, 1])
    assert step is not None
    for expert_id in step.pending:
        tiers.ram.wait(step, expert_id)
    tiers.ram.hold(ExpertKey(0, 1))
    tiers.held = {ExpertKey(0, 1)}
    tiers.ram.end(step)
    assert tiers.waited == 1 and not tiers.ram.residents()
    tiers.ram.check()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(SCHEDULERS)),
    st.lists(st.booleans(), min_size=1, max_size=10),
    st.tuples(*[st.floats(0.01, 5.0)] * 3, st.sampled_from([0.0, 0.1, 2.0])),
)
def test_moves_are_what_the_scheduler_chooses_for_one_token(name, on_gpu, costs) -> None:
    """Whichever experts are on the device, it chooses as many, and ends as early, as ``moves_of`` says."""
    cpu_s, gpu_s, copy_s, start_s = costs
    there, n = np.array(on_gpu), len(on_gpu)
    times = np.full(n, cpu_s), np.full(n, gpu_s)
    work = LayerWork(*times, there, np.ones(n, np.bool_), copy_s, gpu_start_s=start_s)
    moves = moves_of(SCHEDULERS[name], n, *costs)[int(there.sum())]
    schedule = SCHEDULERS[name](work)
    assert moves == int((schedule.on_gpu & ~there).sum()) or -int((there & ~schedule.on_gpu).sum())
    assert moves == int(schedule.on_gpu.sum()) - int(there.sum())


def test_a_launch_that_takes_longer_than_it_saves_is_not_begun() -> None:
    """Four experts of 20 us on the CPU and 5 us on the device, whose launches take that much beside."""
    quick = moves_of(SCHEDULERS["hybrid"], 4, 20e-6, 5e-6, 1.0)
    assert quick == [0] * 5
    assert moves_of(SCHEDULERS["hybrid"], 4, 20e-6, 5e-6, 1.0, 48e-6) == [0, 0, 0, -1, -2]
    assert moves_of(SCHEDULERS["hybrid"], 4, 20e-6, 5e-6, 1.0, 90e-6) == [0, -1, -2, -3, -4]
    assert savings_of(SCHEDULERS["hybrid"], 4, 20e-6, 5e-6, 1.0, 90e-6) == [0.0] * 4


def test_what_a_launch_takes_follows_what_steps_show() -> None:
    costs = RunningCosts(MeasuredCosts(((1, 1e-3),), ((1, 1e-4),), 5e-3, gpu_start_s=2e-5))
    assert costs.of_one_token()[3] == 2e-5
    before = TokenMoves(costs).of(SCHEDULERS["hybrid"], 2)
    for _ in range(100):
        costs.saw_start(3 * costs.gpu_start_s, 3 * 2e-4)
    assert costs.gpu_start_s == pytest.approx(2e-4, rel=0.01)
    work = costs.work(np.array([1, 1]), np.array([True, False]), np.array([True, True]))
    assert work.gpu_start_s == costs.gpu_start_s
    assert costs.speeds.as_dict()["device_start_s"]["expected"] == 2e-5
    free = RunningCosts(MeasuredCosts(((1, 1e-3),), ((1, 1e-4),), 5e-3))
    free.saw_start(0.0, 1e-3)
    assert free.gpu_start_s == 0.0 and before == [0, 0, 0]


def test_the_scheduler_is_asked_again_when_costs_have_changed() -> None:
    costs = RunningCosts(MeasuredCosts(((1, 1e-3),), ((1, 1e-4),), 5e-3))
    moves = TokenMoves(costs)
    first = moves.of(SCHEDULERS["hybrid"], 4)
    costs.saw_cpu(1.0, 1.05)
    assert moves.of(SCHEDULERS["hybrid"], 4) is first
    for _ in range(50):
        costs.saw_copies(costs.copy_factor, 0.01)
    assert moves.of(SCHEDULERS["hybrid"], 4) is not first and moves.of(SCHEDULERS["hybrid"], 4)[0] > first[0]
    assert moves.of(SCHEDULERS["static_split"], 4) == [0] * 5


def test_copies_for_later_take_half_of_the_links_idle_time() -> None:
    assert most_under_way(idle_s=0.0, copy_s=1e-3) == 2 == most_under_way(idle_s=1.0, copy_s=0.0)
    assert most_under_way(idle_s=20e-3, copy_s=1e-3) == 10


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.floats(0.01, 5.0)] * 3), st.integers(1, 8))
def test_savings_are_the_difference_that_one_more_on_the_device_makes(costs, count) -> None:
    savings = savings_of(SCHEDULERS["hybrid"], count, *costs)
    for residents in range(count):
        fewer, more = (
            finish_s(work, SCHEDULERS["hybrid"](work).on_gpu)
            for work in (token_work(costs, count, residents), token_work(costs, count, residents + 1))
        )
        assert savings[residents] == pytest.approx(fewer - more, abs=1e-12)


def token_work(costs: tuple[float, float, float], count: int, residents: int) -> LayerWork:
    cpu_s, gpu_s, copy_s = costs
    there, in_ram = np.arange(count) < residents, np.ones(count, np.bool_)
    return LayerWork(np.full(count, cpu_s), np.full(count, gpu_s), there, in_ram, copy_s)


def guess(layer_idx: int, expert_id: int, probability: float) -> Guess:
    return Guess(ExpertKey(layer_idx, expert_id), probability, 1000, windows=1 + layer_idx)


def test_the_copy_that_saves_most_goes_first_and_leaves_less_to_the_next() -> None:
    """Layer 0 has all it can use, so even its likely guess saves nothing; layer 1 lacks everything."""
    savings = {0: [4.0, 3.0, 0.0, 0.0], 1: [4.0, 3.0, 0.0, 0.0]}
    guesses = [guess(0, 1, 0.99), guess(1, 2, 0.5), guess(1, 3, 0.9), guess(1, 4, 0.4)]
    ranked = by_impact(guesses, {0: 2.0, 1: 0.0}, savings)
    assert [g.key for g in ranked] == [ExpertKey(1, 3), ExpertKey(1, 2), ExpertKey(1, 4)]
    assert by_impact(guesses, {0: 1.9, 1: 4.0}, savings)[0].key == ExpertKey(0, 1), "a little is left there"
    assert by_impact(guesses, {0: 9.0, 1: 4.0}, savings) == []
    keys = plan_reads(ranked, queued_bytes=0, window_bytes=600, threshold=0.5, ranked=True)
    assert keys == [ExpertKey(1, 3)], "in that order, and no more than the link brings in time"


@given(st.data())
def test_native_code_divides_a_tokens_experts_alike(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    there, in_ram = (data.draw(st.lists(st.booleans(), min_size=count, max_size=count)) for _ in range(2))
    moves = [data.draw(st.integers(-residents, count - residents)) for residents in range(count + 1)]
    division = divide(there, in_ram, moves)
    native = _native.divide_token(there, in_ram, moves)
    assert native == (division.on_device, division.copied, division.on_cpu)
    assert sorted(itertools.chain(*native)) == list(range(count))
    assert all(there[i] for i in division.on_device) and not any(there[i] for i in division.copied)
    assert all(in_ram[i] for i in division.on_cpu if there[i]), "what RAM has not stays where it is"
    assert len(division.copied) == max(0, moves[sum(there)])


@given(st.integers(1, 10), *(st.floats(1e-6, 1e-2) for _ in range(4)))
def test_a_tokens_moves_are_the_schedulers_in_one_call(
    count: int, cpu_s: float, gpu_s: float, copy_s: float, start_s: float
) -> None:
    asked = SCHEDULERS["hybrid"]
    one_by_one = lambda work: asked(work)  # noqa: E731 - the same answers by the general way
    costs = count, cpu_s, gpu_s, copy_s, start_s
    assert moves_of(asked, *costs) == moves_of(one_by_one, *costs)
    assert savings_of(asked, *costs) == savings_of(one_by_one, *costs)
