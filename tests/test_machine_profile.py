"""Which profile a load finds, that it says so, and that what the caller gives always wins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_offload
from moe_offload import ops, profile_store, tune_profile
from moe_offload.config import MIB, DeviceChoice, RuntimeConfig
from moe_offload.errors import ConfigError
from moe_offload.planning.correction import RunningCorrection
from moe_offload.planning.machine_speed import MachineSpeed
from moe_offload.planning.plans import PlacementPlan
from moe_offload.profile_schema import DeviceProfile
from moe_offload.profile_write import write_profile
from moe_offload.runtime import machine_profile
from moe_offload.runtime.machine_profile import find_profile, measure_once, with_settings
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.checkpoint_key import checkpoint_key

SPEED = MachineSpeed(ram_bytes_per_s=8e9, disk_bytes_per_s=2e9, macs_per_s=5e10)
TUNED = {"policy": "lru", "predictor": "previous_token", "prefetch": True, "prefetch_depth": 1}
PROMPT = torch.arange(20)[None]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of its own, with nothing in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "moe_offload" / "profiles"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes that each look at the machine would have taken; nothing is measured."""
    taken: list[int] = []

    def look(checkpoint: Any, weights_bytes: int) -> MachineSpeed:
        taken.append(weights_bytes)
        return SPEED

    monkeypatch.setattr(machine_profile, "measure_machine", look)
    yield taken


def test_what_was_tuned_with_a_device_needs_one_and_yields_to_what_is_given() -> None:
    profile = tuned({**TUNED, "scheduler": "static_split", "vram_slots": 5})
    found = profile_store.ProfileInUse(profile, profile_store.GIVEN, None)
    assert with_settings(RuntimeConfig(), found, []) == RuntimeConfig()
    config = RuntimeConfig(device=DeviceChoice("emulated", 2**23), scheduler="fiddler")
    assert with_settings(config, found, []).scheduler == "static_split"
    assert with_settings(config, found, ["scheduler"]).scheduler == "fiddler"
    assert with_settings(config, found, ["predictor"]).scheduler == "static_split"


def tuned(settings: dict[str, Any] = TUNED) -> DeviceProfile:
    quick = profile_store.quick_profile(SPEED, num_threads=2)
    notes = {**quick.notes, "settings": settings, "evidence": {"verdict": "faster", "pairs": 3}}
    return dataclasses.replace(quick, notes=notes)


@pytest.fixture
def load(tiny_moe: Path) -> Iterator[Callable[..., Any]]:
    models = []

    def load(**kwargs: Any) -> Any:
        models.append(moe_offload.from_pretrained(tiny_moe, ram="4GiB", **kwargs))
        return models[-1]

    yield load
    for model in models:
        model.offload.close()


