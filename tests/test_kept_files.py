"""What earlier runs left in the user's cache: where it is of no use, a note says so and nothing fails."""

from __future__ import annotations

import os
import pwd
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_policy_fit import any_fit

import moe_offload
from moe_offload import profile_store
from moe_offload.config import RuntimeConfig
from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.planning.machine_speed import MachineSpeed
from moe_offload.residency.policy_fit import automatic_policy, policy_fit_path
from moe_offload.runtime.machine_profile import with_settings
from moe_offload.runtime.predictor_choice import choose_predictor, fit_path
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.checkpoint_key import cache_folder, is_kept

DAMAGE = {
    "empty": b"",
    "garbage": bytes(range(256)),
    "another npz": b"PK\x05\x06" + bytes(18),  # an archive of nothing
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_fit_that_nobody_asked_for_costs_a_note(tiny_moe, damage, capfd) -> None:
    """A fit of another version, too: it is damaged to those that do not know it."""
    prompt = torch.tensor([[11, 12, 13]])
    arguments: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    load: dict[str, Any] = {"ram": "4GiB", "experts": "50%", "context": 64, "profile": "none"}
    model = moe_offload.from_pretrained(tiny_moe, **load)
    wanted = model.generate(prompt, **arguments)
    model.offload.close()
    checkpoint = open_checkpoint(tiny_moe)
    put(policy_fit_path(checkpoint), DAMAGE[damage])
    put(fit_path(checkpoint), DAMAGE[damage])
    model = moe_offload.from_pretrained(tiny_moe, **load)
    assert torch.equal(model.generate(prompt, **arguments), wanted)
    assert (model.offload.policy, model.offload.predictor) == ("horizon", "cross_layer_gate")
    model.offload.close()
    said = capfd.readouterr().err
    assert said.count("the policy goes without its fit") == 1
    assert said.count("predicting goes without its fit") == 1
    assert str(policy_fit_path(checkpoint)) in said and str(fit_path(checkpoint)) in said


def test_a_damaged_fit_that_was_asked_for_is_an_error(tiny_moe) -> None:
    checkpoint = open_checkpoint(tiny_moe)
    put(fit_path(checkpoint), b"")
    put(policy_fit_path(checkpoint), b"")
    with pytest.raises(CheckpointError, match="damaged"):
        choose_predictor("hybrid", checkpoint)
    with pytest.raises(CheckpointError, match="damaged"):
        moe_offload.from_pretrained(tiny_moe, policy=f"horizon={policy_fit_path(checkpoint)}")


def test_a_fit_that_was_made_again_is_used(tiny_moe) -> None:
    checkpoint = open_checkpoint(tiny_moe)
    path = policy_fit_path(checkpoint)
    put(path, b"")
    assert automatic_policy("auto", checkpoint) == "horizon"
    any_fit(checkpoint).write(path)
    assert automatic_policy("auto", checkpoint) == f"horizon={path}"


def test_a_tuned_predictor_whose_fit_is_gone_gives_way(tiny_moe, capsys) -> None:
    checkpoint = open_checkpoint(tiny_moe)
    assert choose_predictor("learned", checkpoint, insist=False).name == "cross_layer_gate"
    assert "'learned' was tuned and cannot be had" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="there is no fitted predictor"):
        choose_predictor("learned", checkpoint)


def test_a_tuned_policy_that_is_not_known_gives_way_unless_the_profile_was_asked_for(capsys) -> None:
    profile = profile_store.quick_profile(MachineSpeed(20e9, 1e9, 1e11), num_threads=2)
    settings = {"policy": "of_a_later_version", "num_threads": 1}
    profile = replace(profile, notes={**profile.notes, "settings": settings})
    kept = profile_store.ProfileInUse(profile, profile_store.TUNED_MODEL, Path("kept.toml"))
    config = with_settings(RuntimeConfig(), kept, [])
    assert (config.policy, config.num_threads) == (RuntimeConfig().policy, 1)
    assert "of_a_later_version" in capsys.readouterr().err
    given = profile_store.ProfileInUse(profile, profile_store.GIVEN, Path("given.toml"))
    with pytest.raises(ConfigError, match="of_a_later_version"):
        with_settings(RuntimeConfig(), given, [])


def test_a_user_without_a_home_has_a_cache_where_it_can_be_looked_for(monkeypatch) -> None:
    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert cache_folder("warm") == Path("/.cache/moe_offload/warm")
    with pytest.raises(CheckpointError, match="no model of this name"):
        open_checkpoint("org/name-that-nobody-has")


def test_a_cache_that_may_not_be_looked_into_holds_nothing(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"")
    assert is_kept(path)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", refuse)
    assert not is_kept(path)
