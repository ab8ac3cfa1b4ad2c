"""`moe-offload tune`: defaults unless real runs say otherwise, a budget that is kept, nothing half done."""

from __future__ import annotations

import json
import signal
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_offload
from moe_offload import (
    cli,
    cli_tune,
    ops,
    profile_store,
    profile_write,
    tune,
    tune_facts,
    tune_profile,
    tune_tiers,
)  # fmt: skip
from moe_offload.config import DEMO_MODEL, MIB
from moe_offload.device import load_profile
from moe_offload.errors import ConfigError
from moe_offload.planning.machine_speed import SeenGain
from moe_offload.planning.paired_runs import DUEL_ROUNDS, SCREEN_ROUNDS
from moe_offload.planning.plans import PoolPlan
from moe_offload.planning.profile_speed import STALLED_PER_CLEAN, profile_speed, split_overhead
from moe_offload.planning.time_budget import TimeBudget
from moe_offload.planning.tuning import NO_PREDICTOR, Choice
from moe_offload.profile_parse import parse_profile
from moe_offload.profile_schema import Curve, Figure
from moe_offload.residency.machine_state import machine_key
from moe_offload.runtime import loaded_models
from moe_offload.runtime.tuning_run import Counts, Text, TuningRun
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.checkpoint_key import checkpoint_key
from moe_offload.trace import make_trace
from moe_offload.tune_stage import Stage, combined

EIGHT_OF_16 = {"ram": "4GiB", "experts": 8, "context": None}


