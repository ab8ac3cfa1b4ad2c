"""The default eviction policy with what was fitted to a checkpoint, where fit-predictor has done so."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.planning.policies.horizon import read_fit
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.checkpoint_key import cache_folder, checkpoint_key, is_kept

AUTO, FITTED = "auto", "horizon"


def policy_fit_path(checkpoint: Checkpoint) -> Path:
    """Return where fit-predictor keeps the policy's coefficients for this checkpoint."""
    return cache_folder("policies") / f"{checkpoint_key(checkpoint)}.npz"


def automatic_policy(name: str, checkpoint: Checkpoint) -> str:
    """Return the policy that a name nobody insisted on stands for, as ``make_policy`` takes it.

    "auto", and "horizon" where it was tuned and not asked for, are horizon with this checkpoint's fit, or
    without one where there is none, or none that can be read; another name is itself.
    """
    if name not in (AUTO, FITTED):
        return name
    path = policy_fit_path(checkpoint)
    if not is_kept(path) or not _is_sound(path, path.stat().st_mtime_ns):
        return FITTED
    return f"{FITTED}={path}"


@lru_cache
def _is_sound(path: Path, written_ns: int) -> bool:
    """Whether the fit can be read; says so once where it cannot: nobody asked for it, so nothing fails."""
    try:
        read_fit(path)
    except (OSError, CheckpointError, ConfigError) as error:
        print(f"moe-offload: note: the policy goes without its fit: {error}", file=sys.stderr)
        return False
    return True
