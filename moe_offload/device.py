"""What a machine can do, tier by tier: bytes, bandwidths and latencies, each with where it comes from.

A profile is a TOML file (``device_profiles/``, or one of the user's own)::

    schema = 1
    name = "my-laptop"
    description = "what it is, in a line"

    [measured]                       # needed as soon as one figure says "measured"
    date = 2026-11-21
    command = "moe-offload tune"
    version = "0.1.0"

    [ram]
    capacity = { value = 16, unit = "GiB", source = "datasheet" }
    read_bandwidth = { value = 31.2, unit = "GB/s", source = "measured", note = "2 threads" }

Sections and figures are those of ``FIGURES``; a tier that the machine lacks is left out. Figures are
kept in base units (bytes, bytes/s, seconds, watts, one), converted from the unit in the file.
"""

from __future__ import annotations

import datetime
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from moe_offload.errors import ConfigError

T = TypeVar("T")
SCHEMA_VERSION = 1
SOURCES = ("measured", "datasheet")

BYTES = {"B": 1.0, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
BYTES_PER_S = {"MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12, "MiB/s": 2.0**20, "GiB/s": 2.0**30}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
OPS_PER_S = {"GOPS": 1e9, "TOPS": 1e12}
WATTS = {"W": 1.0}
COUNT = {"": 1.0}

# section -> figure -> (units with their factor to the base unit, least and most that is possible).
# The bounds catch a wrong unit, not a slow machine.
Bounds = tuple[Mapping[str, float], float, float]
FIGURES: dict[str, dict[str, Bounds]] = {
    "cpu": {
        "physical_cores": (COUNT, 1, 4096),
        "int8_throughput": (OPS_PER_S, 1e8, 1e16),
        "package_power": (WATTS, 0.5, 5000),
    },
    "ram": {
        "capacity": (BYTES, 2.0**26, 2.0**46),
        "read_bandwidth": (BYTES_PER_S, 1e8, 1e13),
    },
    "disk": {
        "capacity": (BYTES, 2.0**26, 2.0**60),
        "read_bandwidth": (BYTES_PER_S, 1e6, 1e12),
        "latency": (SECONDS, 1e-7, 1.0),
    },
    "gpu": {
        "vram": (BYTES, 2.0**26, 2.0**44),
        "read_bandwidth": (BYTES_PER_S, 1e9, 1e14),
        "int8_throughput": (OPS_PER_S, 1e9, 1e18),
        "launch_latency": (SECONDS, 1e-7, 1e-1),
        "power": (WATTS, 0.5, 5000),
    },
    "link": {
        "to_device_bandwidth": (BYTES_PER_S, 1e7, 1e13),
        "to_host_bandwidth": (BYTES_PER_S, 1e7, 1e13),
        "latency": (SECONDS, 1e-8, 1e-1),
    },
}
# A profile without these says nothing; a GPU without a link, or a link to nothing, cannot be.
REQUIRED = {
    "cpu": {"physical_cores"},
    "ram": {"capacity", "read_bandwidth"},
    "disk": {"read_bandwidth"},
    "gpu": {"vram", "read_bandwidth"},
    "link": {"to_device_bandwidth"},
}
REQUIRED_SECTIONS = ("cpu", "ram", "disk")


@dataclass(frozen=True, slots=True)
class Figure:
    """One number in its base unit, and who says so.

    Attributes:
        value: bytes, bytes/s, operations/s, seconds, watts or a count.
        source: "measured" on this machine, or "datasheet".
        note: conditions or the document.
    """

    value: float
    source: str
    note: str = ""


@dataclass(frozen=True)
class DeviceProfile:
    """A machine. ``figures[section][name]`` holds what the file gave, and nothing that it did not.

    Attributes:
        unified_memory: CPU and GPU share the RAM, so there is no link to copy over.
        measured: date, command and version of the measured figures; empty without any.
    """

    name: str
    description: str
    unified_memory: bool
    measured: Mapping[str, str]
    figures: Mapping[str, Mapping[str, Figure]]

    def has(self, section: str) -> bool:
        """Whether the machine has this tier."""
        return section in self.figures

    def value(self, section: str, name: str) -> float:
        """Return a figure in its base unit.

        Raises:
            ConfigError: the profile does not give it.
        """
        try:
            return self.figures[section][name].value
        except KeyError:
            raise ConfigError(
                f"device profile {self.name!r} has no {section}.{name}; measure it, or choose another profile"
            ) from None


def profile_names() -> list[str]:
    """Return the names of the bundled profiles, sorted."""
    return sorted(path.stem for path in _profiles_dir().glob("*.toml"))


def _profiles_dir() -> Path:
    """Return the folder of the bundled profiles: device_profiles/ of the repository, once installed."""
    return Path(str(resources.files("moe_offload.device_profiles")))


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """Read a bundled profile by name, or a TOML file by path.

    Raises:
        ConfigError: no such profile, not TOML, an unknown key, or a figure that cannot be.
    """
    path = Path(name_or_path)
    if str(name_or_path) in profile_names():
        path = _profiles_dir() / f"{name_or_path}.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"there is no device profile {str(name_or_path)!r}; give a .toml file or one of "
            + ", ".join(profile_names())
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read device profile {path}: {error}") from error
    return parse_profile(document, str(path))


def parse_profile(document: Mapping[str, Any], where: str) -> DeviceProfile:
    """Check a parsed TOML document; ``where`` names it in errors.

    Raises:
        ConfigError: see ``load_profile``.
    """
    known = {"schema", "name", "description", "unified_memory", "measured", *FIGURES}
    _refuse_unknown(where, "", document, known)
    if document.get("schema") != SCHEMA_VERSION:
        raise ConfigError(
            f"{where}: schema is {document.get('schema')!r}, but this version reads schema {SCHEMA_VERSION}"
        )
    figures = {name: _section(where, name, document[name]) for name in FIGURES if name in document}
    unified_memory = _typed(where, "unified_memory", document.get("unified_memory", False), bool)
    measured = _measured(where, document.get("measured", {}))
    _check_whole(where, figures, unified_memory, measured)
    return DeviceProfile(
        name=_typed(where, "name", document.get("name"), str),
        description=_typed(where, "description", document.get("description", ""), str),
        unified_memory=unified_memory,
        measured=measured,
        figures=figures,
    )


def _section(where: str, section: str, table: Any) -> dict[str, Figure]:
    _typed(where, section, table, dict)
    _refuse_unknown(where, f"{section}.", table, set(FIGURES[section]))
    return {name: _figure(where, f"{section}.{name}", FIGURES[section][name], table[name]) for name in table}


def _figure(where: str, key: str, bounds: Bounds, entry: Any) -> Figure:
    units, least, most = bounds
    _typed(where, key, entry, dict)
    _refuse_unknown(where, f"{key}.", entry, {"value", "unit", "source", "note"})
    value, unit, source = entry.get("value"), entry.get("unit", ""), entry.get("source")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: {key}.value must be a number, got {value!r}")
    if unit not in units:
        raise ConfigError(f"{where}: {key}.unit is {unit!r}; known are {', '.join(map(repr, units))}")
    if source not in SOURCES:
        raise ConfigError(f"{where}: {key}.source must be one of {', '.join(SOURCES)}, got {source!r}")
    base = value * units[unit]
    if not least <= base <= most:
        raise ConfigError(
            f"{where}: {key} = {value:g} {unit} cannot be: it must lie between {_in(units, unit, least)} "
            f"and {_in(units, unit, most)} {unit}".rstrip()
        )
    return Figure(base, source, _typed(where, f"{key}.note", entry.get("note", ""), str))


def _in(units: Mapping[str, float], unit: str, base: float) -> str:
    return f"{base / units[unit]:.3g}"


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


def _check_whole(
    where: str,
    figures: Mapping[str, Mapping[str, Figure]],
    unified_memory: bool,
    measured: Mapping[str, str],
) -> None:
    """Check what only shows between sections."""
    for section in (*REQUIRED_SECTIONS, *figures):
        missing = sorted(REQUIRED[section] - set(figures.get(section, {})))
        if missing:
            raise ConfigError(f"{where}: [{section}] lacks {', '.join(missing)}")
    if ("gpu" in figures and not unified_memory) != ("link" in figures):
        raise ConfigError(
            f"{where}: a GPU with its own memory needs a [link], and nothing else has one "
            f"(gpu: {'gpu' in figures}, link: {'link' in figures}, unified_memory: {unified_memory})"
        )
    all_figures = [figure for section in figures.values() for figure in section.values()]
    if any(figure.source == "measured" for figure in all_figures) and not measured:
        raise ConfigError(f"{where}: measured figures need a [measured] table: date, command, version")


def _refuse_unknown(where: str, prefix: str, table: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise ConfigError(f"{where}: unknown key {prefix}{unknown[0]}; known are {', '.join(sorted(known))}")


def _typed(where: str, key: str, value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise ConfigError(f"{where}: {key} must be a {kind.__name__}, got {value!r}")
    return value
