"""From a parsed TOML document to a DeviceProfile: known keys, figures that can be, or a named error."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from moe_offload.errors import ConfigError
from moe_offload.profile_schema import (
    CURVES,
    EXPERT_TIME,
    EXPERT_TIME_KEYS,
    FIGURES,
    LISTED,
    NOTE_BOUNDS,
    NOTES,
    POSITIVE,
    REQUIRED,
    REQUIRED_SECTIONS,
    SCHEMA_VERSION,
    SOURCES,
    Bounds,
    Curve,
    CurveKind,
    DeviceProfile,
    ExpertTime,
    Figure,
)

T = TypeVar("T")
ROUNDING = 1e-9  # a bound in another unit and back


def parse_profile(document: Mapping[str, Any], where: str) -> DeviceProfile:
    """Check a parsed TOML document; ``where`` names it in errors.

    Raises:
        ConfigError: see ``load_profile``.
    """
    head = {"schema", "name", "description", "unified_memory", "measured", "expert_time"}
    _refuse_unknown(where, "", document, {*head, *FIGURES, *NOTES})
    if document.get("schema") != SCHEMA_VERSION:
        raise ConfigError(
            f"{where}: schema is {document.get('schema')!r}, but this version reads schema {SCHEMA_VERSION}"
        )
    profile = DeviceProfile(
        name=_typed(where, "name", document.get("name"), str),
        description=_typed(where, "description", document.get("description", ""), str),
        unified_memory=_typed(where, "unified_memory", document.get("unified_memory", False), bool),
        measured=_measured(where, document.get("measured", {})),
        figures={name: _figures(where, name, document[name]) for name in FIGURES if name in document},
        curves={name: _curves(where, name, document[name]) for name in CURVES if name in document},
        expert_times=_expert_times(where, document.get("expert_time", [])),
        notes={name: _note(where, name, document[name]) for name in NOTES if name in document},
    )
    _check_whole(where, profile)
    return profile


def _figures(where: str, section: str, table: Any) -> dict[str, Figure]:
    _typed(where, section, table, dict)
    curves = CURVES.get(section, {})
    _refuse_unknown(where, f"{section}.", table, {*FIGURES[section], *curves})
    return {
        name: _figure(where, f"{section}.{name}", FIGURES[section][name], table[name])
        for name in table
        if name not in curves
    }


def _curves(where: str, section: str, table: Mapping[str, Any]) -> dict[str, Curve]:
    kinds = CURVES[section]
    return {
        name: _curve(where, f"{section}.{name}", kinds[name], table[name]) for name in kinds if name in table
    }


def _figure(where: str, key: str, bounds: Bounds, entry: Any) -> Figure:
    _typed(where, key, entry, dict)
    _refuse_unknown(where, f"{key}.", entry, {"value", "unit", "source", "note"})
    base = _in_base_unit(where, key, bounds, entry.get("value"), entry.get("unit", ""))
    return Figure(base, _source(where, key, entry), _typed(where, f"{key}.note", entry.get("note", ""), str))


def _in_base_unit(where: str, key: str, bounds: Bounds, value: Any, unit: Any) -> float:
    units, least, most = bounds
    if unit not in units:
        raise ConfigError(f"{where}: {key}.unit is {unit!r}; known are {', '.join(map(repr, units))}")
    base = _number(where, f"{key}.value", value) * units[unit]
    if not least * (1 - ROUNDING) <= base <= most * (1 + ROUNDING):
        raise ConfigError(
            f"{where}: {key} = {value:g} {unit} cannot be: it must lie between {least / units[unit]:.3g} "
            f"and {most / units[unit]:.3g} {unit}".rstrip()
        )
    return base


def _number(where: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: {key} must be a number, got {value!r}")
    return value


def _source(where: str, key: str, entry: Mapping[str, Any]) -> str:
    source = entry.get("source")
    if source not in SOURCES:
        raise ConfigError(f"{where}: {key}.source must be one of {', '.join(SOURCES)}, got {source!r}")
    return str(source)


def _curve(where: str, key: str, kind: CurveKind, entry: Any, besides: Sequence[str] = ()) -> Curve:
    _typed(where, key, entry, dict)
    _refuse_unknown(where, f"{key}.", entry, {"points", "unit", "source", "note", *besides})
    points = []
    for pair in _typed(where, f"{key}.points", entry.get("points"), list):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ConfigError(f"{where}: {key}.points must be pairs of [{kind.x}, value], got {pair!r}")
        x = _number(where, f"{key}.points", pair[0])
        points.append((float(x), _in_base_unit(where, key, kind.bounds, pair[1], entry.get("unit", ""))))
    xs = [x for x, _ in points]
    if not xs or xs[0] < kind.least_x or any(a >= b for a, b in itertools.pairwise(xs)):
        raise ConfigError(
            f"{where}: {key}.points must begin at {kind.least_x:g} or more {kind.x} and ascend, got {xs}"
        )
    note = _typed(where, f"{key}.note", entry.get("note", ""), str)
    return Curve(tuple(points), _source(where, key, entry), note)


def _expert_times(where: str, entries: Any) -> list[ExpertTime]:
    times = []
    for number, entry in enumerate(_typed(where, "expert_time", entries, list)):
        key = f"expert_time[{number}]"
        curve = _curve(where, key, EXPERT_TIME, entry, EXPERT_TIME_KEYS)
        sizes = [_typed(where, f"{key}.{name}", entry.get(name), int) for name in EXPERT_TIME_KEYS[2:4]]
        if min(sizes) < 1:
            raise ConfigError(f"{where}: {key} is of an expert of {sizes[0]} x {sizes[1]}, which cannot be")
        times.append(
            ExpertTime(
                device=_typed(where, f"{key}.device", entry.get("device"), str),
                format=_typed(where, f"{key}.format", entry.get("format"), str),
                hidden_size=sizes[0],
                moe_intermediate_size=sizes[1],
                curve=curve,
                busy=_typed(where, f"{key}.busy", entry.get("busy", False), bool),
            )
        )
    return times


def _note(where: str, section: str, table: Any) -> dict[str, Any]:
    _typed(where, section, table, dict)
    _check_notes(where, section, table, NOTES[section])
    for name in LISTED.keys() & table.keys():
        for number, entry in enumerate(table[name]):
            _typed(where, f"{section}.{name}[{number}]", entry, dict)
            _check_notes(where, f"{section}.{name}[{number}]", entry, LISTED[name])
    return dict(table)


def _check_notes(where: str, prefix: str, table: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    _refuse_unknown(where, f"{prefix}.", table, set(kinds))
    for key, value in table.items():
        kind = kinds[key]
        wanted = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            names = " or ".join(each.__name__ for each in wanted)
            raise ConfigError(f"{where}: {prefix}.{key} must be a {names}, got {value!r}")
        least, most = NOTE_BOUNDS.get(key, POSITIVE)
        if isinstance(value, int | float) and not isinstance(value, bool) and not least <= value <= most:
            bounds = "be positive" if key not in NOTE_BOUNDS else f"lie between {least:g} and {most:g}"
            raise ConfigError(f"{where}: {prefix}.{key} = {value!r} cannot be: it must {bounds}")
    gain = table.get("speedup", table.get("against_defaults", 0.0))
    if not table.get("low", 0.0) <= gain <= table.get("high", math.inf):
        raise ConfigError(f"{where}: {prefix}: a gain outside of its own interval cannot be")


def _measured(where: str, table: Any) -> dict[str, str]:
    _typed(where, "measured", table, dict)
    if not table:
        return {}
    _refuse_unknown(where, "measured.", table, {"date", "command", "version"})
    missing = sorted({"date", "command", "version"} - set(table))
    if missing:
        raise ConfigError(f"{where}: [measured] lacks {', '.join(missing)}")
    if not isinstance(table["date"], datetime.date):
        raise ConfigError(f"{where}: measured.date must be a date such as 2026-11-21, got {table['date']!r}")
    return {key: str(value) for key, value in table.items()}


def _check_whole(where: str, profile: DeviceProfile) -> None:
    """Check what only shows between sections."""
    figures = profile.figures
    for section in (*REQUIRED_SECTIONS, *figures):
        missing = sorted(REQUIRED[section] - set(figures.get(section, {})))
        if missing:
            raise ConfigError(f"{where}: [{section}] lacks {', '.join(missing)}")
    if ("gpu" in figures and not profile.unified_memory) != ("link" in figures):
        raise ConfigError(
            f"{where}: a GPU with its own memory needs a [link], and nothing else has one "
            f"(gpu: {'gpu' in figures}, link: {'link' in figures}, unified_memory: {profile.unified_memory})"
        )
    parts: list[Figure | Curve] = [figure for section in figures.values() for figure in section.values()]
    parts += [curve for section in profile.curves.values() for curve in section.values()]
    parts += [time.curve for time in profile.expert_times]
    if any(part.source == "measured" for part in parts) and not profile.measured:
        raise ConfigError(f"{where}: measured figures need a [measured] table: date, command, version")


def _refuse_unknown(where: str, prefix: str, table: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise ConfigError(f"{where}: unknown key {prefix}{unknown[0]}; known are {', '.join(sorted(known))}")


def _typed(where: str, key: str, value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise ConfigError(f"{where}: {key} must be a {kind.__name__}, got {value!r}")
    return value
