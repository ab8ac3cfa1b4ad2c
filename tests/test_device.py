"""Device profiles: what is bundled loads, and what cannot be is a named error."""

from __future__ import annotations

import copy
import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_offload import profile_write
from moe_offload.device import FIGURES, Figure, load_profile, parse_profile, profile_names
from moe_offload.errors import ConfigError
from moe_offload.profile_write import as_toml, write_profile

LAPTOP: dict[str, Any] = {
    "schema": 1,
    "name": "laptop",
    "measured": {"date": datetime.date(2026, 11, 21), "command": "by hand", "version": "0.1.0"},
    "cpu": {"physical_cores": {"value": 8, "source": "datasheet"}},
    "ram": {
        "capacity": {"value": 16, "unit": "GiB", "source": "datasheet"},
        "read_bandwidth": {"value": 40, "unit": "GB/s", "source": "measured", "note": "2 threads"},
    },
    "disk": {"read_bandwidth": {"value": 3, "unit": "GB/s", "source": "measured"}},
    "gpu": {
        "vram": {"value": 8, "unit": "GiB", "source": "datasheet"},
        "read_bandwidth": {"value": 256, "unit": "GB/s", "source": "datasheet"},
    },
    "link": {"to_device_bandwidth": {"value": 12, "unit": "GB/s", "source": "datasheet"}},
}


def changed(*path: str, to: Any = None, document: dict[str, Any] = LAPTOP) -> dict[str, Any]:
    """A document with one entry replaced, or removed where ``to`` is None."""
    document = copy.deepcopy(document)
    table = document
    for key in path[:-1]:
        table = table[key]
    if to is None:
        del table[path[-1]]
    else:
        table[path[-1]] = to
    return document


