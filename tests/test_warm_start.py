"""What a run leaves for the next one: kept whole, read with suspicion, in nobody's way."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulated_disk import FakeArena, SimulatedDisk, make_layouts, make_pool

import moe_offload
from moe_offload.planning.eviction import LruPolicy
from moe_offload.planning.policies.horizon import RATES, HorizonFit, HorizonPolicy
from moe_offload.planning.prefetch_switch import Findings
from moe_offload.residency import warm_start
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.warm_start import WarmState, begin_warm, read_state, state_of, write_state
from moe_offload.stats import OffloadStats
from moe_offload.storage.expert_format import ExpertKey

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2
NUM_EXPERTS_OF = dict.fromkeys(range(NUM_LAYERS), NUM_EXPERTS)


def make_cache(num_slots: int, policy=LruPolicy) -> tuple[ExpertCache, SimulatedDisk, OffloadStats]:
    layouts = make_layouts(NUM_LAYERS, NUM_EXPERTS)
    disk, stats = SimulatedDisk(layouts), OffloadStats()
    pools = [make_pool(layouts, num_slots, TOP_K)]
    return ExpertCache(pools, layouts, disk, FakeArena(), policy, stats, top_k=TOP_K), disk, stats


def run_step(cache: ExpertCache, layer_idx: int, expert_ids: list[int]) -> int:
    """Run a step; return how many of its experts were there."""
    step = cache.begin(layer_idx, expert_ids)
    assert step is not None
    ready = len(step.ready)
    for expert_id in step.pending:
        cache.wait(step, expert_id)
    cache.end(step)
    return ready


def used_cache(policy=HorizonPolicy) -> ExpertCache:
    cache, _, _ = make_cache(10, policy)
    for _ in range(5):
        for layer_idx in range(NUM_LAYERS):
            run_step(cache, layer_idx, [layer_idx, 5])
    run_step(cache, 0, [7])
    return cache


def test_a_state_comes_back_as_it_was(tmp_path) -> None:
    state = state_of(used_cache(), "horizon")
    write_state(tmp_path / "deep" / "m.npz", "m", state)
    back = read_state(tmp_path / "deep" / "m.npz", "m", NUM_EXPERTS_OF)
    assert back is not None and back.policy == "horizon"
    assert all(np.array_equal(back.heat[i], state.heat[i]) for i in range(NUM_LAYERS))
    assert np.array_equal(back.policy_states[0]["parts"], state.policy_states[0]["parts"])
    assert back.hottest()[-1] == ExpertKey(0, 7) and len(back.hottest()) == 7
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["m.npz"]


def test_a_layer_that_saw_fewer_tokens_is_no_colder_for_it() -> None:
    state = WarmState({0: np.array([300.0, 100.0]), 1: np.array([1.0, 2.0])}, "lru")
    assert state.hottest() == [ExpertKey(0, 0), ExpertKey(1, 1), ExpertKey(1, 0), ExpertKey(0, 1)]


def test_the_next_run_finds_the_hottest_resident_and_its_policy_informed(tmp_path) -> None:
    state = state_of(used_cache(), "horizon")
    cache, disk, stats = make_cache(10, HorizonPolicy)
    begin_warm(cache, state, "horizon")
    assert disk.submitted == state.hottest()[:6]  # ten slots, four of them staging
    assert all(read.speculative for read in disk.reads.values())
    while cache.is_warming:
        disk.advance()
        cache.absorb()
    assert cache.residents() == sorted(state.hottest()[:6])
    assert stats.warm_bytes == 6 * cache.expert_bytes(0) and stats.prefetch_wasted_bytes == 0
    assert cache.policy_states()[0]["parts"].any()
    assert run_step(cache, 1, [1, 5]) == 2
    cache.check()


def test_waiting_for_all_reads_does_not_lose_the_start() -> None:
    state = state_of(used_cache(), "horizon")
    cache, _, stats = make_cache(10, HorizonPolicy)
    begin_warm(cache, state, "horizon")
    cache.finish_reads()
    cache.absorb()
    assert cache.residents() == sorted(state.hottest()[:6]) and not cache.is_warming
    assert stats.warm_bytes == 6 * cache.expert_bytes(0)
    cache.check()


def test_scores_of_another_policy_are_left_alone_but_heat_counts() -> None:
    state = state_of(used_cache(), "horizon")
    cache, disk, _ = make_cache(10, HorizonPolicy)
    begin_warm(cache, state, "horizon=fit.npz")
    assert disk.submitted and not cache.policy_states()[0]["parts"].any()


@given(st.integers(0, 2**32), st.integers(TOP_K, NUM_LAYERS * NUM_EXPERTS))
def test_steps_and_prompts_take_what_they_need_while_the_start_is_being_read(
    seed: int, num_slots: int
) -> None:
    """Any interleaving: nothing waits for ever, no slot is lost or shared, residents stay within capacity."""
    generator = np.random.default_rng(seed)
    cache, disk, _ = make_cache(num_slots)
    heat = {i: generator.random(NUM_EXPERTS) for i in range(NUM_LAYERS)}
    begin_warm(cache, WarmState(heat, "lru"), "lru")
    for _ in range(12):
        layer_idx = int(generator.integers(NUM_LAYERS))
        ids = sorted(generator.choice(NUM_EXPERTS, int(generator.integers(1, 7)), replace=False).tolist())
        kind = generator.integers(4)
        if kind == 0:
            for expert_id, addresses in cache.stream(layer_idx, ids):
                assert disk.contents[addresses[0]] == ExpertKey(layer_idx, expert_id)
        elif kind == 1:
            cache.prefetch([ExpertKey(layer_idx, i) for i in ids])
        elif kind == 2:
            disk.advance()
            cache.absorb()
        else:
            step = cache.begin(layer_idx, ids[:TOP_K])
            assert step is not None
            for expert_id in ids[:TOP_K]:
                if expert_id in step.pending:
                    cache.wait(step, expert_id)
                address = cache.addresses(layer_idx, expert_id)[0]
                assert disk.contents[address] == ExpertKey(layer_idx, expert_id)
            cache.end(step)
        cache.check()
    cache.close()


def test_what_was_found_of_prefetching_comes_back(tmp_path) -> None:
    found = "25% of the experts, hybrid", Findings(pays=False, gain=-0.07)
    write_state(tmp_path / "m.npz", "m", state_of(used_cache(), "horizon", found))
    back = read_state(tmp_path / "m.npz", "m", NUM_EXPERTS_OF)
    assert back is not None and back.prefetching == found
    write_state(tmp_path / "m.npz", "m", state_of(used_cache(), "horizon"))
    back = read_state(tmp_path / "m.npz", "m", NUM_EXPERTS_OF)
    assert back is not None and back.prefetching is None


def with_findings(path, gain: float) -> None:
    write_state(
        path, "m", state_of(used_cache(), "horizon", ("25% of the experts, hybrid", Findings(True, gain)))
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 no archive"),
        lambda path: path.write_bytes(b"neither archive nor pickle"),
        lambda path: write_state(path, "other", state_of(used_cache(), "horizon")),
        lambda path: np.savez(path, notes=np.str_("{}")),
        lambda path: write_state(path, "m", WarmState({0: np.ones(3)}, "lru")),
        lambda path: with_findings(path, float("nan")),
    ],
)
def test_a_damaged_or_foreign_file_is_one_line_and_a_cold_start(tmp_path, capsys, damage) -> None:
    path = tmp_path / "m.npz"
    write_state(path, "m", state_of(used_cache(), "horizon"))
    damage(path)
    assert read_state(path, "m", NUM_EXPERTS_OF) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pickle" not in said


def test_no_file_is_no_news(tmp_path, capsys) -> None:
    assert read_state(tmp_path / "none.npz", "m", NUM_EXPERTS_OF) is None
    assert capsys.readouterr().err == ""


def test_a_policys_state_that_contradicts_itself_leaves_a_new_policy(capsys) -> None:
    cache, _, _ = make_cache(10, HorizonPolicy)
    broken = {"layers": np.array([0]), "parts": np.zeros((2, 5, 8), np.float32)}
    begin_warm(cache, WarmState({}, "horizon", (broken,)), "horizon")
    assert "starts anew" in capsys.readouterr().err
    run_step(cache, 0, [1])


def write_horizon_fit(path, num_layers: int, written_at: int) -> None:
    shape = (num_layers, NUM_EXPERTS, len(RATES), NUM_EXPERTS)
    before = np.ones((num_layers, 1, NUM_EXPERTS, NUM_EXPERTS), np.float32)
    constant = np.zeros((num_layers, NUM_EXPERTS), np.float32)
    HorizonFit(tuple(range(num_layers)), np.ones(shape, np.float32), before, constant, ()).write(path)
    os.utime(path, ns=(written_at, written_at))


@pytest.mark.parametrize("num_layers", [NUM_LAYERS, NUM_LAYERS - 1])
def test_scores_under_a_fit_that_was_made_anew_say_nothing_and_nothing_is_said(
    tmp_path, capsys, num_layers
) -> None:
    """The policy's name is the same: what differs is the file, and perhaps its layers."""
    path = tmp_path / "fit.npz"
    name = f"horizon={path}"
    write_horizon_fit(path, NUM_LAYERS, 10**9)
    state = state_of(used_cache(lambda: HorizonPolicy(str(path))), name)
    write_state(tmp_path / "m.npz", "m", state)
    kept = read_state(tmp_path / "m.npz", "m", NUM_EXPERTS_OF)
    assert kept is not None
    again, _, _ = make_cache(10, lambda: HorizonPolicy(str(path)))
    begin_warm(again, kept, name)
    assert again.policy_states()[0]["parts"].any()
    write_horizon_fit(path, num_layers, 2 * 10**9)
    since, disk, _ = make_cache(10, lambda: HorizonPolicy(str(path)))
    begin_warm(since, kept, name)
    assert disk.submitted and not since.policy_states()[0]["parts"].any()
    assert capsys.readouterr().err == ""


