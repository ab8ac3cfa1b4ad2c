"""`moe-offload info`: complete, honest about what is missing, and never itself the failure."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from moe_offload import cli, cli_info, ops, profile_store
from moe_offload.config import DEMO_MODEL
from moe_offload.planning.machine_speed import MachineSpeed
from moe_offload.residency import memory
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.checkpoint_key import checkpoint_key


def test_it_names_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cpu"]["isa"] == ops.isa()
    assert report["cpu"]["threads"] == ops.num_threads()
    assert report["memory"]["total_bytes"] == memory.total_bytes()
    assert report["packages"]["torch"] == version("torch")
    assert report["io"]["bundled_model"] in ("direct", "buffered")
    assert report["io"]["into"].startswith(("huge pages", "small pages ("))
    assert report["cuda"]["on"] or report["cuda"]["reason"]


def test_it_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert {"processor", "memory", "CUDA", "packages"} <= {line.split()[0] for line in lines}


def test_buffered_reads_say_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MOE_OFFLOAD_IO", "buffered")
    cli.main(["info"])
    shown = capsys.readouterr().out
    assert "buffered asked for" in shown and "MOE_OFFLOAD_IO=buffered" in shown


def test_a_part_that_fails_is_reported_beside_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_cores() -> int:
        raise OSError("no such instruction")

    monkeypatch.setattr(ops, "num_threads", no_cores)
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "not available: OSError: no such instruction" in shown and "ram auto takes" in shown


def test_an_unsupported_system_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_info.sys, "platform", "darwin")
    assert "unsupported: needs Linux" in cli_info.as_text(cli_info.describe())


def test_it_names_the_profile_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli_info.describe()["profile"]["in_use"] is None
    cli.main(["info"])
    assert "none: nothing was measured yet" in capsys.readouterr().out
    profile = profile_store.quick_profile(MachineSpeed(21e9, 1.5e9), num_threads=2)
    profile_store.keep(profile, None)
    cli.main(["info"])
    shown = capsys.readouterr().out
    assert (
        re.search(r"tiers +no VRAM, RAM .* at 21\.00 GB/s, disk at 1\.50 GB/s", shown) and "\nstate " in shown
    )
    assert "measured at an earlier load on 20" in shown and "at 21.00 GB/s and 1.50 GB/s; 0 models" in shown
    notes = {**profile.notes, "settings": {"policy": "lru"}, "evidence": {"verdict": "faster"}}
    profile_store.keep(replace(profile, notes=notes), checkpoint_key(open_checkpoint(DEMO_MODEL)))
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["profile"]
    assert report["in_use"].startswith("tuned for this model on 20") and report["tuned_models"] == 1