class Clock:
    """Whoever looks at it has taken a millisecond: budgets end, and nobody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


def tiers() -> tune_tiers.Tiers:
    cores = ops.usable_cores()
    measured = {name: Figure(value, "measured") for name, value in (("a", 2e9), ("b", 1e9), ("c", 4.0))}
    return tune_tiers.Tiers(
        figures={
            "cpu": {"physical_cores": measured["c"]},
            "ram": {
                "capacity": Figure(2.0**34, "measured"),
                "read_bandwidth": measured["a"],
                "kernel_bandwidth": measured["a"],
                "kernel_bandwidth_busy": measured["b"],
            },
            "disk": {"read_bandwidth": measured["a"], "read_bandwidth_busy": measured["b"]},
            "model": {"expert_size": Figure(1e4, "measured"), "submit_time": Figure(3e-4, "measured")},
        },
        curves={"ram": {"read_bandwidth_by_threads": Curve(((1.0, 1e9),), "measured")}},
        kernel_by_threads={count: 1e9 * count for count in range(1, cores + 1)},
    )


def tuner(path: Path, seconds: float = 60.0, load: dict[str, Any] = EIGHT_OF_16) -> tune.Tuner:
    clock = Clock()
    budget = TimeBudget(seconds, clock)
    return tune.Tuner(open_checkpoint(path), path, tiers(), budget, load, clock=clock)


def fake_runs(monkeypatch: pytest.MonkeyPatch, seconds_of: Any) -> list[Choice]:
    """Let every run take what ``seconds_of`` says of its choice and number; return the choices that ran."""
    ran: list[Choice] = []

    def run(self: TuningRun, choice: Choice, text: Any, num_tokens: int) -> float:
        ran.append(choice)
        return float(seconds_of(choice, ran.count(choice)))

    monkeypatch.setattr(TuningRun, "run", run)
    return ran


def test_equal_runs_leave_the_defaults(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = fake_runs(monkeypatch, lambda choice, number: 1.0)
    (stage,) = tuner(tiny_moe).stages()
    assert stage.choice == stage.defaults == tune.default_choice(open_checkpoint(tiny_moe))
    assert "none of" in stage.verdict and len(set(ran)) >= 3
    profile = tune_profile.assemble("p", "test", "key", tiers(), [stage], 1.0)
    (duel,) = profile.notes["evidence"]["duel"]
    assert (duel["winner"], duel["speedup"], duel["pairs"]) == ("the defaults", 1.0, SCREEN_ROUNDS)
    ahead = profile_speed(profile).ahead
    assert ahead is not None and 0 < ahead.recall <= 1 and ahead.layer_s > 0  # for `plan`
    figures = profile.figures["model"]
    assert ahead.of_misses and ahead.recall == figures["missed_recall"].value != figures["recall"].value
    older = {name: figure for name, figure in figures.items() if name != "missed_recall"}
    before = profile_speed(replace(profile, figures={**profile.figures, "model": older})).ahead
    assert before is not None and before.recall == figures["recall"].value
    assert "of the misses" in ahead.describe() and "not of the misses alone" in before.describe()
    assert profile_speed(profile).submit_s == 3e-4


def test_what_is_faster_beyond_noise_is_chosen_with_its_evidence(
    tiny_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds_of(choice: Choice, number: int) -> float:
        return (0.8 if choice.predictor == NO_PREDICTOR else 1.0) * (1.0 + 0.01 * (number % 3))

    fake_runs(monkeypatch, seconds_of)
    (stage,) = tuner(tiny_moe).stages()
    assert not stage.choice.prefetch and stage.gain is not None and stage.gain.low > 1.2
    profile = tune_profile.assemble("p", "test", "key", tiers(), [stage], 1.0)
    assert profile.settings["prefetch"] is False and "predictor" not in profile.settings
    assert profile_speed(profile).ahead is None
    evidence = profile.notes["evidence"]
    assert evidence["speedup"] == pytest.approx(1.25) and evidence["pairs"] == DUEL_ROUNDS
    (duel,) = evidence["duel"]
    assert (duel["winner"], duel["against"]) == (stage.choice.describe(), "the defaults")
    assert 1.2 < duel["low"] < duel["speedup"] < duel["high"] and duel["pairs"] == DUEL_ROUNDS
    settings = {run["settings"] for run in evidence["run"] if run["stage"].startswith("duel")}
    assert settings == {"defaults", stage.choice.describe()}


def test_a_division_of_slots_is_ranked_run_kept_and_used(
    cache: Path, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that leaves more to residents: its runs are said to be faster, whatever else they choose."""
    fake_runs(monkeypatch, lambda choice, number: 0.7 if choice.ram_staging < 2 else 1.0)
    (stage,) = tuner(tiny_moe).stages()
    assert stage.choice.ram_staging < 2 and "ram_staging" in stage.choice.describe()
    key = checkpoint_key(open_checkpoint(tiny_moe))
    stage.choice = replace(stage.choice, num_threads=stage.defaults.num_threads)
    tune_profile.keep(tune_profile.assemble("p", "test", key, tiers(), [stage], 1.0), key)
    model = moe_offload.from_pretrained(tiny_moe, ram="4GiB", experts=8)
    try:
        (pool,) = model.offload.cache._pools
        top_k = model.offload.cache._top_k
        assert pool.num_staging == int(stage.choice.ram_staging * top_k) < 2 * top_k
        assert model.offload.plan.pools[0].num_staging == pool.num_staging
        model.generate(torch.arange(8)[None], max_new_tokens=4, do_sample=False)
        model.offload.cache.check()
        model.offload.cache.use_division(2.0)
        assert pool.num_staging > int(stage.choice.ram_staging * top_k)
        assert len(pool.residents) <= pool.capacity
        model.generate(torch.arange(8)[None], max_new_tokens=4, do_sample=False)
        model.offload.cache.check()
    finally:
        model.offload.close()


