"""`moe-offload info`: complete, honest about what is missing, and never itself the failure."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from moe_offload import cli, cli_info, ops
from moe_offload.residency import memory


def test_it_names_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cpu"]["isa"] == ops.isa()
    assert report["cpu"]["threads"] == ops.num_threads()
    assert report["memory"]["total_bytes"] == memory.total_bytes()
    assert report["packages"]["torch"] == version("torch")
    assert report["io"]["bundled_model"] in ("direct", "buffered")
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
