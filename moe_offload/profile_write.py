"""A DeviceProfile as TOML, in units that people read, written whole or not at all."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_offload.profile_schema import (
    BYTES,
    BYTES_PER_S,
    CURVES,
    FIGURES,
    LISTED,
    OPS_PER_S,
    SCHEMA_VERSION,
    SECONDS,
    WATTS,
    Curve,
    DeviceProfile,
    Figure,
    Units,
)
from moe_offload.whole_file import whole_file

# The units to write, largest first: the first that leaves at least one, or else the last.
WRITTEN: list[tuple[Units, tuple[str, ...]]] = [
    (BYTES, ("GiB", "MiB", "B")),
    (BYTES_PER_S, ("GB/s", "MB/s")),
    (SECONDS, ("s", "ms", "us")),
    (OPS_PER_S, ("TOPS", "GOPS")),
    (WATTS, ("W",)),
]
DIGITS = 4


def write_profile(path: Path, profile: DeviceProfile) -> None:
    """Write ``profile`` to ``path``.

    Raises:
        OSError: the folder cannot be written to; nothing is left behind.
    """
    with whole_file(path, "w") as file:
        file.write(as_toml(profile))


def as_toml(profile: DeviceProfile) -> str:
    """Return the text of ``profile``; device.load_profile reads it back."""
    return "\n".join(_lines(profile)) + "\n"


def _lines(profile: DeviceProfile) -> Iterator[str]:
    yield f"schema = {SCHEMA_VERSION}"
    yield f"name = {_text(profile.name)}"
    yield f"description = {_text(profile.description)}"
    if profile.unified_memory:
        yield "unified_memory = true"
    if profile.measured:
        dates = {**profile.measured, "date": datetime.date.fromisoformat(profile.measured["date"])}
        yield from _table("measured", {name: _value(value) for name, value in dates.items()})
    for section, figures in profile.figures.items():
        entries = {name: _figure(FIGURES[section][name][0], figure) for name, figure in figures.items()}
        for name, curve in profile.curves.get(section, {}).items():
            entries[name] = _inline(_curve(CURVES[section][name].bounds[0], curve))
        yield from _table(section, entries)
    for time in profile.expert_times:
        yield "\n[[expert_time]]"
        for name in ("device", "format", "hidden_size", "moe_intermediate_size"):
            yield f"{name} = {_value(getattr(time, name))}"
        if time.busy:
            yield "busy = true"
        yield from (f"{name} = {text}" for name, text in _curve(SECONDS, time.curve).items())
    for section, notes in profile.notes.items():
        single = {name: value for name, value in notes.items() if name not in LISTED}
        yield from _table(section, {name: _value(value) for name, value in single.items()})
        for kind in LISTED:
            for entry in notes.get(kind, []):
                yield from _table(
                    f"[{section}.{kind}]", {name: _value(value) for name, value in entry.items()}
                )


def _table(name: str, entries: Mapping[str, str]) -> Iterator[str]:
    yield f"\n[{name}]"
    yield from (f"{key} = {text}" for key, text in entries.items())


def _figure(units: Units, figure: Figure) -> str:
    unit = _unit_for(units, figure.value)
    entries = {"value": _number(figure.value / units[unit])}
    if unit:
        entries["unit"] = _text(unit)
    entries["source"] = _text(figure.source)
    if figure.note:
        entries["note"] = _text(figure.note)
    return _inline(entries)


def _curve(units: Units, curve: Curve) -> dict[str, str]:
    unit = _unit_for(units, curve.points[0][1])
    points = [f"[{_number(x)}, {_number(y / units[unit])}]" for x, y in curve.points]
    entries = {"points": f"[{', '.join(points)}]"}
    if unit:
        entries["unit"] = _text(unit)
    entries["source"] = _text(curve.source)
    if curve.note:
        entries["note"] = _text(curve.note)
    return entries


def _inline(entries: Mapping[str, str]) -> str:
    return "{ " + ", ".join(f"{name} = {text}" for name, text in entries.items()) + " }"


def _unit_for(units: Units, value: float) -> str:
    names = next((names for known, names in WRITTEN if known is units), ("",))
    return next((name for name in names if abs(value) >= units[name]), names[-1])


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime.date):
        return value.isoformat()
    return _text(value) if isinstance(value, str) else _number(value)


def _number(value: float) -> str:
    """Return whole numbers as they are and others with a few digits: a measurement has no more."""
    return str(int(value)) if float(value).is_integer() else f"{value:.{DIGITS}g}"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a basic string of TOML has JSON's escapes
