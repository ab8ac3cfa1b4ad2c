"""What a device profile may say: sections, figures, units, and the bounds of what can be.

Base units are bytes, bytes/s, operations/s, seconds, watts, degrees Celsius and counts. The bounds catch
a wrong unit, not a slow machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_offload.config import MAX_STAGING
from moe_offload.errors import ConfigError

SCHEMA_VERSION = 1
SOURCES = ("measured", "datasheet")

Units = Mapping[str, float]  # unit -> factor to the base unit
BYTES = {"B": 1.0, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
BYTES_PER_S = {"MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12, "MiB/s": 2.0**20, "GiB/s": 2.0**30}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
OPS_PER_S = {"GOPS": 1e9, "TOPS": 1e12}
WATTS = {"W": 1.0}
COUNT = {"": 1.0}

# section -> figure -> (units, least and most that is possible). "_busy": while the other parts work, too.
Bounds = tuple[Units, float, float]
RAM_SPEED: Bounds = (BYTES_PER_S, 1e8, 1e13)
DISK_SPEED: Bounds = (BYTES_PER_S, 1e6, 1e12)
LINK_SPEED: Bounds = (BYTES_PER_S, 1e7, 1e13)
LATENCY: Bounds = (SECONDS, 1e-8, 1e-1)
FIGURES: dict[str, dict[str, Bounds]] = {
    "cpu": {
        "physical_cores": (COUNT, 1, 4096),
        "usable_cores": (COUNT, 1, 4096),
        "int8_throughput": (OPS_PER_S, 1e8, 1e16),
        "launch_latency": LATENCY,
        "launch_latency_busy": LATENCY,
        "sync_latency": LATENCY,
        "sync_latency_busy": LATENCY,
        "package_power": (WATTS, 0.5, 5000),
    },
    "ram": {
        "capacity": (BYTES, 2.0**26, 2.0**46),
        "cgroup_limit": (BYTES, 2.0**24, 2.0**46),
        "read_bandwidth": RAM_SPEED,
        "kernel_bandwidth": RAM_SPEED,
        "kernel_bandwidth_busy": RAM_SPEED,
    },
    "disk": {
        "capacity": (BYTES, 2.0**26, 2.0**60),
        "read_bandwidth": DISK_SPEED,
        "read_bandwidth_busy": DISK_SPEED,
        "latency": (SECONDS, 1e-7, 1.0),
    },
    "gpu": {
        "vram": (BYTES, 2.0**20, 2.0**44),  # an emulated one may be small
        "read_bandwidth": (BYTES_PER_S, 1e7, 1e14),
        "int8_throughput": (OPS_PER_S, 1e9, 1e18),
        "launch_latency": (SECONDS, 1e-7, 1e-1),
        "launch_latency_busy": (SECONDS, 1e-7, 1e-1),
        "sync_latency": (SECONDS, 1e-7, 1e-1),
        "sync_latency_busy": (SECONDS, 1e-7, 1e-1),
        "power": (WATTS, 0.5, 5000),
    },
    "link": {
        "to_device_bandwidth": LINK_SPEED,
        "to_device_bandwidth_busy": LINK_SPEED,
        "to_host_bandwidth": LINK_SPEED,
        "to_host_bandwidth_busy": LINK_SPEED,
        "latency": LATENCY,
    },
    "model": {
        "expert_size": (BYTES, 1.0, 2.0**40),
        "layer_overhead": (SECONDS, 0.0, 1.0),  # of a layer that misses nothing, nothing read ahead
        "stall_overhead": (SECONDS, 0.0, 1.0),  # what misses add, beside waiting for them, nothing read ahead
        "recall": (COUNT, 0.0, 1.0),  # of the predictor in [settings], a layer ahead
        "missed_recall": (COUNT, 0.0, 1.0),  # the same of those experts that were not in memory
        "prefetch_speedup": (COUNT, 1e-2, 1e2),  # of runs that prefetch, beside runs in turn with them
        "prefetch_hit_rate": (COUNT, 0.0, 1.0),  # of those runs without
        "predict_time": (SECONDS, 0.0, 1.0),  # of asking it, for a layer
        "submit_time": (SECONDS, 0.0, 1.0),  # of asking for an expert's read, which takes from computing
    },
}


@dataclass(frozen=True, slots=True)
class CurveKind:
    """What a measured curve is of: y against x, x in base units and ascending."""

    x: str
    bounds: Bounds  # of y
    least_x: float = 1.0


# section -> curve -> what it may hold
CURVES: dict[str, dict[str, CurveKind]] = {
    "ram": {
        "read_bandwidth_by_threads": CurveKind("threads", RAM_SPEED),
        "read_bandwidth_by_threads_busy": CurveKind("threads", RAM_SPEED),
    },
    "disk": {
        "read_bandwidth_by_size": CurveKind("bytes of a read", DISK_SPEED),
        "read_bandwidth_by_size_busy": CurveKind("bytes of a read", DISK_SPEED),
        "read_bandwidth_by_depth": CurveKind("reads in flight", DISK_SPEED),
        "read_bandwidth_by_depth_busy": CurveKind("reads in flight", DISK_SPEED),
    },
}
EXPERT_TIME = CurveKind("tokens", (SECONDS, 1e-8, 1e4))
EXPERT_TIME_KEYS = ("device", "format", "hidden_size", "moe_intermediate_size", "busy")

# A profile without these says nothing; a GPU without a link, or a link to nothing, cannot be.
REQUIRED = {
    "cpu": {"physical_cores"},
    "ram": {"capacity", "read_bandwidth"},
    "disk": {"read_bandwidth"},
    "gpu": {"vram", "read_bandwidth"},
    "link": {"to_device_bandwidth"},
    "model": {"expert_size"},
}
REQUIRED_SECTIONS = ("cpu", "ram", "disk")

# What else a profile that `tune` wrote holds: section -> key -> type.
NOTES: dict[str, dict[str, type | tuple[type, ...]]] = {
    "machine": {"key": str, "device": str},
    "checkpoint": {"key": str},
    "settings": {
        "num_threads": int,
        "policy": str,
        "predictor": str,
        "prefetch": bool,
        "prefetch_depth": int,
        "scheduler": str,
        "ram_slots": int,
        "ram_staging": (int, float),  # slots for reads in flight, times top_k
        "vram_slots": int,
        "vram_staging": (int, float),
        "exclusive": bool,
    },
    "state": {
        "power": str,
        "battery_percent": int,
        "hottest_celsius": (int, float),
        "throttle_events": int,
        "governor": str,
        "cpu_quota": (int, float),
    },
    "evidence": {
        "verdict": str,
        "speedup": (int, float),
        "speedup_low": (int, float),
        "speedup_high": (int, float),
        "pairs": int,  # of runs, of the stage that decided
        "tokens": int,  # of a run
        "seconds": (int, float),
        "ram_bytes": int,
        "duel": list,
        "run": list,
    },
}
# Of the tables in those lists. A duel: what won, against what, by how much, in how many pairs of runs.
LISTED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "duel": {
        "stage": str,
        "winner": str,
        "against": str,
        "speedup": (int, float),
        "low": (int, float),
        "high": (int, float),
        "pairs": int,
    },
    "run": {
        "settings": str,
        "stage": str,
        "modelled_tokens_per_s": (int, float),
        "tokens_per_s": (int, float),
        "against_defaults": (int, float),
        "low": (int, float),
        "high": (int, float),
        "pairs": int,
    },
}
# Least and most of what these sections may say in numbers; all others are positive.
NOTE_BOUNDS: dict[str, tuple[float, float]] = {
    "num_threads": (1, 1024),
    "prefetch_depth": (1, 64),
    "ram_slots": (0, 2**40),
    "vram_slots": (0, 2**40),
    "ram_staging": (1, MAX_STAGING),
    "vram_staging": (1, MAX_STAGING),
    "battery_percent": (0, 100),
    "hottest_celsius": (-60, 250),
    "throttle_events": (0, 2**62),
    "pairs": (0, 10**9),
    "tokens": (0, 10**9),
    "seconds": (0, 10**9),
    "low": (0, 10**9),
    "speedup_low": (0, 10**9),
    "ram_bytes": (0, 2**62),
    "tokens_per_s": (0, 10**9),
    "modelled_tokens_per_s": (0, 10**12),
}
POSITIVE = (5e-324, 1.7e308)

Points = tuple[tuple[float, float], ...]  # (x, y), x ascending


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


@dataclass(frozen=True, slots=True)
class Curve:
    """A figure against something: ``points`` of (x, value), both in base units."""

    points: Points
    source: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class ExpertTime:
    """Seconds of one expert by its number of tokens, for one device, shape and format.

    Attributes:
        busy: measured while the other parts of the machine worked, too.
    """

    device: str
    format: str
    hidden_size: int
    moe_intermediate_size: int
    curve: Curve
    busy: bool = False


@dataclass(frozen=True)
class DeviceProfile:
    """A machine. ``figures[section][name]`` holds what the file gave, and nothing that it did not.

    Attributes:
        unified_memory: CPU and GPU share the RAM, so there is no link to copy over.
        measured: date, command and version of the measured figures; empty without any.
        notes: by section, what tune saw and chose: machine, checkpoint, settings, state, evidence.
    """

    name: str
    description: str
    unified_memory: bool
    measured: Mapping[str, str]
    figures: Mapping[str, Mapping[str, Figure]]
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    expert_times: Sequence[ExpertTime] = ()
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

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

    def get(self, section: str, *names: str) -> float | None:
        """Return the first of these figures that the profile gives; None where it gives none."""
        given = self.figures.get(section, {})
        return next((given[name].value for name in names if name in given), None)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What tune chose; empty where nothing was tuned."""
        return self.notes.get("settings", {})
