"""Experts on a device and the CPU at once: the same bits under every budget, scheduler, policy and fault."""

from __future__ import annotations

import _thread
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_models import save_toy_model

import moe_offload
from moe_offload import BudgetError, ConfigError, cli
from moe_offload.config import DEMO_MODEL
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.expert_costs import MeasuredCosts, RunningCosts
from moe_offload.planning.gain_switch import GainSwitch
from moe_offload.planning.scheduler import SCHEDULERS, Schedule
from moe_offload.replay import belady_hit_rate, replay
from moe_offload.residency.accelerator import wait_copy
from moe_offload.runtime import device_setup
from moe_offload.storage.expert_format import ExpertKey

NUM_TOKENS = 16
VRAM, SMALL_VRAM = "12MiB", "5MiB"  # 7.2 MiB of experts, or hardly one token's; 4.5 MiB are workspace
# (vram, scheduler, experts in RAM, policy, through the native step)
PLACEMENTS = [
    (VRAM, "hybrid", None, "horizon", True),
    (VRAM, "hybrid", "12%", "lru", True),
    (VRAM, "hybrid", "25%", "ewma", False),
    (SMALL_VRAM, "hybrid", 4, "horizon", True),
    ("64MiB", "hybrid", "all", "horizon", True),
    (VRAM, "on_demand", None, "lru", True),
    (SMALL_VRAM, "on_demand", "12%", "horizon", False),
    (VRAM, "static_split", "25%", "horizon", True),
    (VRAM, "fiddler", "12%", "horizon", True),
    (SMALL_VRAM, "hybrimoe_greedy", "25%", "ewma", True),
]


# Alike on both sides, a copy somewhat dearer: who computes what must not hang on how busy the machine is.
MEASURE_COSTS, SAW_CPU = device_setup.measure_costs, RunningCosts.saw_cpu
COSTS = MeasuredCosts(((1, 2e-5), (64, 4e-4)), ((1, 2e-5), (64, 4e-4)), copy_s=3e-5)


@pytest.fixture(autouse=True)
def steady_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_setup, "measure_costs", lambda *_: COSTS)
    for name in ("saw_cpu", "saw_gpu", "saw_copies", "saw_start"):
        saw = getattr(RunningCosts, name)
        as_expected = lambda self, expected_s, seconds, saw=saw: saw(self, expected_s, expected_s)  # noqa: E731
        monkeypatch.setattr(RunningCosts, name, as_expected)


@contextmanager
def loaded(
    vram: str | None = VRAM,
    *,
    path: Path = DEMO_MODEL,
    link: str = "2GB/s",
    native: bool = True,
    shares: bool = True,
    **kwargs: Any,
) -> Iterator[Any]:
    """Load the model; ``shares``: scheduler and copies ahead begin on, as they are once they have won."""
    device = f"emulated:vram={vram},link={link}" if vram is not None else None
    model = moe_offload.from_pretrained(
        path, ram="2GiB", warm_start=False, device=device, **{"context": 256, **kwargs}
    )
    try:
        if not native:
            model.offload.native_step = None
        if shares and model.offload.hybrid is not None and model.offload.hybrid.switch is not None:
            model.offload.hybrid.use("hybrid", GainSwitch())
            model.offload.prefetcher.switch = GainSwitch()
        yield model
    finally:
        model.offload.close()