def test_the_first_load_looks_at_the_machine_once(
    cache: Path, looks: list[int], load: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first = load()
    said = capsys.readouterr().err
    assert "first load on this machine: weights from RAM at 8.0 GB/s" in said and "moe-offload tune" in said
    assert first.offload.stats().profile == "measured now"
    assert [path.suffix for path in cache.iterdir()] == [".toml"]
    second = load()
    assert len(looks) == 1 and "first load" not in capsys.readouterr().err
    assert second.offload.stats().profile.startswith("measured at an earlier load on 20")
    plan = first.offload.plan
    assert looks[0] <= (plan.total_bytes - plan.base_bytes) // 2, "within the budget of what is not loaded"


def test_a_real_look_measures_all_three(cache: Path, tiny_moe: Path) -> None:
    plan = PlacementPlan(64 * MIB, 0, 0, 0, 0, 16, ())
    found = measure_once(open_checkpoint(tiny_moe), plan, lambda line: None)
    assert found.kind == "measured now" and found.path is not None
    for section, name in (
        ("ram", "kernel_bandwidth"),
        ("disk", "read_bandwidth"),
        ("cpu", "int8_throughput"),
    ):
        assert found.profile.value(section, name) > 0


def test_a_profile_of_a_device_leaves_the_plain_one_alone(cache: Path, tiny_moe: Path) -> None:
    checkpoint = open_checkpoint(tiny_moe)
    fast, slow = (DeviceChoice("emulated", 2**23, link_bytes_per_s=speed) for speed in (12e9, 3e9))
    plain = tuned({"policy": "ewma"})
    shared = tuned({"policy": "lfu", "scheduler": "fiddler"})
    shared = dataclasses.replace(shared, notes={**shared.notes, "machine": device_note(fast)})
    tune_profile.keep(plain, checkpoint_key(checkpoint))
    tune_profile.keep(shared, checkpoint_key(checkpoint))
    assert len(list(cache.iterdir())) == 4, "of the machine and of the model, with and without"

    def policy(device: DeviceChoice | None) -> str:
        found = find_profile("auto", checkpoint, device)
        assert found is not None and found.kind == profile_store.TUNED_MODEL
        assert ("with emulated" in found.describe()) is (device == fast)
        return with_settings(RuntimeConfig(device=device), found, []).policy

    assert policy(None) == "ewma" and policy(fast) == "lfu"
    assert policy(slow) == RuntimeConfig().policy, "figures of the CPU, settings of none"


def device_note(device: DeviceChoice) -> dict[str, str]:
    return {"key": profile_store.machine_key(), "device": device.key}


def test_the_models_own_profile_goes_before_the_machines(
    cache: Path, load: Callable[..., Any], tiny_moe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = open_checkpoint(tiny_moe)
    profile_store.keep(tuned({"policy": "ewma"}), None)
    found = find_profile("auto", checkpoint)
    assert found is not None and found.describe().startswith("tuned on this machine on 20")
    profile_store.keep(tuned(), checkpoint_key(checkpoint))
    model = load()
    assert model.offload.policy == "lru"
    assert type(model.offload.prefetcher._predictor).__name__ == "PreviousToken"
    assert "profile: tuned for this model" in capsys.readouterr().err
    account = model.offload.account()
    assert account["profile"].endswith(
        "(policy lru, predictor previous_token, prefetch True, prefetch_depth 1)"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("lru", "previous_token", True, 1)),
        ({"policy": "ewma"}, ("ewma", "previous_token", True, 1)),
        ({"predictor": "cross_layer_gate"}, ("lru", "cross_layer_gate", True, None)),
        ({"prefetch": False}, ("lru", "auto", False, None)),
    ],
)
def test_what_is_given_wins(cache: Path, given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = profile_store.ProfileInUse(tuned(), "tuned for this model", None)
    config = with_settings(RuntimeConfig(**given), found, list(given))
    assert (config.policy, config.predictor, config.prefetch, config.prefetch_depth) == expected


def test_threads_that_are_given_win(cache: Path) -> None:
    found = profile_store.ProfileInUse(tuned({"num_threads": 1}), "tuned for this model", None)
    assert with_settings(RuntimeConfig(), found, []).num_threads == 1
    assert with_settings(RuntimeConfig(num_threads=2), found, ["num_threads"]).num_threads == 2


def test_settings_change_no_token(cache: Path, load: Callable[..., Any], tiny_moe: Path) -> None:
    plain = load(profile="none", experts=6).generate(PROMPT, max_new_tokens=8, do_sample=False)
    threads = ops.num_threads()
    settings = {**TUNED, "num_threads": 1}
    profile_store.keep(tuned(settings), checkpoint_key(open_checkpoint(tiny_moe)))
    try:
        model = load(experts=6)
        assert ops.num_threads() == 1
        assert model.generate(PROMPT, max_new_tokens=8, do_sample=False).tolist() == plain.tolist()
    finally:
        ops.set_num_threads(threads)


def test_what_is_measured_while_running_corrects_what_was_expected(
    cache: Path, load: Callable[..., Any]
) -> None:
    profile_store.keep(profile_store.quick_profile(SPEED, 2), None)
    model = load(experts=6)
    before = model.offload.account()["speeds"]
    assert before["disk_bytes_per_s"] == {"expected": 2e9, "estimate": 2e9, "measurements": 0}
    model.offload.prefetcher.switch = None  # predicting in every step
    model.generate(PROMPT, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    after = model.offload.account()["speeds"]
    assert (
        after["layer_s"]["measurements"] > 0 and after["layer_s"]["estimate"] != before["layer_s"]["estimate"]
    )
    assert after["disk_bytes_per_s"]["measurements"] > 0


def test_a_kept_profile_of_no_use_costs_a_line(
    cache: Path, looks: list[int], load: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = profile_store.stored_path()
    path.parent.mkdir(parents=True)
    path.write_text("schema = 99")
    load()
    assert "a kept profile is of no use" in capsys.readouterr().err and len(looks) == 1
    other = tuned()
    notes = {**other.notes, "machine": {"key": "elsewhere", "device": "cpu"}}
    write_profile(path, dataclasses.replace(other, notes=notes))
    load()
    assert "is a profile of another machine" in capsys.readouterr().err and len(looks) == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, looks: list[int], load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load().offload.profile.path is None


def test_profiles_by_name(cache: Path, looks: list[int], load: Callable[..., Any], tiny_moe: Path) -> None:
    assert load(profile="none").offload.profile is None
    assert load(profile="cpu-laptop-16gb").offload.stats().profile == "cpu-laptop-16gb, as asked for"
    with pytest.raises(ConfigError, match="there is no device profile 'nope'"):
        load(profile="nope")
    assert not looks


def test_without_a_profile_nothing_is_expected(tiny_moe: Path) -> None:
    assert (
        machine_profile.expectations(None, open_checkpoint(tiny_moe)).as_dict()
        == RunningCorrection().as_dict()
    )