def test_what_layers_cost_and_prefetching_gains_is_seen_in_runs_without_it(
    tiny_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that prefetch wait less and do more: theirs say nothing of a layer that waits."""

    def run(self: TuningRun, choice: Choice, text: Any, num_tokens: int) -> float:
        tokens = self.counted_tokens(num_tokens)
        stall_s = 0.1 if choice.prefetch else 0.6  # the last run's was taken once, whosever it was
        self.counts[choice].append(Counts(stall_s, 0.9 if choice.prefetch else 0.5))
        return tokens * (1.0 if choice.prefetch else 1.25)

    monkeypatch.setattr(TuningRun, "run", run)
    (stage,) = tuner(tiny_moe).stages()
    assert stage.prefetch is not None and stage.choice == stage.defaults
    assert (stage.prefetch.pairs, stage.prefetch.hit_rate) == (SCREEN_ROUNDS + DUEL_ROUNDS, 0.5)
    checkpoint = open_checkpoint(tiny_moe)
    stalled = 1 - 0.5**checkpoint.spec.top_k
    profile = tune_profile.assemble("p", "test", "key", tiers(), [stage], 1.0)
    kept = parse_profile(tomllib.loads(profile_write.as_toml(profile)), "p.toml")
    overheads, ahead = profile_speed(kept).overheads, profile_speed(kept).ahead
    layer_s = overheads.native_layer_s + stalled * overheads.stalled_layer_s
    assert layer_s * checkpoint.spec.num_hidden_layers == pytest.approx(1.25 - 0.6, rel=1e-3)
    assert ahead is not None and ahead.seen == SeenGain(pytest.approx(1.25), 0.5)
    assert "1.25x as fast" in ahead.describe()
    assert any(run["stage"].startswith("prefetching or not") for run in kept.notes["evidence"]["run"])
    stage.choice = replace(stage.defaults, predictor="frequency")
    other = tune_profile.assemble("p", "test", "key", tiers(), [stage], 1.0)
    assert "prefetch_speedup" not in other.figures["model"], "other prefetching was not paired"


def test_luck_in_the_first_rounds_does_not_survive_the_duel(
    tiny_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds_of(choice: Choice, number: int) -> float:
        lucky = choice.predictor == NO_PREDICTOR and number <= SCREEN_ROUNDS
        return 0.5 if lucky else 1.0 + 0.01 * (number % 2)

    fake_runs(monkeypatch, seconds_of)
    (stage,) = tuner(tiny_moe).stages()
    assert stage.choice == stage.defaults and "not faster beyond noise" in stage.verdict


def test_without_time_for_runs_the_defaults_stay(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (stage,) = tuner(tiny_moe, seconds=0.0).stages()
    assert stage.choice == stage.defaults and "no time" in stage.verdict


def test_real_runs_keep_the_budget_and_leave_the_model_closed(tiny_moe: Path) -> None:
    threads, alive = ops.num_threads(), len(loaded_models.live_handles)
    subject = tuner(tiny_moe, seconds=0.3)
    (stage,) = subject.stages()
    assert stage.runs and subject.budget.spent_s < 0.45
    assert len(loaded_models.live_handles) == alive
    ops.set_num_threads(threads)


def test_what_misses_cost_is_not_charged_to_layers_that_miss_nothing() -> None:
    layer_s, stall_s = split_overhead(400e-6, 0.8)
    assert stall_s is not None and layer_s + 0.8 * stall_s == pytest.approx(400e-6)
    proportion = STALLED_PER_CLEAN
    assert stall_s / layer_s == pytest.approx(proportion)
    assert split_overhead(400e-6, 0.8, 40e-6) == (40e-6, pytest.approx(450e-6)), "other runs told"
    assert split_overhead(40e-6, 0.01) == (40e-6, None), "few misses say nothing of what one adds"


DEVICE = "emulated:vram=8MiB,link=2GB/s"


def test_a_scheduler_is_chosen_kept_and_used_with_a_device(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = fake_runs(monkeypatch, lambda choice, number: 1.0 if choice.scheduler == "hybrid" else 0.8)
    monkeypatch.setattr(TuningRun, "write", short_text)
    monkeypatch.setattr(cli_tune, "TIERS_SHARE", 0.002)
    monkeypatch.setattr(tune, "MOST_CANDIDATES", 16)  # one of every setting, whatever the figures say
    output, threads = tmp_path / "p.toml", ops.num_threads()
    arguments = ["tune", "--ram", "2GiB", "--experts", "50%", "--seconds", "600", "-o", str(output)]
    try:
        assert cli.main([*arguments, "--device", DEVICE]) == 0
        assert "device " in capsys.readouterr().out
        assert len({choice.scheduler for choice in ran}) > 1 and None not in {c.scheduler for c in ran}
        assert not load_profile(cache / f"{machine_key()}.toml").has("gpu"), "the machine has none"
        profile = load_profile(output)
        faster = str(profile.settings["scheduler"])  # which of them was tried is the cost model's choice
        assert (
            faster in {choice.scheduler for choice in ran} - {"hybrid"} and profile.settings["vram_slots"] > 0
        )
        assert profile.has("link") and profile.value("gpu", "vram") == 8 * MIB
        for device, given, scheduler in [
            (DEVICE, {}, f"emulated, {faster}"),
            (DEVICE, {"scheduler": "hybrid"}, "emulated, hybrid"),
            (None, {}, None),
        ]:
            model = moe_offload.from_pretrained(ram="2GiB", experts="50%", device=device, **given)
            hybrid = model.offload.hybrid
            shown = None if hybrid is None else hybrid.describe()
            model.offload.close()
            assert shown == scheduler if scheduler is None else str(shown).startswith(scheduler)
    finally:
        ops.set_num_threads(threads)


def short_text(self: TuningRun, num_tokens: int, budget: TimeBudget) -> Text:
    tokens = torch.arange(24)[None]
    return Text(tokens, [1e-3] * 23)


def test_a_run_finds_on_the_device_what_its_own_last_run_left() -> None:
    model = moe_offload.from_pretrained(
        ram="2GiB", experts="50%", context=64, device=DEVICE, profile="none", warm_start=False
    )
    try:
        run = TuningRun(model, open_checkpoint(DEMO_MODEL), Clock())
        text = Text(torch.arange(24)[None], [])
        tier = model.offload.hybrid.tier
        split = Choice(2, "horizon", NO_PREDICTOR, 1, "static_split")
        moving = Choice(2, "lru", NO_PREDICTOR, 1, "on_demand")
        run.run(split, text, 24)
        left = tier.cache.residents()
        assert left and not tier.replaces
        run.apply(moving)
        assert tier.cache.residents() == [] and tier.replaces
        run.run(moving, Text(torch.arange(24, 48)[None], []), 24)
        assert tier.cache.residents() != left
        run.apply(split)
        found = set(tier.cache.residents())
        assert found and found <= set(left) and model.offload.hybrid.scheduler_name == "static_split"
        tier.cache.check()
    finally:
        model.offload.close()
        ops.set_num_threads(ops.usable_cores())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vram", "1GiB"], "name it, device="),
        (["--device", "emulated:vram=1MiB"], "is too small"),
        (["--device", "tpu"], "is unknown"),
    ],
)
def test_a_device_that_cannot_be_is_refused_before_anything_is_measured(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune_tiers, "measure_all", None)
    assert cli.main(["tune", *arguments]) in (2, 3)
    assert message in capsys.readouterr().err


def test_where_all_fit_threads_and_caches_are_judged_apart(
    tiny_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = fake_runs(monkeypatch, lambda choice, number: 1.0)
    first, second = tuner(tiny_moe, load={"ram": "4GiB", "experts": None, "context": None}).stages()
    assert "25%" in second.name and first.slots == 16 and second.slots < 16
    assert {choice.policy for choice in ran[:2]} == {"horizon"}


DEFAULTS, THREADS, POLICY = (
    Choice(2, "horizon", "auto"),
    Choice(1, "horizon", "auto"),
    Choice(1, "lru", NO_PREDICTOR),
)


@pytest.mark.parametrize(
    ("first", "second", "slower", "expected"),
    [
        (DEFAULTS, DEFAULTS, [], DEFAULTS),
        (THREADS, DEFAULTS, [], THREADS),
        (THREADS, DEFAULTS, [THREADS], DEFAULTS),
        (THREADS, POLICY, [], POLICY),
    ],
)
def test_settings_hold_in_both_stages(
    first: Choice, second: Choice, slower: list[Choice], expected: Choice
) -> None:
    stages = [Stage("all", DEFAULTS, first), Stage("tight", DEFAULTS, second, slower=slower)]
    assert combined(stages)[0] == expected


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moe_offload" / "profiles"


def test_the_command_keeps_what_the_next_load_uses(
    cache: Path, tiny_moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, output = ops.num_threads(), tmp_path / "my-machine.toml"
    arguments = [
        "tune",
        "--model",
        str(tiny_moe),
        "--ram",
        "4GiB",
        "--seconds",
        "1.5",
        "-o",
        str(output),
        "--json",
    ]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert shown.err == "", "no noise where stderr is no terminal"
    assert report["checkpoint"]["key"] == checkpoint_key(open_checkpoint(tiny_moe))
    assert report["figures"]["disk"]["read_bandwidth"] > 0 and report["evidence"]["verdict"]
    profile = load_profile(output)
    assert (
        profile.name == "my-machine"
        and profile.measured["command"] == "moe-offload tune --seconds 1.5 --ram 4GiB"
    )
    assert {time.busy for time in profile.expert_times} == {False, True}
    assert str(tmp_path) not in output.read_text(), "no paths"
    names = {path.name for path in cache.iterdir()}
    assert names == {f"{machine_key()}.toml", f"{machine_key()}-{report['checkpoint']['key']}.toml"}
    assert not load_profile(cache / f"{machine_key()}.toml").settings
    model = moe_offload.from_pretrained(tiny_moe, ram="4GiB")
    try:
        assert model.offload.profile.kind == profile_store.TUNED_MODEL
    finally:
        model.offload.close()
        ops.set_num_threads(threads)


@pytest.mark.parametrize(
    "where",
    ["measure_all", "write", "record", "predictability", "run", "assemble", "write_profile", "as_toml"],
)
def test_ctrl_c_leaves_nothing_behind(
    where: str, cache: Path, tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)

    owners = {"measure_all": tune_tiers, "assemble": tune_profile, "write_profile": profile_store}
    monkeypatch.setattr({**owners, "as_toml": profile_write}.get(where, TuningRun), where, interrupt)
    threads, alive = ops.num_threads(), len(loaded_models.live_handles)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    output = tmp_path / "out" / "p.toml"
    output.parent.mkdir()
    try:
        if where == "run":  # the others come without time for runs, too
            monkeypatch.setattr(cli_tune, "TIERS_SHARE", 0.001)
        seconds = "600" if where == "run" else "0.3"
        arguments = ["tune", "--model", str(tiny_moe), "--ram", "4GiB", "--seconds", seconds]
        arguments += ["-o", str(output)]
        assert cli.main(arguments) == 130
    finally:
        signal.signal(signal.SIGINT, previous)
        ops.set_num_threads(threads)
    assert list(output.parent.iterdir()) == [] and not (cache.is_dir() and list(cache.iterdir()))
    assert len(loaded_models.live_handles) == alive


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds must be a positive number"),
        (["-o", "nowhere/p.toml"], "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_a_stopped_machine_measures_is_left_out_or_refused() -> None:
    odd = tiers()
    odd.figures["disk"]["read_bandwidth_busy"] = Figure(1.0, "measured")
    odd.curves["ram"]["read_bandwidth_by_threads"] = Curve(((1.0, 1.0), (2.0, 2e10)), "measured")
    tune_profile.keep_the_possible(odd)
    assert set(odd.figures["disk"]) == {"read_bandwidth"}
    assert odd.curves["ram"]["read_bandwidth_by_threads"].points == ((2.0, 2e10),)
    odd.figures["disk"]["read_bandwidth"] = Figure(1.0, "measured")
    with pytest.raises(ConfigError, match=r"disk\.read_bandwidth was measured as 1, which cannot be"):
        tune_profile.keep_the_possible(odd)


def test_the_report_for_people_names_runs_and_verdict() -> None:
    stage = Stage("all", DEFAULTS, DEFAULTS, verdict="the defaults: nothing was faster")
    stage.runs = [
        {"settings": "defaults", "stage": "duel all", "tokens_per_s": 10.0},
        {
            "settings": "x",
            "stage": "duel all",
            "tokens_per_s": 9.0,
            "against_defaults": 0.9,
            "low": 0.8,
            "high": 1.0,
        },
    ]
    profile = tune_profile.assemble("p", "test", "key", tiers(), [stage], 12.0)
    text = cli_tune.as_text(profile, Path("p.toml"))
    assert "nothing was faster" in text and "0.900 times the defaults (0.800 to 1.000)" in text
    assert tomllib.loads(tune_profile_toml(profile))["evidence"]["run"][1]["low"] == 0.8


def tune_profile_toml(profile: Any) -> str:
    from moe_offload.profile_write import as_toml

    return as_toml(profile)


def test_only_layers_that_a_device_serves_are_replayed_there() -> None:
    """A device may have no kernel for the others' format."""
    trace = make_trace(np.arange(24).reshape(4, 3, 2) % 8, num_experts=8, layers=[1, 2, 5])
    served = tune_facts._of_layers(trace, {2, 5})
    assert served.layers == (2, 5) and np.array_equal(served.experts, trace.experts[:, 1:])
    assert tune_facts._of_layers(trace, {1, 2, 5}) is trace
    ram = [PoolPlan(10, (1, 2, 5), 24, 12, 4)]
    (both,) = tune_facts._both(ram, [PoolPlan(10, (2, 5), 16, 6, 4)])
    assert both.num_slots == 14, "what is resident on the device needs no slot"
