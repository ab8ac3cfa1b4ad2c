"""From a predictor's name to what it stands for: itself, and what it needs of a fit made earlier.

``choose_predictor`` runs before the budget is divided, so that a fit's arrays are in the process when its
memory is measured; predictor_making.py's ``make_predictor`` when the routers have their weights.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from moe_offload.errors import CheckpointError, ConfigError, nearest
from moe_offload.planning.predictor_worth import best_predictor
from moe_offload.predictors import fit_file, learned
from moe_offload.predictors.fit_file import PredictorFit
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.checkpoint_key import cache_folder, checkpoint_key, is_kept

GATE_DEPTH = 2  # at most: the prefetcher looks as far as reading takes

# By name: the groups of a fit that it needs.
GROUPS: dict[str, tuple[str, ...]] = {
    "cross_layer_gate": (),
    "frequency": (),
    "previous_token": (),
    "static": ("popularity",),
    "transition": ("transition",),
    "residual_gate": ("curve.residual_gate",),
    "shared_expert_gate": ("residual_rms", "curve.residual_gate"),
    "mean_output_gate": ("mean_scores", "curve.mean_output_gate"),
    "low_rank_gate": ("low_rank.down", "low_rank.up", "low_rank.shift", "curve.low_rank_gate"),
    "hybrid": ("hybrid", "directions", "answers", "first", "curve.hybrid", "curve.first"),
    "learned": ("network", "first", "curve.learned", "curve.first"),
}
FITTED = ("hybrid", "learned")  # of which "fitted" is one
NEEDS_FIT = frozenset(name for name, groups in GROUPS.items() if groups) - {"residual_gate"}
NAMES = ("auto", "none", "fitted", *GROUPS)


@dataclass(frozen=True)
class PredictorChoice:
    """A predictor's name, its argument resolved, and the fit that it will use."""

    name: str
    fit: PredictorFit | None = None

    def __str__(self) -> str:
        return self.name


def fit_path(checkpoint: Checkpoint) -> Path:
    """Return where fit-predictor keeps this checkpoint's fit."""
    return cache_folder("predictors") / f"{checkpoint_key(checkpoint)}.npz"


def choose_predictor(name: str, checkpoint: Checkpoint, *, insist: bool = True) -> PredictorChoice:
    """Resolve "auto", "fitted" and "NAME=FILE"; read what the predictor needs of a fit.

    "auto" is what saves most by the report of this checkpoint's fit, its own cost taken off (the gate
    may be that), and the cross-layer gate where there is no fit, or none that can be read. "fitted" insists
    on a fitted one.

    Args:
        insist: False where the name was tuned and not given: one that cannot be had is then "auto".

    Raises:
        ConfigError: no such predictor, or it needs a fit and there is none.
        CheckpointError: the fit that it needs is damaged.
    """
    try:
        return _chosen(name, checkpoint)
    except (CheckpointError, ConfigError) as error:
        if insist:
            raise
        _say(f"predictor {name!r} was tuned and cannot be had: {error}")
        return _chosen("auto", checkpoint)


def _chosen(name: str, checkpoint: Checkpoint) -> PredictorChoice:
    base, _, file = name.partition("=")
    if ":" in base or base == "none":
        return PredictorChoice(name)
    if base not in NAMES:
        known = ", ".join(NAMES)
        near = nearest(base, NAMES)
        raise ConfigError(
            f'predictor={name!r} is unknown{near}; known are {known}, or "package.module:Class"'
        )
    path = Path(file) if file else fit_path(checkpoint)
    if file or base == "fitted" or base in NEEDS_FIT:
        return _with_fit(base, path, checkpoint, required=True)
    without = "cross_layer_gate" if base == "auto" else base
    if not is_kept(path):
        return PredictorChoice(without)
    try:
        return _with_fit(base, path, checkpoint, required=False)
    except (OSError, CheckpointError, ConfigError) as error:  # nobody asked for this file
        _say(f"predicting goes without its fit: {error}")
        return PredictorChoice(without)


def _with_fit(base: str, path: Path, checkpoint: Checkpoint, *, required: bool) -> PredictorChoice:
    """Return the predictor with what it needs of the fit at ``path``."""
    if base in ("auto", "fitted"):
        base = _best(path, required=required)
    fit = fit_file.read_fit(path, {*GROUPS[base], f"curve.{base}", "stay"})
    if fit.checkpoint != checkpoint_key(checkpoint):
        raise ConfigError(f"{path} was fitted to {fit.checkpoint}, not to {checkpoint.path}")
    return PredictorChoice(base, fit)


def _best(path: Path, *, required: bool) -> str:
    """Return what saves most by the fit's report; the gate may be that, unless a fitted one is required."""
    fit = fit_file.read_fit(path, ())
    names = FITTED if required else (*FITTED, "cross_layer_gate")
    best = best_predictor(fit.report.get("held_out", {}), fit.top_k, names) or "hybrid"
    if best == "learned" and not learned.is_available():
        _say(
            "onnxruntime is not installed, so the fit's linear predictor is used; "
            "pip install 'moe_offload[learned]' for its network"
        )
        return "hybrid"
    return best


def _say(line: str) -> None:
    print(f"moe-offload: note: {line}", file=sys.stderr)
