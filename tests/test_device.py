"""Device profiles: what is bundled loads, and what cannot be is a named error."""

from __future__ import annotations

import copy
import datetime
from pathlib import Path
from typing import Any

import pytest

from moe_offload.device import FIGURES, load_profile, parse_profile, profile_names
from moe_offload.errors import ConfigError

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


def changed(*path: str, to: Any = None) -> dict[str, Any]:
    """LAPTOP with one entry replaced, or removed where ``to`` is None."""
    document = copy.deepcopy(LAPTOP)
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