def test_the_folder_stays_small(tmp_path, monkeypatch) -> None:
    state = state_of(used_cache(), "horizon")
    write_state(tmp_path / "a.npz", "a", state)
    size = (tmp_path / "a.npz").stat().st_size
    os.utime(tmp_path / "a.npz", (999, 999))
    monkeypatch.setattr(warm_start, "MOST_FOLDER_BYTES", int(2.5 * size))
    for age, name in enumerate(("b", "c", "d")):
        write_state(tmp_path / f"{name}.npz", name, state)
        os.utime(tmp_path / f"{name}.npz", (1000 + age, 1000 + age))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.npz", "d.npz"]


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    write_state(tmp_path / "file" / "m.npz", "m", WarmState({0: np.ones(8)}, "lru"))
    assert "is not kept" in capsys.readouterr().err


def test_a_second_run_of_a_model_starts_warm_and_says_the_same(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(warm_start, "enabled", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prompt = moe_offload.load_tokenizer(None)("The old bridge over the", return_tensors="pt")
    runs = []
    for warm in (True, True, False):
        model = moe_offload.from_pretrained(experts="25%", ram="8GiB", context=64, warm_start=warm)
        tokens = model.generate(**prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        runs.append((tokens, model.offload.stats().warm_bytes, model.offload.started_warm))
        model.offload.close()
    assert all(torch.equal(tokens, runs[0][0]) for tokens, _, _ in runs)
    assert [started for _, _, started in runs] == [False, True, False]
    assert runs[1][1] > 0 and runs[0][1] == runs[2][1] == 0
    assert len(list(tmp_path.rglob("*.npz"))) == 1


@pytest.mark.parametrize(
    ("experts", "warm", "begins_on"), [("25%", True, False), ("50%", True, True), ("25%", False, True)]
)
def test_whether_prefetching_pays_is_known_from_the_start_under_the_same_setting(
    tmp_path, monkeypatch, experts: str, warm: bool, begins_on: bool
) -> None:
    monkeypatch.setattr(warm_start, "enabled", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prompt = moe_offload.load_tokenizer(None)("The old bridge over the", return_tensors="pt")
    model = moe_offload.from_pretrained(experts="25%", ram="8GiB", context=64)
    model.generate(**prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    model.offload.prefetcher.switch.begin_with(Findings(pays=False, gain=-0.3))
    model.offload.close()
    model = moe_offload.from_pretrained(experts=experts, ram="8GiB", context=64, warm_start=warm)
    switch = model.offload.prefetcher.switch
    assert switch.is_on is begins_on
    assert switch.findings == (None if begins_on else (False, -0.3))
    model.offload.close()
