"""The default eviction policy with what was fitted to a checkpoint, where fit-predictor has done so."""

from __future__ import annotations

from pathlib import Path

from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.checkpoint_key import cache_folder, checkpoint_key

AUTO, FITTED = "auto", "horizon"


def policy_fit_path(checkpoint: Checkpoint) -> Path:
    """Return where fit-predictor keeps the policy's coefficients for this checkpoint."""
    return cache_folder("policies") / f"{checkpoint_key(checkpoint)}.npz"


def automatic_policy(name: str, checkpoint: Checkpoint) -> str:
    """Return the policy that a name nobody insisted on stands for, as ``make_policy`` takes it.

    "auto", and "horizon" where it was tuned and not asked for, are horizon with this checkpoint's fit, or
    without one where there is none; another name is itself.
    """
    if name not in (AUTO, FITTED):
        return name
    path = policy_fit_path(checkpoint)
    return f"{FITTED}={path}" if path.is_file() else FITTED
