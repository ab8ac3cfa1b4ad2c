"""What a machine can do, tier by tier: bytes, bandwidths and latencies, each with where it comes from.

A profile is a TOML file (``device_profiles/``, one that ``moe-offload tune`` wrote, or the user's own)::

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
    read_bandwidth_by_threads = { points = [[1, 17.0], [2, 31.2]], unit = "GB/s", source = "measured" }

    [[expert_time]]                  # one expert by number of tokens
    device = "cpu"
    format = "Q4_0"
    hidden_size = 2048
    moe_intermediate_size = 768
    points = [[1, 120.0], [8, 300.0]]
    unit = "us"
    source = "measured"

    [settings]                       # what tune chose for the model of [checkpoint], and why: [evidence]
    num_threads = 2

profile_schema.py has every section, key, unit and bound; a tier that the machine lacks is left out. Figures
are kept in base units (bytes, bytes/s, seconds, watts, one), converted from the unit in the file.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path

from moe_offload.errors import ConfigError
from moe_offload.profile_parse import parse_profile
from moe_offload.profile_schema import FIGURES, Curve, DeviceProfile, ExpertTime, Figure

__all__ = [
    "FIGURES",
    "Curve",
    "DeviceProfile",
    "ExpertTime",
    "Figure",
    "load_profile",
    "parse_profile",
    "profile_names",
]


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
