"""`moe-offload plan`: the arithmetic of the walls, and that it promises only what the runtime would run."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_models import save_toy_model

import moe_offload
import moe_offload.runtime.model as runtime
from moe_offload import cli, profile_store, rehearsals
from moe_offload.config import DEMO_MODEL, GIB, MIB, DeviceChoice, RuntimeConfig
from moe_offload.device import load_profile
from moe_offload.errors import BudgetError, CheckpointError, ConfigError
from moe_offload.header_costs import Process
from moe_offload.header_sizes import dense_read_bytes, element_bytes, head_bytes, prompt_weights
from moe_offload.hit_outlook import replayed_hits
from moe_offload.outlook import DRIVER_BYTES, Planner
from moe_offload.plan_plot import wall_limits
from moe_offload.planning.cost_model import TokenBytes
from moe_offload.planning.hit_curves import CURVES, expected_hit_rate, interpolate
from moe_offload.planning.machine_speed import (
    DecoderShape,
    DeviceSpeed,
    MachineSpeed,
    Overheads,
    PromptSpeed,
    ReadAhead,
    SeenGain,
)
from moe_offload.planning.plans import DensePlan
from moe_offload.planning.prefetch_plan import WASTE_TARGET
from moe_offload.planning.profile_speed import profile_speed
from moe_offload.planning.roofline import decode_speed
from moe_offload.planning.stalls import Stalls, independent_misses, thinned
from moe_offload.runtime import device_setup
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.checkpoint_key import checkpoint_key
from moe_offload.trace import make_trace

TOKEN = TokenBytes(dense_bytes=200, expert_bytes=600, kv_bytes=200)
MACHINE = MachineSpeed(ram_bytes_per_s=1000.0, disk_bytes_per_s=100.0, macs_per_s=1e6)
SHAPE = DecoderShape(num_layers=1, moe_layers=1, top_k=1, num_experts=4)


def test_with_everything_resident_ram_is_the_wall() -> None:
    speed = decode_speed(TOKEN, MACHINE, SHAPE, hit_rate=1.0)
    assert speed.tokens_per_s == pytest.approx(1.0)  # 1000 bytes at 1000 bytes/s
    assert speed.binding == "RAM"


def test_a_miss_is_waited_for_unless_experts_at_hand_hide_it() -> None:
    speed = decode_speed(TOKEN, MACHINE, SHAPE, hit_rate=0.0)
    assert speed.tokens_per_s == pytest.approx(1 / (1.0 + 6.0))  # 600 bytes at 100 bytes/s, nothing beside it
    assert speed.binding == "disk"
    two = replace(SHAPE, top_k=2)
    speed = decode_speed(TOKEN, MACHINE, two, hit_rate=0.5)
    # A quarter of the tokens misses both (6 s), a half one (3 s); all but the last one's 0.3 s are hidden.
    assert speed.tokens_per_s == pytest.approx(1 / (1.0 + 5.7 / 4 + 2.7 / 2))
    slow = replace(MACHINE, disk_latency_s=1.0)
    speed = decode_speed(TOKEN, slow, two, hit_rate=0.5)
    assert speed.tokens_per_s == pytest.approx(1 / (1.0 + 6.7 / 4 + 3.7 / 2))


def test_misses_that_come_together_share_their_latency() -> None:
    machine, two = replace(MACHINE, disk_latency_s=1.0), replace(SHAPE, top_k=2)
    together = decode_speed(TOKEN, machine, two, hit_rate=0.5, misses=(0.5, 0.0, 0.5))
    apart = decode_speed(TOKEN, machine, two, hit_rate=0.5, misses=(0.0, 1.0, 0.0))
    assert 1 / together.tokens_per_s == pytest.approx(1.0 + 6.7 / 2)
    assert 1 / apart.tokens_per_s == pytest.approx(1.0 + 3.7)
    independent = decode_speed(TOKEN, machine, two, hit_rate=0.5, misses=(0.25, 0.5, 0.25))
    assert independent == decode_speed(TOKEN, machine, two, hit_rate=0.5)
    assert sum(independent_misses(5, 0.3)) == pytest.approx(1.0)


def test_a_step_pays_for_its_layers_by_the_way_it_is_computed() -> None:
    overheads = Overheads(
        native_layer_s=0.1, python_layer_s=0.2, modules_layer_s=0.4, forward_s=0.3, stalled_layer_s=2.0,
        token_s=0.05,
    )  # fmt: skip
    machine = replace(MACHINE, overheads=overheads)
    for change, expected_s in (
        ({}, 3 * 0.1 + 0.3),
        ({"is_native": False}, 3 * 0.4),
    ):
        shape = replace(SHAPE, num_layers=3, **change)
        speed = decode_speed(TOKEN, machine, shape, hit_rate=1.0)
        assert 1 / speed.tokens_per_s == pytest.approx(1.0 + expected_s + 0.05)
    missing = decode_speed(TOKEN, machine, SHAPE, hit_rate=0.0)
    assert 1 / missing.tokens_per_s == pytest.approx(1.0 + 6.0 + 0.1 + 0.3 + 0.05 + 2.0)


def test_what_is_guessed_is_read_while_the_layer_before_computes() -> None:
    two = replace(SHAPE, num_layers=2, moe_layers=2)
    plain = decode_speed(TOKEN, MACHINE, two, hit_rate=0.5)
    # Half of the layers miss 300 bytes, 3 s each; a token computes 1 s, half of it in a layer.
    assert plain.ahead_gain == 0 and 1 / plain.tokens_per_s == pytest.approx(1.0 + 3.0)
    machine = replace(MACHINE, submit_s=0.0, ahead=ReadAhead(recall=0.5, layer_s=0.0))
    ahead = decode_speed(TOKEN, machine, two, hit_rate=0.5)
    asked = 0.5 * (0.5 + WASTE_TARGET / (1 - WASTE_TARGET))  # a layer
    late_s = 2 * max(0.0, 3 * asked - 0.5)  # no guess advances while a layer waits for what it demanded
    assert 1 / ahead.tokens_per_s == pytest.approx(max(1.0 + 1.5 + late_s, 3.0 / (1 - WASTE_TARGET)))
    assert ahead.ahead_gain == pytest.approx(ahead.tokens_per_s / plain.tokens_per_s - 1)


def test_guesses_whose_reads_would_not_begin_in_time_are_not_asked_for() -> None:
    two = replace(SHAPE, num_layers=2, moe_layers=2, top_k=2)
    stalls = Stalls(TOKEN, replace(MACHINE, submit_s=0.0), two, experts_s=0.0)
    window_s, read_s = 1.0 / 2, 1.5  # of a layer that computes, and of one of its two experts
    asked = window_s / read_s + 1
    found = 0.9 * asked / (2 * (0.9 + WASTE_TARGET / (1 - WASTE_TARGET)))
    late_s = 2 * (asked * read_s - window_s)
    found_s = stalls.ahead_s((0.0, 0.0, 1.0), ReadAhead(0.9, 0.0), ram_s=1.0, disk_s=0.0)
    assert found_s == pytest.approx(1.0 + 2 * 2 * (1 - found) * read_s + late_s)
    slower = stalls.ahead_s((0.0, 0.0, 1.0), ReadAhead(0.9, 0.0), ram_s=8.0, disk_s=0.0)
    assert slower == pytest.approx(8.0 + 2 * 2 * 0.1 * read_s), "there is time for all of them"


def test_reading_ahead_gains_no_more_than_runs_showed() -> None:
    """What it costs where they ran, arithmetic not knowing why, it costs where less is missed, too."""
    shape = replace(SHAPE, num_layers=2, moe_layers=2)
    seen = ReadAhead(recall=0.5, layer_s=0.0, seen=SeenGain(speedup=1.1, hit_rate=0.5))
    unseen = replace(MACHINE, submit_s=0.0, ahead=replace(seen, seen=None))
    machine = replace(unseen, ahead=seen)

    def gain(machine: MachineSpeed, hit_rate: float) -> float:
        return decode_speed(TOKEN, machine, shape, hit_rate=hit_rate).ahead_gain

    assert gain(unseen, 0.5) > 0.15 and gain(machine, 0.5) == pytest.approx(0.1)
    assert gain(machine, 0.75) == pytest.approx(0.1) and gain(unseen, 0.75) > 0.4
    assert gain(machine, 0.95) == 0.0 < gain(unseen, 0.95)
    modest = replace(machine, ahead=replace(seen, seen=SeenGain(speedup=9.0, hit_rate=0.5)))
    assert gain(modest, 0.5) == pytest.approx(gain(unseen, 0.5)), "luck promises nothing"
    slower = replace(machine, ahead=replace(seen, seen=SeenGain(speedup=0.9, hit_rate=0.5)))
    assert gain(slower, 0.5) == 0.0


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 2), st.floats(0, 2))
def test_reading_ahead_never_makes_a_plan_slower_and_its_costs_count(
    hit_rate: float, recall: float, submit_s: float, layer_s: float
) -> None:
    machine = replace(MACHINE, submit_s=submit_s, ahead=ReadAhead(recall, layer_s))
    shape = replace(SHAPE, num_layers=3, moe_layers=3, top_k=2)
    plain = decode_speed(TOKEN, replace(machine, ahead=None), shape, hit_rate=hit_rate)
    ahead = decode_speed(TOKEN, machine, shape, hit_rate=hit_rate)
    assert ahead.tokens_per_s >= plain.tokens_per_s * (1 - 1e-9)
    dearer = replace(machine, submit_s=submit_s + 0.1, ahead=ReadAhead(recall, layer_s + 0.1))
    slower = decode_speed(TOKEN, dearer, shape, hit_rate=hit_rate)
    assert slower.tokens_per_s <= ahead.tokens_per_s * (1 + 1e-9)
    assert sum(thinned(independent_misses(4, hit_rate), recall)) == pytest.approx(1.0)


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 9),
    st.floats(1, 1e4),
    st.floats(1, 1e4),
    st.floats(0, 10),
)
def test_more_hits_are_never_slower_and_no_wall_is_passed(
    hit_rate: float, more: float, top_k: int, ram: float, disk: float, overhead: float
) -> None:
    overheads = Overheads(native_layer_s=overhead, stalled_layer_s=overhead)
    machine = MachineSpeed(ram, disk, disk_latency_s=overhead, overheads=overheads)
    shape = replace(SHAPE, top_k=top_k)
    speed = decode_speed(TOKEN, machine, shape, hit_rate=hit_rate)
    assert 1 / speed.tokens_per_s >= max(speed.walls_s.values()) * (1 - 1e-9)
    better = decode_speed(TOKEN, machine, shape, hit_rate=max(hit_rate, more))
    assert better.tokens_per_s >= speed.tokens_per_s * (1 - 1e-9)


@pytest.mark.parametrize("name", sorted(CURVES))
def test_hit_curves_rise_from_nothing_to_everything(name: str) -> None:
    curve = CURVES[name]
    assert curve[0] == (0.0, 0.0) and curve[-1] == (1.0, 1.0)
    assert list(curve) == sorted(curve) and [y for _, y in curve] == sorted(y for _, y in curve)


def test_a_curve_is_straight_between_its_points_and_flat_beyond() -> None:
    curve = ((0.0, 0.0), (0.5, 0.8), (1.0, 1.0))
    assert [interpolate(curve, x) for x in (-1, 0, 0.25, 0.5, 0.75, 1, 2)] == pytest.approx(
        [0, 0, 0.4, 0.8, 0.9, 1, 1]
    )
    assert expected_hit_rate("gpt_oss", 0.25) == (0.701, "gpt_oss")
    assert expected_hit_rate("qwen3_moe", 1.0) == (1.0, "default")


def test_the_input_embedding_is_not_read_unless_it_is_the_head() -> None:
    checkpoint = open_checkpoint(DEMO_MODEL)
    embedding = checkpoint.dense["model.embed_tokens.weight"]
    is_tied = "lm_head.weight" not in checkpoint.dense
    apart = 0 if is_tied else embedding.span.num_bytes
    assert dense_read_bytes(checkpoint) == checkpoint.dense_bytes - apart
    assert 0 < head_bytes(checkpoint) < checkpoint.dense_bytes
    names = [name for name in checkpoint.dense if "embed" not in name and "lm_head" not in name]
    assert prompt_weights(checkpoint) == sum(checkpoint.dense[name].num_elements for name in names)


def planner(**kwargs: Any) -> Planner:
    config = RuntimeConfig(context_tokens=1024)
    return Planner(open_checkpoint(DEMO_MODEL), MachineSpeed(20e9, 1e9, 1e11), config, **kwargs)


def test_what_does_not_fit_says_why_and_what_would() -> None:
    plan = planner()
    refused = plan.outlook(plan.smallest_ram_bytes - 1)
    assert not refused.fits and refused.decode is None and str(plan.smallest_ram_bytes) in refused.reason
    assert plan.outlook(plan.smallest_ram_bytes).fits


def test_more_memory_is_never_slower_and_all_of_it_hits() -> None:
    plan = planner()
    budgets = range(plan.smallest_ram_bytes, plan.whole_ram_bytes + MIB, MIB)
    rates = [outlook.decode.tokens_per_s for b in budgets if (outlook := plan.outlook(b)).decode]
    assert rates == sorted(rates) and len(rates) == len(budgets)
    assert plan.outlook(plan.whole_ram_bytes).hit_rate == 1.0


def test_what_would_change_it_gains_at_least_five_percent_each() -> None:
    plan = planner()
    now = plan.outlook(plan.smallest_ram_bytes)
    changes = plan.changes(now)
    assert changes and now.decode
    rates = [now.decode.tokens_per_s, *(change.decode.tokens_per_s for change in changes if change.decode)]
    assert all(later >= 1.05 * earlier for earlier, later in itertools.pairwise(rates))


def test_plan_for_another_machine(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(DEMO_MODEL)
    assert cli.main(["plan", "--model", model, "--model", model, "--profile", "cpu-laptop-16gb"]) == 0
    shown = capsys.readouterr().out
    assert "38.4 GB/s" in shown  # three quarters of the data sheet's 51.2
    assert "binds" in shown and "fastest first" in shown and "not known" not in shown
    laptop = profile_speed(load_profile("cpu-laptop-16gb"))
    assert laptop.macs_per_s == pytest.approx(0.75 * 4 * 2 * 32 * 1.7e9, rel=1e-3)  # of a data sheet's peak


def tuned_profile(disk_bytes_per_s: float) -> Any:
    """What tune would have kept for this machine."""
    profile = profile_store.quick_profile(MachineSpeed(20e9, disk_bytes_per_s, 1e11), num_threads=2)
    notes = {**profile.notes, "evidence": {"tokens": 64}, "settings": {"policy": "lru"}}
    return replace(profile, notes=notes)


def test_plan_takes_what_this_machine_was_tuned_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = checkpoint_key(open_checkpoint(DEMO_MODEL))
    for checkpoint, disk, kind in ((None, 3e9, "tuned on this machine"), (key, 5e9, "tuned for this model")):
        profile_store.keep(tuned_profile(disk), checkpoint)
        assert cli.main(["plan", "--json"]) == 0
        (model,) = json.loads(capsys.readouterr().out)["models"]
        assert model["machine"]["disk_bytes_per_s"] == disk
        assert kind in model["profile"] and "policy lru" in model["profile"]
    assert cli.main(["plan"]) == 0
    assert "profile tuned for this model" in capsys.readouterr().out


def test_plan_as_json_measures_a_machine_that_was_not_tuned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("moe_offload.measure_experts.READ_S", 0.01)  # enough to be sane, not to be true
    for module in ("runtime.yardstick", "measure_steps"):
        monkeypatch.setattr(f"moe_offload.{module}.PASSES", 1)
    assert cli.main(["plan", "--json"]) == 0  # what the first load saw is no reason not to look again
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["profile"] is None and model["machine"]["prompt"]["read_s"] > 0
    assert model["fits"] and model["machine"]["disk_bytes_per_s"] > 0
    overheads = model["machine"]["overheads"]
    assert overheads["modules_layer_s"] > overheads["native_layer_s"]  # a hundred operations, one by one
    assert model["decode"]["tokens_per_s"] > 0 and model["prefill"]["binding"] in model["prefill"]["walls_s"]
    assert model["measured_s_ago"] == 0.0

    def measure(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("what was measured lately counts")

    monkeypatch.setattr("moe_offload.cli_plan_machine._measured_overheads", measure)
    monkeypatch.setattr("moe_offload.cli_plan_machine._measured_steps", measure)
    assert cli.main(["plan", "--json"]) == 0
    (again,) = json.loads(capsys.readouterr().out)["models"]
    assert again["machine"] == model["machine"] and 0 < again["measured_s_ago"] < 3600
    with pytest.raises(AssertionError, match="lately"):
        cli.main(["plan", "--json", "--profile", "none"])


@pytest.mark.parametrize(
    ("arguments", "named"), [(["--context", "4096"], "1024 positions"), (["--ram", "much"], "much")]
)
def test_what_cannot_be_is_refused_before_the_machine_is_measured(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*args: Any) -> None:
        raise AssertionError("for nothing")

    monkeypatch.setattr("moe_offload.cli_plan.find_source", measure)
    assert cli.main(["plan", *arguments]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("spoil", ["old", "other version", "negative", "no number", "no json"])
def test_what_was_kept_counts_while_it_is_young_and_whole(
    spoil: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prompt = PromptSpeed(
        ((1.0, 2e9), (64.0, 3e9)), ((1.0, 1e-4),), 2e-4, ((16.0, 1e-5),), ((16.0, -1e-5),), 1e-9, 0.5
    )
    machine = replace(MACHINE, submit_s=1e-5, expert_bytes_per_s=2000.0, prompt=prompt)
    rehearsals.keep("model", machine)
    kept = rehearsals.kept_steps("model")
    assert kept is not None and kept.machine == machine and kept.age_s < 3600
    assert rehearsals.kept_steps("other") is None and rehearsals.kept_overheads() is None
    overheads = Overheads(native_layer_s=1e-5)
    rehearsals.keep(rehearsals.PROGRAM, overheads)
    assert rehearsals.kept_overheads() == overheads
    (path,) = tmp_path.rglob(f"*-{rehearsals.PROGRAM}.json")
    kept = json.loads(path.read_text())
    (entry,) = kept["rehearsals"]
    if spoil == "old":
        entry["taken"] -= rehearsals.OVERHEADS_S
    elif spoil == "other version":
        kept["version"] += "x"
    elif spoil in ("negative", "no number"):
        entry["values"]["token_s"] = -1.0 if spoil == "negative" else "soon"
    path.write_text("{" if spoil == "no json" else json.dumps(kept))
    assert rehearsals.kept_overheads() is None


def test_of_a_days_rehearsals_the_median_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for number, (disk, layer_s) in enumerate([(9.0, 1.0), (1.0, 1.0), (2.0, 5.0), (4.0, 4.0)]):
        prompt = PromptSpeed(((1.0, disk),), ((1.0, 1e-4), (9.0, disk)), 2e-4, ((16.0, -disk),))
        rehearsals.keep("model", replace(MACHINE, disk_bytes_per_s=disk, prompt=prompt))
        rehearsals.keep(rehearsals.PROGRAM, Overheads(native_layer_s=layer_s))
        if number == 0:  # a day passes
            path = next(tmp_path.rglob("*-model.json"))
            path.write_text(re.sub(r'"taken": \d+', '"taken": 1', path.read_text()))
    kept, overheads = rehearsals.kept_steps("model"), rehearsals.kept_overheads()
    assert kept is not None and kept.machine.disk_bytes_per_s == 2.0, "of 1, 2 and 4"
    assert kept.machine.prompt is not None and kept.machine.prompt.expert_s == ((1.0, 1e-4), (9.0, 2.0))
    assert overheads is not None and overheads.native_layer_s == 2.5
    rehearsals.keep("model", MACHINE, afresh=True)
    kept = rehearsals.kept_steps("model")
    assert kept is not None and kept.machine == MACHINE, "what was before is forgotten"


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "plan.png"
    for profile in (["cpu-laptop-16gb"], ["rtx-4060-laptop", "--vram", "6GiB"]):
        assert cli.main(["plan", "--profile", *profile, "--plot", str(target)]) == 0
        assert target.read_bytes().startswith(b"\x89PNG")
    refused = ["--profile", "cpu-laptop-16gb", "--ram", "1MiB", "--plot", str(target)]
    assert cli.main(["plan", *refused]) == 0


def test_the_picture_has_every_wall_that_applies() -> None:
    device = DeviceSpeed(bytes_per_s=6000.0, link_bytes_per_s=500.0)
    overheads = Overheads(native_layer_s=0.01)
    machine = replace(MACHINE, device=device, overheads=overheads)
    alone = [decode_speed(TOKEN, machine, SHAPE, hit_rate=rate) for rate in (0.5, 1.0)]
    limits = wall_limits(alone)
    assert set(limits) == {"RAM", "disk", "overhead"} and limits["disk"] == [100.0 / 300, float("inf")]
    shared = [decode_speed(TOKEN, machine, SHAPE, hit_rate=1.0, device_rate=0.5)]
    assert {"VRAM", "link"} < set(wall_limits(shared))
    assert "RAM binds" in shared[0].walls() and "link 200 ms" in shared[0].walls()


def test_without_measuring_no_torch_is_imported() -> None:
    code = (
        "import sys; from moe_offload import cli;"
        "cli.main(['plan', '--profile', 'cpu-laptop-16gb', '--json']);"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"


@pytest.mark.parametrize("kv", [None, "q8_0"])
@pytest.mark.parametrize("context", [16, 1000])
def test_plan_and_loader_agree_on_every_budget(kv: str | None, context: int, monkeypatch: Any) -> None:
    """The same verdict, the same slots, the same refusal: bytes around the least, and some above it."""
    libraries = 300 * MIB
    monkeypatch.setattr(runtime, "base_bytes", lambda: libraries)
    monkeypatch.setattr(runtime, "tokenizer_was_loaded", lambda path: False)
    process = Process(base_bytes=libraries, bytes_per_element=4, stores_scores=False)
    config = RuntimeConfig(context_tokens=context, kv=kv)
    plan = Planner(open_checkpoint(DEMO_MODEL), MachineSpeed(20e9, 1e9, 1e11), config, process=process)
    least = plan.smallest_ram_bytes
    verdicts = []
    for ram_bytes in (MIB, least - 1, least, least + MIB, least + 9 * MIB, plan.whole_ram_bytes, GIB):
        outlook = plan.outlook(ram_bytes)
        verdicts.append(outlook.fits)
        try:
            model = moe_offload.from_pretrained(DEMO_MODEL, ram=ram_bytes, context=context, kv=kv)
        except BudgetError as error:
            assert not outlook.fits and outlook.reason == str(error)
            continue
        try:
            assert outlook.placement == model.offload.plan
        finally:
            model.offload.close()
    assert verdicts == [False, False, True, True, True, True, True]


def test_what_the_runtime_refuses_by_name_the_plan_refuses_too(tmp_path: Path) -> None:
    folder = save_toy_model("mixtral", tmp_path)  # head_dim 16
    config = RuntimeConfig(kv="q8_0")
    with pytest.raises(ConfigError, match="head_dim=16"):
        Planner(open_checkpoint(folder), MACHINE, config).outlook(GIB)
    assert cli.main(["plan", "--model", str(folder), "--kv", "q8_0", "--profile", "cpu-laptop-16gb"]) == 2


def recorded_trace(num_experts: int = 32, layers: int = 12) -> Any:
    """A token's experts are those of one of four topics, which last 40 tokens each."""
    chooser = np.random.default_rng(3)
    topics = chooser.permuted(np.tile(np.arange(num_experts), (4, layers, 1)), axis=2)[:, :, :8]
    chosen = [
        [chooser.choice(topics[token // 40 % 4, layer], 4, replace=False) for layer in range(layers)]
        for token in range(400)
    ]
    return make_trace(np.array(chosen, np.uint8), num_experts=num_experts)


def test_a_trace_is_replayed_at_the_plans_slots() -> None:
    trace = recorded_trace()
    plan = planner(trace=trace)
    plain = planner()
    ram_bytes = plan.smallest_ram_bytes + 8 * MIB
    outlook = plan.outlook(ram_bytes)
    assert outlook.placement is not None and "400 tokens of a trace" in outlook.hit_source
    first, later = replayed_hits(plan.checkpoint, outlook.placement.pools, trace, "horizon")
    assert outlook.hit_rate == later.rate and 0 < first.rate < 1
    assert later.misses is not None and sum(later.misses) == pytest.approx(1.0)
    missed = sum(misses * share for misses, share in enumerate(later.misses))
    assert 1 - missed / trace.top_k == pytest.approx(later.rate)
    assert outlook.hit_rate != plain.outlook(ram_bytes).hit_rate
    assert plan.outlook(plan.whole_ram_bytes).hit_rate == 1.0
    with pytest.raises(CheckpointError, match="32 experts in each of 3 layers"):
        planner(trace=recorded_trace(layers=3))


def test_walls_that_move_away_are_never_slower() -> None:
    plan = planner()
    now = plan.outlook(plan.smallest_ram_bytes)
    assert now.decode
    relieved = plan.relieved(now)
    assert relieved["disk bandwidth"] > 1.3 * now.decode.tokens_per_s
    assert relieved["RAM bandwidth"] >= now.decode.tokens_per_s


def test_a_devices_experts_run_beside_the_others() -> None:
    device = DeviceSpeed(bytes_per_s=6000.0, link_bytes_per_s=500.0, step_s=0.01)
    machine = replace(MACHINE, device=device)
    half = decode_speed(TOKEN, machine, SHAPE, hit_rate=1.0, device_rate=0.5)
    # 300 bytes take 0.05 s there; the CPU and the link share the other 300 at 1500 bytes/s.
    assert 1 / half.tokens_per_s == pytest.approx(0.4 + 0.2 + 0.01)
    assert half.walls_s["VRAM"] == pytest.approx(0.05) and half.walls_s["link"] == pytest.approx(0.2)
    whole = decode_speed(TOKEN, machine, SHAPE, hit_rate=1.0, device_rate=1.0)
    assert 1 / whole.tokens_per_s == pytest.approx(0.4 + 0.1 + 0.01)
    assert decode_speed(TOKEN, machine, SHAPE, hit_rate=1.0).tokens_per_s == pytest.approx(1.0)


def test_dense_layers_on_a_device_are_read_there() -> None:
    device = DeviceSpeed(bytes_per_s=10 * MACHINE.ram_bytes_per_s, link_bytes_per_s=1e9)
    machine = replace(MACHINE, device=device)
    half = DensePlan(2, 1, False, TOKEN.dense_bytes // 2, 0, 0, 64)
    alone = decode_speed(TOKEN, machine, SHAPE, hit_rate=1.0)
    shared = decode_speed(TOKEN, machine, SHAPE, hit_rate=1.0, device_dense=half)
    saved_s = 0.9 * (TOKEN.dense_bytes + TOKEN.kv_bytes) / 2 / MACHINE.ram_bytes_per_s
    assert 1 / shared.tokens_per_s == pytest.approx(1 / alone.tokens_per_s - saved_s)
    empty = DensePlan(2, 2, False, 0, 0, 0, 64, "dense=off")
    assert decode_speed(TOKEN, machine, SHAPE, hit_rate=1.0, device_dense=empty) == alone


def test_vram_is_planned_by_the_runtimes_function(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = DeviceSpeed(bytes_per_s=200e9, link_bytes_per_s=12e9)
    config = RuntimeConfig(context_tokens=64)
    machine = MachineSpeed(20e9, 1e9, 1e11, device=device)
    checkpoint = open_checkpoint(DEMO_MODEL)
    ram_bytes = Planner(checkpoint, machine, config).whole_ram_bytes
    few, more = (
        Planner(checkpoint, machine, config, vram_bytes=DRIVER_BYTES + room * MIB).outlook(ram_bytes)
        for room in (24, 28)
    )
    assert few.device and more.device and few.decode and more.decode
    vram_bytes = few.device.vram_bytes
    monkeypatch.setattr(device_setup, "memory_of", lambda choice: (vram_bytes, DRIVER_BYTES))
    asked = replace(config, device=DeviceChoice("cuda", vram_bytes))
    assert few.device == device_setup.plan_vram(checkpoint, asked, element_bytes(checkpoint))
    assert few.device.dense is not None and few.device.dense.has_head and few.device.dense.first_layer == 0
    assert few.device_rate is not None and more.device_rate is not None and few.device_rate < more.device_rate
    assert few.decode.tokens_per_s < more.decode.tokens_per_s
    refused = Planner(checkpoint, machine, config, vram_bytes=MIB).outlook(ram_bytes)
    assert not refused.fits and "vram=1.00 MiB" in refused.reason
    assert cli.main(["plan", "--vram", "6GiB", "--profile", "rtx-4060-laptop"]) == 0
    assert "VRAM" in capsys.readouterr().out
    for wrong in (
        ["--vram", "9GiB", "--profile", "rtx-4060-laptop"],
        ["--vram", "1GiB", "--profile", "cpu-laptop-16gb"],
    ):
        assert cli.main(["plan", *wrong]) == 2


def test_attention_is_bound_by_bytes_or_by_scores() -> None:
    busy = replace(MACHINE, overheads=Overheads(attention_score_s=0.01))
    for scores, expected_s in ((10, 1.0), (100, 1.8)):  # 200 bytes of cache take 0.2 s
        speed = decode_speed(TOKEN, busy, replace(SHAPE, attention_scores=scores), hit_rate=1.0)
        assert 1 / speed.tokens_per_s == pytest.approx(expected_s)
