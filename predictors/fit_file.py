"""What a fit leaves behind: arrays of every fitted predictor and a report, in one npz file.

Names in the file are GROUP/LAYER or GROUP/LAYER/LATER, so that a run reads only its predictor's group.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.npz import open_npz
from moe_offload.predictors.routers import Curve
from moe_offload.whole_file import whole_file

FORMAT = 1
Pair = tuple[int, int]
Arrays = dict[tuple[int, ...], NDArray[Any]]


@dataclass
class PredictorFit:
    """Fitted parameters of one checkpoint's predictors.

    Attributes:
        checkpoint: key of the checkpoint (storage/checkpoint_key.py).
        depth: how many layers ahead the pairs reach.
        groups: by name, arrays by layer or by (layer, later layer); ``curve.NAME`` are predictor NAME's.
        report: what was measured on held-out text; "best" names the predictor that "fitted" stands for.
    """

    checkpoint: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    depth: int
    groups: dict[str, Arrays] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def by_layer(self, group: str) -> dict[int, NDArray[Any]]:
        """Return a group's arrays by layer; empty where nothing was fitted."""
        return {key[0]: array for key, array in self.groups.get(group, {}).items()}

    def by_pair(self, group: str) -> dict[Pair, NDArray[Any]]:
        """Return a group's arrays by (layer, later layer)."""
        return {(key[0], key[1]): array for key, array in self.groups.get(group, {}).items()}

    def curves(self, predictor: str) -> dict[Pair, Curve]:
        """Return a predictor's way from scores to probabilities."""
        return {
            pair: Curve(float(array[0]), float(array[1]))
            for pair, array in self.by_pair(f"curve.{predictor}").items()
        }

    def num_bytes(self, groups: Iterable[str]) -> int:
        """Return what the arrays of these groups take in memory."""
        return sum(array.nbytes for group in groups for array in self.groups.get(group, {}).values())


def write_fit(path: Path, fit: PredictorFit) -> None:
    """Write to ``path``, whole or not at all.

    Raises:
        ConfigError: it cannot be written there.
    """
    about = {
        "format": FORMAT,
        "checkpoint": fit.checkpoint,
        "layers": list(fit.layers),
        "num_experts": fit.num_experts,
        "top_k": fit.top_k,
        "hidden_size": fit.hidden_size,
        "depth": fit.depth,
        "report": fit.report,
    }
    arrays: dict[str, Any] = {"about": np.str_(json.dumps(about, sort_keys=True))}
    for group, members in fit.groups.items():
        for key, array in members.items():
            arrays["/".join([group, *map(str, key)])] = array
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise ConfigError(
            f"the fitted predictor cannot be written to {path}: {error.strerror}; set XDG_CACHE_HOME to "
            "another folder or pass -o"
        ) from error


def read_fit(path: Path, groups: Collection[str] | None = None) -> PredictorFit:
    """Read a fit; of the arrays only ``groups``, or all.

    Raises:
        ConfigError: no such file.
        CheckpointError: it is damaged, or of another version.
    """
    try:
        with open_npz(path) as file:
            about = json.loads(str(file["about"]))
            if about.get("format") != FORMAT:
                raise CheckpointError(f"{path} is a fit of format {about.get('format')}; {FORMAT} is wanted")
            members: dict[str, Arrays] = {}
            for name in file.files:
                group, *key = name.split("/")
                if key and (groups is None or group in groups):
                    members.setdefault(group, {})[tuple(map(int, key))] = file[name]
            return _checked(path, about, members)
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no fitted predictor {path}; moe-offload fit-predictor makes it"
        ) from error
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is no fitted predictor or is damaged ({error}); remove it and run "
            "moe-offload fit-predictor again"
        ) from error


def _checked(path: Path, about: Mapping[str, Any], groups: dict[str, Arrays]) -> PredictorFit:
    """Return the fit; shapes that contradict the numbers are damage."""
    fit = PredictorFit(
        checkpoint=str(about["checkpoint"]),
        layers=tuple(int(i) for i in about["layers"]),
        num_experts=int(about["num_experts"]),
        top_k=int(about["top_k"]),
        hidden_size=int(about["hidden_size"]),
        depth=int(about["depth"]),
        groups=groups,
        report=dict(about["report"]),
    )
    num_experts, hidden_size = fit.num_experts, fit.hidden_size
    shapes = {
        "popularity": (num_experts,),
        "transition": (num_experts, num_experts),
        "mean_scores": (num_experts + 1, num_experts),
        "hybrid": (hidden_size + 3 * num_experts + 1, num_experts),
        "first": (hidden_size + 2 * num_experts + 1, num_experts),
    }
    for group, shape in shapes.items():
        for key, array in groups.get(group, {}).items():
            if array.shape != shape or not np.isfinite(array).all() or not set(key) <= set(fit.layers):
                raise ValueError(f"{group}/{key} has shape {array.shape}, wanted finite {shape}")
    _check_answers(fit)
    return fit


def _check_answers(fit: PredictorFit) -> None:
    """Raise ValueError where experts' answers do not fit the directions that they are about."""
    directions = fit.by_layer("directions")
    for (layer_idx, later), answers in fit.by_pair("answers").items():
        along = directions.get(layer_idx)
        fits = (
            along is not None
            and along.shape == (answers.shape[1], fit.hidden_size)
            and answers.shape == (fit.num_experts, len(along), fit.num_experts)
            and np.isfinite(along).all()
            and np.isfinite(answers).all()
        )
        if not fits:
            raise ValueError(f"answers/{layer_idx}/{later} and directions/{layer_idx} do not fit")