@pytest.mark.parametrize("name", profile_names())
def test_bundled_profiles_load_under_their_own_name(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name and profile.description
    assert {"cpu", "ram", "disk"} <= set(profile.figures) <= set(FIGURES)


def test_the_machines_of_the_first_users_are_bundled() -> None:
    assert {"rtx-4060-laptop", "rtx-3060-desktop", "jetson-agx-orin", "cpu-laptop-16gb"} <= set(
        profile_names()
    )
    assert load_profile("rtx-4060-laptop").value("gpu", "vram") == 8 << 30
    assert load_profile("jetson-agx-orin").unified_memory
    assert not load_profile("cpu-laptop-16gb").has("gpu")


def test_figures_are_in_base_units() -> None:
    profile = parse_profile(LAPTOP, "laptop.toml")
    assert profile.value("ram", "capacity") == 16 << 30
    assert profile.value("ram", "read_bandwidth") == 40e9
    assert profile.figures["ram"]["read_bandwidth"].note == "2 threads"
    assert profile.measured["date"] == "2026-11-21"


def test_a_figure_that_the_profile_lacks_is_an_error() -> None:
    profile = parse_profile(changed("link", to=LAPTOP["link"]), "laptop.toml")
    with pytest.raises(ConfigError, match=r"'laptop' has no disk\.latency"):
        profile.value("disk", "latency")


ERRORS = [
    (("schema",), 2, "schema is 2, but this version reads schema 1"),
    (("name",), 3, "name must be a str, got 3"),
    (("ramm",), {}, "unknown key ramm"),
    (("ram", "bandwidth"), {}, r"unknown key ram\.bandwidth"),
    (("ram", "capacity", "unti"), "GiB", r"unknown key ram\.capacity\.unti"),
    (("ram", "capacity", "value"), "16", r"ram\.capacity\.value must be a number, got '16'"),
    (("ram", "capacity", "value"), True, r"ram\.capacity\.value must be a number, got True"),
    (("ram", "capacity", "value"), float("nan"), r"ram\.capacity\.value must be a number, got nan"),
    (("ram", "capacity", "unit"), "Gib", r"ram\.capacity\.unit is 'Gib'; known are"),
    (("ram", "capacity", "source"), "guess", r"source must be one of measured, datasheet, got 'guess'"),
    (("ram", "read_bandwidth", "unit"), "TB/s", r"ram\.read_bandwidth = 40 TB/s cannot be: .* 10 TB/s"),
    (("ram", "capacity", "value"), -1, r"ram\.capacity = -1 GiB cannot be"),
    (("gpu", "vram"), None, r"\[gpu\] lacks vram"),
    (("disk",), None, r"\[disk\] lacks read_bandwidth"),
    (("link",), None, r"a GPU with its own memory needs a \[link\]"),
    (("gpu",), None, "nothing else has one"),
    (("unified_memory",), True, "nothing else has one"),
    (("measured",), None, r"measured figures need a \[measured\] table"),
    (("measured", "command"), None, r"\[measured\] lacks command"),
    (("measured", "date"), "today", r"measured\.date must be a date such as"),
]


@pytest.mark.parametrize(("path", "to", "message"), ERRORS, ids=[message[:30] for *_, message in ERRORS])
def test_what_cannot_be_is_named(path: tuple[str, ...], to: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_profile(changed(*path, to=to), "laptop.toml")


def test_files_that_are_no_profile(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no device profile 'nope'.*rtx-4060-laptop"):
        load_profile("nope")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(ConfigError, match="cannot read device profile"):
        load_profile(broken)


TUNED: dict[str, Any] = {
    **LAPTOP,
    "ram": {
        **LAPTOP["ram"],
        "read_bandwidth_by_threads": {"points": [[1, 21.5], [2, 40]], "unit": "GB/s", "source": "measured"},
    },
    "disk": {
        **LAPTOP["disk"],
        "read_bandwidth_by_size": {
            "points": [[65536, 900], [1048576, 2100]],
            "unit": "MB/s",
            "source": "measured",
        },
    },
    "model": {
        "expert_size": {"value": 1.5, "unit": "MiB", "source": "measured"},
        "layer_overhead": {"value": 0, "unit": "us", "source": "measured"},
    },
    "expert_time": [
        {
            "device": "cpu",
            "format": "Q4_0",
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "busy": True,
            "points": [[1, 120.5], [8, 300]],
            "unit": "us",
            "source": "measured",
            "note": "while experts were read",
        }
    ],
    "machine": {"key": "0123", "device": "cpu"},
    "settings": {"num_threads": 2, "policy": "horizon", "prefetch": False, "prefetch_depth": 1},
    "state": {"power": "mains", "hottest_celsius": 61.5},
    "evidence": {
        "verdict": 'the "defaults" stay',
        "pairs": 3,
        "speedup": 1.0,
        "duel": [
            {
                "stage": "all",
                "winner": "the defaults",
                "against": "lru",
                "speedup": 1.2,
                "low": 1.1,
                "high": 1.3,
                "pairs": 12,
            }
        ],
        "run": [{"settings": "defaults", "stage": "duel", "tokens_per_s": 12.5}],
    },
}


def test_a_tuned_profile_is_read_in_base_units() -> None:
    profile = parse_profile(TUNED, "tuned.toml")
    assert profile.curves["disk"]["read_bandwidth_by_size"].points == ((65536.0, 9e8), (1048576.0, 2.1e9))
    (time,) = profile.expert_times
    assert time.busy and time.curve.points[0] == (1, pytest.approx(120.5e-6))
    assert profile.settings["num_threads"] == 2 and profile.notes["evidence"]["run"][0]["stage"] == "duel"
    assert profile.get("ram", "kernel_bandwidth", "read_bandwidth") == 40e9
    assert profile.get("model", "nothing") is None


@pytest.mark.parametrize("document", [LAPTOP, TUNED])
def test_what_is_written_reads_back_the_same(document: dict[str, Any], tmp_path: Path) -> None:
    profile = parse_profile(document, "first.toml")
    path = tmp_path / "p.toml"
    write_profile(path, profile)
    again = load_profile(path)
    assert as_toml(again) == path.read_text() == as_toml(profile)
    assert again.notes == profile.notes and again.measured == profile.measured
    assert [path.name for path in tmp_path.iterdir()] == ["p.toml"]


@pytest.mark.parametrize("name", profile_names())
def test_bundled_profiles_survive_being_written(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    write_profile(tmp_path / "p.toml", profile)
    for section, figures in load_profile(tmp_path / "p.toml").figures.items():
        for key, figure in figures.items():
            assert figure.value == pytest.approx(profile.value(section, key), rel=1e-3)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.toml").write_text("kept")
    monkeypatch.setattr(profile_write, "as_toml", lambda profile: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_profile(tmp_path / "p.toml", parse_profile(LAPTOP, "laptop.toml"))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("p.toml", "kept")]


TUNED_ERRORS = [
    (("ram", "read_bandwidth_by_threads", "points"), [[2, 40], [1, 20]], "must begin at 1 or more threads"),
    (("ram", "read_bandwidth_by_threads", "points"), [], "must begin at 1 or more threads"),
    (("ram", "read_bandwidth_by_threads", "points"), [[1]], r"must be pairs of \[threads, value\]"),
    (
        ("ram", "read_bandwidth_by_threads", "points"),
        [[1, 4e9]],
        r"read_bandwidth_by_threads = 4e\+09 GB/s cannot",
    ),
    (("ram", "read_bandwidth_by_threads", "source"), "guess", "source must be one of"),
    (("expert_time",), [{}], r"expert_time\[0\]\.points must be a list"),
    (("settings", "threads"), 2, r"unknown key settings\.threads"),
    (("settings", "num_threads"), True, r"settings\.num_threads must be a int, got True"),
    (("evidence", "run"), [{"speed": 1}], r"unknown key evidence\.run\[0\]\.speed"),
    (("evidence", "duel"), [{"winners": "x"}], r"unknown key evidence\.duel\[0\]\.winners"),
    (("evidence", "duel"), [{"speedup": 2, "low": 3, "high": 4}], "outside of its own interval"),
    (("evidence", "speedup"), -1.5, r"evidence\.speedup = -1\.5 cannot be: it must be positive"),
    (("settings", "num_threads"), 0, r"settings\.num_threads = 0 cannot be: it must lie between 1 and 1024"),
    (("settings", "ram_staging"), 0.5, r"settings\.ram_staging = 0\.5 cannot be"),
    (("state", "battery_percent"), 120, r"state\.battery_percent = 120 cannot be"),
    (("cpu", "launch_latency_busy"), {"value": 3, "unit": "s", "source": "measured"}, "cannot be"),
    (("model",), {}, r"\[model\] lacks expert_size"),
]


@pytest.mark.parametrize(("path", "to", "message"), TUNED_ERRORS, ids=[m[:30] for *_, m in TUNED_ERRORS])
def test_what_cannot_have_been_measured_is_named(path: tuple[str, ...], to: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_profile(changed(*path, to=to, document=TUNED), "tuned.toml")


@pytest.mark.parametrize(
    ("section", "name"), [("cpu", "launch_latency"), ("disk", "latency"), ("ram", "capacity")]
)
def test_a_bound_itself_survives_its_unit(section: str, name: str, tmp_path: Path) -> None:
    profile = parse_profile(LAPTOP, "laptop.toml")
    for bound in FIGURES[section][name][1:]:
        figures = {**profile.figures, section: {**profile.figures[section], name: Figure(bound, "measured")}}
        write_profile(tmp_path / "p.toml", replace(profile, figures=figures))
        assert load_profile(tmp_path / "p.toml").value(section, name) == pytest.approx(bound)