def generate(model: Any, prompt_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the greedy continuation and the logits of every step."""
    out = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits)


@pytest.fixture(scope="module")
def prompt_ids() -> torch.Tensor:
    ids: torch.Tensor = moe_offload.load_tokenizer(DEMO_MODEL)(
        "The old bridge was", return_tensors="pt"
    ).input_ids
    return ids


@pytest.fixture(scope="module")
def expected(prompt_ids: torch.Tensor) -> dict[bool, tuple[torch.Tensor, torch.Tensor]]:
    """The CPU's own, by whether the native step computes; the two are close, not the same."""
    with loaded(None) as model:
        native = generate(model, prompt_ids)
        model.offload.native_step = None
        return {True: native, False: generate(model, prompt_ids)}


def assert_same(actual: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(actual[0], wanted[0])
    assert torch.equal(actual[1], wanted[1]), "the logits differ in bits"


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_a_device_changes_time_and_never_a_bit(placement, prompt_ids, expected) -> None:
    vram, scheduler, experts, policy, native = placement
    with loaded(vram, scheduler=scheduler, experts=experts, policy=policy, native=native) as model:
        assert_same(generate(model, prompt_ids), expected[native])
        hybrid = model.offload.hybrid
        counters = hybrid.counters
        assert counters.device_experts > 0 and not hybrid.tier.off_reason
        if scheduler == "on_demand":
            assert counters.cpu_experts == 0 or vram == SMALL_VRAM
            assert counters.copied_experts > 0
        if scheduler == "static_split":
            assert counters.copied_experts == 0 and counters.cpu_experts > 0
        hybrid.tier.cache.check()
        model.offload.cache.check()


def calls_of(run: Any) -> list[tuple[int, int]]:
    """From now on, for each native run of layers: the first, and where it stopped."""
    calls, native_run = list[tuple[int, int]](), run.run

    def counted(first: int, *args: Any) -> int:
        stopped = native_run(first, *args)
        calls.append((first, stopped))
        return stopped

    run.run = counted
    return calls


@pytest.mark.parametrize(
    ("vram", "scheduler"),
    [("64MiB", "hybrid"), ("64MiB", "on_demand"), (VRAM, "static_split"), (VRAM, "every_second")],
)
def test_with_everything_at_hand_a_token_is_one_native_call(
    vram, scheduler, prompt_ids, expected, monkeypatch
) -> None:
    """Whatever it shares out: the device has all experts, or some, and leaves every second to the CPU."""
    monkeypatch.setitem(
        SCHEDULERS, "every_second", lambda work: Schedule(work.on_gpu & (np.cumsum(work.on_gpu) % 2 == 0), 0)
    )
    with loaded(vram, scheduler=scheduler, prefetch=False) as model:
        generate(model, prompt_ids)  # fills RAM and the device's free slots
        hybrid = model.offload.hybrid
        hybrid.switch, hybrid.tier.replaces = None, False
        for costs in hybrid.costs.values():  # hybrid would copy where the machine happens to be slow
            costs.measured = dataclasses.replace(costs.measured, copy_s=1e3)
        hybrid.tier.cache.keep_only(hybrid.tier.cache.residents())  # nothing is on its way
        calls = calls_of(model.offload.native_step._hybrid_run)
        before = hybrid.counters.device_experts, hybrid.counters.cpu_experts
        assert_same(generate(model, prompt_ids), expected[True])
        assert calls == [(0, 12)] * (NUM_TOKENS - 1)
        assert hybrid.counters.device_experts > before[0]
        assert hybrid.counters.cpu_experts > before[1] or vram != VRAM
        hybrid.tier.cache.check()
        model.offload.cache.check()


@pytest.mark.parametrize("native", [True, False], ids=["in one native call", "layer by layer"])
@pytest.mark.parametrize("scheduler", ["on_demand", "static_split"])
def test_the_host_waits_for_the_device_once_a_layer(scheduler, native, prompt_ids, expected) -> None:
    """Also for a prompt of a few tokens, and where copies are waited for."""
    with loaded(scheduler=scheduler, native=native, prefetch=False) as model:
        fill_ram(model)
        generate(model, prompt_ids)
        device, counters = model.offload.hybrid.tier.device, model.offload.hybrid.counters
        waits, copied = device.counters()["waits"], counters.copied_experts
        assert_same(generate(model, prompt_ids), expected[native])
        waits = device.counters()["waits"] - waits
        assert 0 < waits <= 12 * NUM_TOKENS
        if scheduler == "on_demand":
            assert waits == 12 * NUM_TOKENS and counters.copied_experts > copied


def test_costs_are_measured_at_load_and_corrected_by_steps(prompt_ids, monkeypatch) -> None:
    monkeypatch.setattr(device_setup, "measure_costs", MEASURE_COSTS)
    monkeypatch.setattr(RunningCosts, "saw_cpu", SAW_CPU)
    with loaded(scheduler="static_split") as model:
        (costs,) = set(model.offload.hybrid.costs.values())
        measured = costs.measured
        assert [tokens for tokens, _ in measured.cpu_curve] == [1, 4, 16, 64]
        assert min(seconds for _, seconds in (*measured.cpu_curve, *measured.gpu_curve)) > 0 < measured.copy_s
        assert measured.gpu_start_s > 0
        generate(model, prompt_ids)
        assert costs.cpu_factor != 1.0 == costs.gpu_factor, "the device's is not listened to here"


def test_copies_for_a_layer_are_made_inside_the_native_call(prompt_ids, expected) -> None:
    """Python is asked between layers only who leaves, when the free slots are used up."""
    with loaded(scheduler="on_demand", prefetch=False) as model:
        fill_ram(model)
        generate(model, prompt_ids)
        hybrid = model.offload.hybrid
        native_step = model.offload.native_step
        calls = calls_of(native_step._hybrid_run)
        native_step._run_experts = None  # nobody may call it
        before = hybrid.counters.copied_experts
        assert_same(generate(model, prompt_ids), expected[True])
        assert calls == [(0, 12)] * (NUM_TOKENS - 1)
        assert hybrid.counters.copied_experts > before + 100 and hybrid.counters.cpu_experts == 0
        hybrid.tier.cache.check()
        model.offload.cache.check()
        device = model.offload.stats().device
        assert device.device_hits + device.device_misses == device.device_experts


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("arrived", [False, True])
def test_what_is_copied_ahead_stays_inside_the_native_call(frozen, arrived, prompt_ids, monkeypatch) -> None:
    """What has arrived is the device's, and a resident once used; else, or frozen, the CPU computes."""
    monkeypatch.setitem(SCHEDULERS, "there", lambda work: Schedule(work.on_gpu.copy(), 0))
    with loaded(VRAM, scheduler="there", prefetch=False) as model, torch.no_grad():
        fill_ram(model)
        hybrid, native_step, kv = model.offload.hybrid, model.offload.native_step, model.offload.new_cache()
        model(prompt_ids[:, :-1], past_key_values=kv)
        expected = model(prompt_ids[:, -1:], past_key_values=kv).logits
        done = native_step._hybrid_run._native.done()
        chosen = {ExpertKey(layer_idx, ids[0]) for layer_idx, ids, *_ in done}
        kv.crop_to(prompt_ids.shape[1] - 1)
        cache = hybrid.tier.cache
        cache.keep_only([key for key in cache.residents() if key not in chosen])
        cache.prefetch(sorted(chosen)[:4])
        if arrived:
            cache.finish_reads()
        else:
            monkeypatch.setattr(type(cache), "show_arrived", lambda *args, **options: None)
        monkeypatch.setattr(type(hybrid), "is_frozen", frozen)
        monkeypatch.setitem(SCHEDULERS, "static_split", SCHEDULERS["there"])
        native_step._run_experts = None  # nobody may call it
        hits = hybrid.tier.stats.prefetch_hits
        assert torch.equal(model(prompt_ids[:, -1:], past_key_values=kv).logits, expected)
        used = hybrid.tier.stats.prefetch_hits - hits
        assert used == (4 if arrived and not frozen else 0)
        assert sum(cache.is_resident(key) for key in sorted(chosen)[:4]) == used
        cache.check()


def test_a_copy_that_fails_inside_a_native_run_changes_no_bit(prompt_ids, expected) -> None:
    with loaded(scheduler="on_demand", prefetch=False) as model:
        fill_ram(model)
        generate(model, prompt_ids)
        hybrid = model.offload.hybrid
        hybrid.tier.device.inject(after=30, times=2)
        before = hybrid.tier.device.counters()["bytes_copied"]
        assert_same(generate(model, prompt_ids), expected[True])
        assert hybrid.tier.device.counters()["bytes_copied"] > before and hybrid.tier.is_on
        hybrid.tier.cache.check()


def test_layers_that_need_a_read_are_left_to_python(prompt_ids, expected) -> None:
    with loaded(experts="25%", prefetch=False) as model:
        generate(model, prompt_ids)
        calls = calls_of(model.offload.native_step._hybrid_run)
        assert_same(generate(model, prompt_ids), expected[True])
        assert {first for first, _ in calls if first} & {stopped + 1 for _, stopped in calls}
        model.offload.cache.check()
        device = model.offload.stats().device
        assert device.device_hits + device.device_misses == device.device_experts + device.cpu_experts


@pytest.mark.parametrize("fault", ["lost", "no memory"])
def test_a_device_that_fails_inside_a_native_run_changes_no_bit(fault, prompt_ids, expected, capsys) -> None:
    with loaded(scheduler="static_split", prefetch=False) as model:
        hybrid = model.offload.hybrid
        generate(model, prompt_ids)
        run = model.offload.native_step._hybrid_run
        calls, counted_run = calls_of(run), run.run

        def failing_run(*args: Any) -> int:
            if calls:
                return counted_run(*args)
            device = hybrid.tier.device
            if fault == "lost":
                device.inject(after=0, lost=True)
                span = np.array([[model.offload.cache._arena.address, device.address, 4096]], np.int64)
                wait_copy(device, device.submit(span, True))
            else:
                device.inject_no_memory(1)
            return counted_run(*args)

        run.run = failing_run
        assert_same(generate(model, prompt_ids), expected[True])
        assert calls[0][1] < 12 and hybrid.tier.is_on is (fault != "lost")
        text = capsys.readouterr().err
        assert ("goes on alone" if fault == "lost" else "slots were given back") in text
        model.offload.cache.check()


def test_an_interrupt_inside_a_native_run_leaves_both_tiers_usable(prompt_ids, expected) -> None:
    with loaded("64MiB", scheduler="on_demand", prefetch=False, link="12GB/s") as model:
        generate(model, prompt_ids)
        run, forwards = model.offload.native_step._hybrid_run, iter(range(100))
        native, native_run = run._native, run._native.run

        class Interrupted:
            def __getattr__(self, name: str) -> Any:
                return getattr(native, name)

            def run(self, *args: Any) -> int:
                if next(forwards) == 5:
                    _thread.interrupt_main()  # seen by the first wait of the run
                return native_run(*args)

        run._native = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            generate(model, prompt_ids)
        model.offload.hybrid.tier.cache.check()
        model.offload.cache.check()
        assert_same(generate(model, prompt_ids), expected[True])


def fill_ram(model: Any) -> None:
    cache, spec = model.offload.cache, model.offload.spec
    cache.preload([ExpertKey(i, e) for i in spec.moe_layers for e in range(spec.num_experts)])
    cache.finish_reads()
    cache.absorb()


@pytest.mark.parametrize("policy", ["lru", "ewma", "horizon"])
def test_replaying_a_runs_own_trace_gives_the_devices_counters_to_the_digit(policy, prompt_ids) -> None:
    """As bench/cache_hit_rate.py counts: every miss is copied and served on the device."""
    with loaded(scheduler="on_demand", policy=policy, prefetch=False) as model:
        fill_ram(model)
        with model.offload.trace() as recorder:
            recorder.begin_sequence()
            generate(model, prompt_ids)
        tier = model.offload.hybrid.tier
        trace, stats = recorder.trace(), tier.stats
        expert_bytes = {int(i): n for i, n in trace.metadata["expert_bytes"].items()}
        replayed = replay(trace, tier.plan.pools, lambda: make_policy(policy), expert_bytes)
        assert (stats.hits, stats.misses, stats.evictions) == (
            replayed.hits,
            replayed.misses,
            replayed.evictions,
        )
        assert stats.evictions > 100 and 0.2 < replayed.hit_rate < 0.9
        device = model.offload.stats(belady=True).device
        assert device.device_hit_rate == device.device_window_hit_rate == replayed.hit_rate
        best = belady_hit_rate(trace, tier.plan.pools, expert_bytes)
        assert device.device_belady_hit_rate == pytest.approx(best)
        assert 0 < device.device_below_belady < 0.5


def test_with_a_device_the_distance_to_belady_is_given_for_both_tiers(prompt_ids) -> None:
    """RAM's needs are those that the device did not serve, whoever of Python and native code ran a layer."""
    with loaded(experts="25%", policy="lru", prefetch=False) as model:
        for _ in range(3):
            generate(model, prompt_ids)
        cache, tier = model.offload.cache, model.offload.hybrid.tier
        stats = model.offload.stats(belady=True)
        logged, (ram, device) = cache.log.events()
        steps = [(ids, above) for _, ids, num_tokens, above in logged if num_tokens is None]
        assert sum(len(ids) for ids, _ in steps) == tier.cache.hits_and_needs[1] - device.needs
        assert sum(len(ids) - len(above) for ids, above in steps) == cache.hits_and_needs[1] - ram.needs
        assert sum(len(above) for _, above in steps) > 0
        assert stats.window_hit_rate == pytest.approx(stats.hits / (stats.hits + stats.misses))
        hits, needs = tier.cache.hits_and_needs
        assert stats.device.device_window_hit_rate == pytest.approx(hits / needs)
        assert 0 < stats.below_belady < 1 and 0 < stats.device.device_below_belady < 1
        account = stats.as_dict()
        assert account["device_below_belady"] == stats.device.device_below_belady


def test_layers_without_a_kernel_on_the_device_stay_on_the_cpu(
    prompt_ids, expected, long_prompt, expected_of_long, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(device_setup, "has_kernel", lambda device, executor: executor.layer_idx % 3 > 0)
    with loaded(context=600) as model, torch.no_grad():
        hybrid, said = (
            model.offload.hybrid,
            "the experts of layers 0, 3, 6, 9 stay on the CPU: emulated has no",
        )
        assert said in capsys.readouterr().err and said in model.offload.stats().device.device_state
        assert_same(generate(model, prompt_ids), expected[True])
        model.offload.prefetcher.enabled = False
        assert_same(generate(model, prompt_ids), expected[True])
        assert torch.equal(model(long_prompt).logits, expected_of_long)
        assert hybrid.counters.device_experts > 0
        (pool,) = hybrid.tier.plan.pools
        assert pool.layers == (1, 2, 4, 5, 7, 8, 10, 11)
        hybrid.tier.cache.check()
        model.offload.cache.check()
    monkeypatch.setattr(device_setup, "has_kernel", lambda device, executor: False)
    with pytest.raises(ConfigError, match="has no kernels for experts in Q4_0"), loaded():
        pass


def test_several_sequences_at_once_have_the_cpus_bits(prompt_ids) -> None:
    batch = prompt_ids.repeat(3, 1)
    batch[1], batch[2] = batch[1].flip(0), batch[2].roll(1)
    with loaded(None) as model:
        wanted = generate(model, batch)
    with loaded(experts="25%") as model:
        assert_same(generate(model, batch), wanted)
        assert model.offload.hybrid.counters.device_experts > 0


@pytest.fixture(scope="module")
def long_prompt() -> torch.Tensor:
    """Two chunks: 512 tokens and 28 more."""
    return torch.randint(5, 8000, (1, 540), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected_of_long(long_prompt) -> torch.Tensor:
    with loaded(None, context=600) as model, torch.no_grad():
        logits: torch.Tensor = model(long_prompt).logits
        return logits


@pytest.mark.parametrize(
    ("vram", "scheduler", "experts"),
    [
        (VRAM, "hybrid", None),
        (VRAM, "on_demand", "12%"),
        (SMALL_VRAM, "hybrid", 4),
        (VRAM, "static_split", "25%"),
        ("64MiB", "hybrid", "all"),
    ],
)
def test_a_prompt_streams_over_both_sides_with_the_cpus_bits(
    vram, scheduler, experts, long_prompt, expected_of_long
) -> None:
    with loaded(vram, scheduler=scheduler, experts=experts, context=600) as model, torch.no_grad():
        assert torch.equal(model(long_prompt).logits, expected_of_long)
        hybrid = model.offload.hybrid
        if scheduler == "on_demand":
            assert hybrid.counters.copied_experts > 0 == hybrid.counters.cpu_experts
        hybrid.tier.cache.check()
        model.offload.cache.check()
        assert torch.equal(model(long_prompt).logits, expected_of_long), "with what the first one left"
        assert hybrid.counters.device_experts > 0
        model.offload.cache.check()


def test_a_copy_that_fails_in_a_prompt_is_computed_on_the_cpu(long_prompt, expected_of_long) -> None:
    with loaded(scheduler="on_demand", experts="12%", context=600) as model, torch.no_grad():
        hybrid = model.offload.hybrid
        hybrid.tier.device.inject(after=10, times=2)
        assert torch.equal(model(long_prompt).logits, expected_of_long)
        assert hybrid.counters.redone_experts > 0 and hybrid.tier.is_on
        hybrid.tier.device.inject(after=10, lost=True)
        assert torch.equal(model(long_prompt).logits, expected_of_long)
        assert not hybrid.tier.is_on
        model.offload.cache.check()


def test_a_failed_copy_is_computed_on_the_cpu(prompt_ids, expected) -> None:
    with loaded(scheduler="on_demand") as model:
        hybrid = model.offload.hybrid
        hybrid.tier.device.inject(after=5, times=2)
        assert_same(generate(model, prompt_ids), expected[True])
        assert 0 < hybrid.counters.redone_experts <= 8 and not hybrid.tier.off_reason
        hybrid.tier.cache.check()
        model.offload.cache.check()


def test_rows_that_do_not_come_back_are_computed_on_the_cpu(prompt_ids, expected) -> None:
    with loaded(scheduler="on_demand") as model:
        hybrid = model.offload.hybrid
        hybrid.tier.device.inject(after=5, times=2, to_host=True)
        assert_same(generate(model, prompt_ids), expected[True])
        assert 0 < hybrid.counters.redone_experts <= 8 and not hybrid.tier.off_reason
        hybrid.tier.device.inject(after=20, lost=True, to_host=True)
        assert_same(generate(model, prompt_ids), expected[True])
        assert "lost" in hybrid.tier.off_reason


@pytest.mark.parametrize("native", [True, False])
def test_a_lost_device_leaves_the_rest_to_the_cpu(native, prompt_ids, expected, capsys) -> None:
    with loaded(experts="25%", native=native) as model:
        model.offload.hybrid.tier.device.inject(after=40, lost=True)
        assert_same(generate(model, prompt_ids), expected[native])
        assert "lost" in model.offload.hybrid.tier.off_reason
        assert "the CPU goes on alone" in capsys.readouterr().err
        model.offload.cache.check()
        assert_same(generate(model, prompt_ids), expected[native])


def test_a_launch_without_memory_gives_slots_back_and_goes_on(prompt_ids, expected, capsys) -> None:
    with loaded(scheduler="on_demand") as model:
        tier = model.offload.hybrid.tier
        before = tier.cache.slot_bytes
        tier.device.inject_no_memory(2)
        assert_same(generate(model, prompt_ids), expected[True])
        assert tier.is_on and tier.cache.slot_bytes < before
        assert "slots were given back" in capsys.readouterr().err
        tier.cache.check()


def test_without_pinned_memory_it_runs_and_says_so(prompt_ids, expected, capsys) -> None:
    with loaded(f"{VRAM},pinned=1MiB") as model:
        assert "the system pins 1.00 MiB of" in capsys.readouterr().err
        assert_same(generate(model, prompt_ids), expected[True])


def test_an_interrupt_in_the_middle_of_a_step_leaves_both_tiers_usable(prompt_ids, expected) -> None:
    with loaded(experts="25%", scheduler="on_demand") as model:
        hybrid, calls = model.offload.hybrid, iter(range(1000))
        launch = type(hybrid.tier.device).launch

        class Interrupting:
            """The device, whose 30th launch is followed by Ctrl-C."""

            def __getattr__(self, name):
                return getattr(device, name)

            def launch(self, *args):
                ticket = launch(device, *args)
                if next(calls) == 30:
                    raise KeyboardInterrupt
                return ticket

        device, hybrid.tier.device = hybrid.tier.device, Interrupting()
        with pytest.raises(KeyboardInterrupt):
            generate(model, prompt_ids)
        hybrid.tier.cache.check()
        model.offload.cache.check()
        assert_same(generate(model, prompt_ids), expected[True])


def spans(path: Path, row: str) -> list[tuple[float, float, dict[str, Any]]]:
    """(begin, end, arguments) of the events in a row whose name begins so."""
    events = json.loads(path.read_text())["traceEvents"]
    rows = {e["tid"] for e in events if e["ph"] == "M" and e["args"]["name"].startswith(row)}
    found = [e for e in events if e["ph"] == "X" and e["tid"] in rows]
    return [(e["ts"], e["ts"] + e["dur"], e["args"]) for e in found]


def overlaps(left: list[Any], right: list[Any]) -> int:
    """How many pairs of events overlap."""
    return sum(a[0] < b[1] and b[0] < a[1] for a in left for b in right)


def test_a_timeline_shows_cpu_device_and_link_at_work_at_once(long_prompt, tmp_path) -> None:
    path = tmp_path / "timeline.json"
    with loaded(link="200MB/s", context=600) as model, torch.no_grad():
        hybrid = model.offload.hybrid
        # Every other expert to the device, as fast as the scheduler's figures may say that the CPU is.
        hybrid.scheduler_name, hybrid.switch = "every_other", None
        SCHEDULERS["every_other"] = lambda work: Schedule(
            work.on_gpu | (np.arange(len(work.on_gpu)) % 2 == 0), 0.0
        )
        try:
            with model.offload.timeline(path):
                model(long_prompt)
        finally:
            del SCHEDULERS["every_other"]
    cpu, device, link = (spans(path, row) for row in ("CPU", "device", "link"))
    assert overlaps(cpu, device) and overlaps(cpu, link) and overlaps(device, link)
    layers = {arguments["layer"] for _, _, arguments in device}
    assert layers == set(range(12)) and {a["layer"] for _, _, a in link} <= layers
    assert all(a["bytes"] > 54 * 1024 for _, _, a in link), "an expert is one span"
    returns = spans(path, "rows to the host")
    assert len(returns) >= len(layers) and {a["layer"] for _, _, a in returns} == layers


@pytest.mark.parametrize("exclusive", [True, False])
def test_slots_may_be_divided_otherwise_without_another_token(exclusive, prompt_ids, expected) -> None:
    with loaded(experts="25%") as model:
        cache, tier = model.offload.cache, model.offload.hybrid.tier
        for ram_staging, vram_staging in ((1.0, 4.0), (4.0, 1.0)):
            cache.use_division(ram_staging, exclusive)
            tier.cache.use_division(vram_staging)
            assert_same(generate(model, prompt_ids), expected[True])
            cache.check()
            tier.cache.check()
        twice = set(cache.residents()) & set(tier.cache.residents())
        assert twice or exclusive


def test_a_timeline_needs_a_device(tmp_path) -> None:
    with (
        loaded(None) as model,
        pytest.raises(ConfigError, match="load the model with device="),
        model.offload.timeline(tmp_path / "x.json"),
    ):
        pass


def test_the_account_adds_up(prompt_ids) -> None:
    with loaded() as model:
        generate(model, prompt_ids)
        stats = model.offload.stats()
        device = stats.device
        assert device.device_hits + device.device_misses == device.device_experts + device.cpu_experts
        assert device.device_misses == device.cpu_experts + device.copied_experts
        assert device.link_bytes > 0 and 0 < device.device_hit_rate < 1
        assert device.vram_slot_bytes <= device.vram_bytes == 12 * 2**20
        figures = stats.as_dict()
        assert figures["link_bytes"] == device.link_bytes and "device_state" not in figures
        assert device.device_state.startswith("emulated, hybrid")
        speeds = model.offload.account()["speeds"]
        assert speeds["expert_cpu_s"]["measurements"] + speeds["expert_device_s"]["measurements"] > 0
        assert all(costs.speeds is model.offload.speeds for costs in model.offload.hybrid.costs.values())


def test_a_copy_that_arrives_after_the_decision_is_not_counted_twice(prompt_ids, monkeypatch) -> None:
    with loaded(scheduler="on_demand") as model:
        generate(model, prompt_ids)
        cache = model.offload.hybrid.tier.cache
        monkeypatch.setattr(cache, "has_bytes", lambda layer_idx, expert_ids: [False] * len(expert_ids))
        generate(model, prompt_ids)
        device = model.offload.stats().device
        assert device.device_misses == device.cpu_experts + device.copied_experts
        assert device.device_hits + device.device_misses == device.device_experts + device.cpu_experts


@pytest.mark.parametrize(("experts", "into_device"), [("all", True), ("25%", False)])
def test_what_is_prefetched_goes_to_the_tier_that_lacks_experts(experts, into_device, prompt_ids) -> None:
    with loaded(experts=experts) as model:
        prefetcher, tier = model.offload.prefetcher, model.offload.hybrid.tier
        prefetcher.switch = None
        generate(model, prompt_ids)
        assert (prefetcher._cache is tier.cache) is into_device
        device = model.offload.stats().device
        assert device.prefetched_bytes + device.prefetch_wasted_device_bytes > 0 or not into_device
        assert 0 <= device.prefetch_late_device_bytes <= device.prefetched_bytes
        assert (prefetcher._rank is not None) is into_device, "by the time that a copy saves"


@pytest.mark.slow
def test_a_link_that_is_slower_than_was_measured_ends_in_a_static_split(prompt_ids, monkeypatch) -> None:
    """Steps are timed for real: the cost model believes in free copies, each taking fourteen milliseconds."""
    monkeypatch.setattr(RunningCosts, "saw_copies", lambda self, expected_s, seconds: None)
    with loaded(experts="all", link="4MB/s", prefetch=False) as model:
        fill_ram(model)
        hybrid = model.offload.hybrid
        for _ in range(100):
            generate(model, prompt_ids)
            if hybrid.tier.is_filled:  # before, nothing is compared
                break
        for costs in hybrid.costs.values():
            costs.measured = dataclasses.replace(costs.measured, copy_s=1e-9)
        hybrid.use("hybrid", GainSwitch())  # what steps before have shown does not hold
        for _ in range(100):
            if hybrid.switch.gain is not None and not hybrid.switch.decision:
                break
            generate(model, prompt_ids)
        assert hybrid.counters.copied_experts > 0
        assert not hybrid.switch.decision and hybrid.switch.gain < 0
        assert "off: it costs" in model.offload.stats().device.device_state
        hybrid.switch._resting = 10_000  # no probe in what follows
        hybrid.switch.is_on = hybrid.tier.replaces = False
        copied = hybrid.counters.copied_experts
        generate(model, prompt_ids)
        assert hybrid.counters.copied_experts == copied


def test_a_device_begins_as_a_static_split(prompt_ids, expected) -> None:
    """Nothing is copied for a step or ahead, and nothing leaves, until a trial has shown that it pays."""
    with loaded(VRAM, experts="all", shares=False) as model:
        fill_ram(model)
        hybrid = model.offload.hybrid
        assert hybrid.is_frozen and not hybrid.tier.replaces and not model.offload.prefetcher.is_on
        hybrid.switch._resting = 10_000  # a trial would begin once the device is filled
        assert_same(generate(model, prompt_ids), expected[True])
        assert hybrid.counters.copied_experts == 0 and hybrid.counters.device_experts > 0
        assert model.offload.stats().device.prefetched_bytes == 0
        hybrid.switch._resting = 0
        while hybrid.is_frozen:  # its switch is told that sharing takes half of the time
            hybrid.switch.record(0.5 if hybrid.switch.is_on else 1.0)
        hybrid.tier.replaces = True
        assert_same(generate(model, prompt_ids), expected[True])


def test_a_prompt_is_shared_while_the_device_is_still_empty(long_prompt, expected_of_long) -> None:
    """A static split would leave all of it to the CPU; when layers have shown it to be faster, it does."""
    with loaded(VRAM, experts="all", shares=False, context=600) as model, torch.no_grad():
        hybrid = model.offload.hybrid
        assert hybrid.is_frozen and hybrid.tier.num_residents == 0
        assert torch.equal(model(long_prompt).logits, expected_of_long)
        assert hybrid.counters.copied_experts > 0 and hybrid.is_frozen
        hybrid.use("hybrid", GainSwitch(begins_on=False))  # what real layers have shown
        while "off" not in hybrid.prompts.describe():  # told that sharing takes half as long again
            hybrid.prompts.record(1.5 if hybrid.prompts.is_on else 1.0, 1.0)
        copied, on_device = hybrid.counters.copied_experts, hybrid.counters.device_experts
        assert torch.equal(model(long_prompt).logits, expected_of_long)
        assert hybrid.counters.copied_experts == copied
        assert hybrid.counters.device_experts > on_device, "residents stay the device's"
        assert "prompts off: it costs" in model.offload.stats().device.device_state


def test_layers_of_a_prompt_are_timed_beside_what_a_static_split_would_take(
    long_prompt, expected_of_long, monkeypatch
) -> None:
    """For real, where the cost model believes in a CPU that takes no time: sharing is in doubt, and tried."""
    costs = dataclasses.replace(
        COSTS, cpu_curve=((1, 1e-8), (64, 1e-8)), gpu_curve=((1, 0.0), (64, 0.0)), copy_s=0.0
    )
    monkeypatch.setattr(device_setup, "measure_costs", lambda *_: costs)
    with loaded(VRAM, experts="all", context=600) as model, torch.no_grad():
        prompts, seen = model.offload.hybrid.prompts, set[bool]()
        monkeypatch.setattr(
            prompts, "record", lambda *times, record=prompts.record: (seen.add(prompts.is_on), record(*times))
        )
        for _ in range(4):
            assert torch.equal(model(long_prompt).logits, expected_of_long)
        assert seen == {False, True}


def test_hybrid_falls_back_to_a_static_split_where_that_is_faster(prompt_ids, expected) -> None:
    """Its switch is told that steps with copies take twice the time."""
    with loaded(VRAM, experts="25%") as model:
        hybrid = model.offload.hybrid
        generate(model, prompt_ids)
        while hybrid.switch.gain is None:
            hybrid.switch.record(2.0 if hybrid.switch.is_on else 1.0)
        hybrid.tier.replaces = hybrid.switch.is_on
        before = hybrid.counters.copied_experts
        held = set(hybrid.tier.cache.residents())
        assert_same(generate(model, prompt_ids), expected[True])
        assert hybrid.counters.copied_experts == before
        assert held <= set(hybrid.tier.cache.residents()), "only free slots are filled"
        assert "off: it costs 100.0% of a static split" in model.offload.stats().device.device_state


def least_vram(path: Path) -> int:
    """What the refusal of too little names."""
    with pytest.raises(BudgetError, match=r"the smallest vram that would do is (\d+) bytes") as refusal:
        moe_offload.from_pretrained(path, device="emulated:vram=4KiB")
    return int(str(refusal.value).split("would do is ")[1].split(" ")[0])


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2"])
def test_other_layouts_have_the_cpus_bits(family, tmp_path) -> None:
    """Interleaved and transposed rows with biases; a family without a native step, with shared experts."""
    path = save_toy_model(family, tmp_path, dtype=torch.bfloat16)
    prompt = torch.randint(5, 60, (1, 30), generator=torch.Generator().manual_seed(2))
    with loaded(None, path=path, context=64) as model:
        wanted = generate(model, prompt)
    with loaded(str(least_vram(path) + 200_000), path=path, context=64, scheduler="on_demand") as model:
        assert_same(generate(model, prompt), wanted)
        counters = model.offload.hybrid.counters
        assert counters.device_experts > counters.copied_experts > 0 == counters.cpu_experts


def test_too_little_memory_is_refused_with_what_would_do() -> None:
    with loaded(str(least_vram(DEMO_MODEL))) as model:
        assert model.offload.hybrid.tier.plan.expert_bytes > 0
        assert "key/value" not in model.offload.hybrid.tier.plan.describe()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "emulated:link=1GB/s"}, "has the memory that it is given"),
        ({"device": "emulated:vram=1GiB,lnik=1GB/s"}, "is not understood"),
        ({"device": "emulated:vram=1GiB,latency=soon"}, "is no time"),
        ({"device": "tpu"}, "device='tpu' is unknown"),
        ({"device": "cuda"}, "device='cuda' is not possible"),
        ({"vram": "1GiB"}, "is for an accelerator"),
        ({"scheduler": "best"}, "known are hybrid"),
    ],
)
def test_devices_that_cannot_be_are_refused_by_name(arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        moe_offload.from_pretrained(DEMO_MODEL, **arguments)


def test_the_command_line_takes_a_device_and_writes_the_timeline(tmp_path, capsys) -> None:
    path = tmp_path / "timeline.json"
    arguments = [
        "generate",
        "--raw",
        "--prompt",
        "The old bridge",
        "--temperature",
        "0",
        "--json",
        "--ram",
        "2GiB",
    ]
    arguments += ["--max-new-tokens", "6", "--no-warm-start", "--stats"]
    device = ["--device", "emulated:link=1GB/s", "--vram", VRAM, "--scheduler", "on_demand"]
    assert cli.main(arguments) == 0
    alone = json.loads(capsys.readouterr().out)
    assert cli.main([*arguments, *device, "--timeline", str(path)]) == 0
    out, err = capsys.readouterr()
    both = json.loads(out)
    assert both["token_ids"] == alone["token_ids"]
    assert both["stats"]["device_experts"] > 0 and "device_experts" not in alone["stats"]
    assert "vram: 12.00 MiB at most" in err and "link_bytes_per_s" in err
    assert spans(path, "device") and spans(path, "link")
    assert cli.main([*arguments, "--timeline", str(path)]) == cli.EXIT_USER_ERROR
    assert "load the model with device=" in capsys.readouterr().err
