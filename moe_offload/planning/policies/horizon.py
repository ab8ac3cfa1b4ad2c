"""Ours: evict what a linear forecast expects to be used least within its horizon.

The forecast of an expert is its discounted future use, ``sum over j >= 0 of gamma ** j * [chosen j + 1
tokens from now]``, linear in what is known when victims are chosen:

- the layer's own history: decayed frequencies of all its experts at several rates, so that experts
  which come and go together vouch for each other;
- what the layers before it chose: for this token, and for the first layers the last ones' choice for the
  token before. Together they say what the text is about just now, which one layer's choice does not.

Coefficients come from a file that horizon_fit.py makes of traces of the same checkpoint, in closed form.
Without one, or for a layer that it does not have, only an expert's own frequencies count, with
coefficients that are the same for every model.

Such a forecast is cheap to keep up to date (csrc/planning/horizon.h): a frequency's contribution decays as
the frequency does, and a choice adds rows of coefficients.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload._native import HorizonCoefficients, HorizonForecast, HorizonTable
from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.npz import open_npz
from moe_offload.planning.policies.table import FloatArray, Ids, Rows, TablePolicy, Weights
from moe_offload.storage.expert_format import ExpertKey
from moe_offload.whole_file import whole_file

Float32Array = NDArray[np.float32]

RATES = (1.0, 0.3, 0.1, 0.03, 0.01)  # of the decayed frequencies; 1.0 is the last choice itself
RESTORED_SHARE = 0.4  # of what an earlier run learned: whole, it is in the way of another topic
# Of an expert's own frequencies, for models without a fit: the same regression with one coefficient per
# rate, on gpt-oss-20b's traces mmlu_dev and tulu3_persona_if.
GENERIC_COEFFICIENTS = (0.06, 0.58, 0.80, 2.22, 2.41)


@dataclass(frozen=True, eq=False)
class HorizonFit:
    """Coefficients for L layers of E experts.

    Attributes:
        own: (L, E, rates, E) what expert i's frequency says of expert j of its layer: ``own[l, i, rate, j]``.
        before: (L, N, E, E) what the choice of i, n + 1 MoE layers before, says of j; the layers before
            the first are the last ones, at the token before.
        constant: (L, E).
        trained_on: digests of the sequences it was made of (trace.sequence_digests).
    """

    layers: tuple[int, ...]
    own: Float32Array
    before: Float32Array
    constant: Float32Array
    trained_on: tuple[str, ...]
    model: str = ""

    def write(self, path: str | Path) -> None:
        """Write an npz of float16 coefficients."""
        notes = {"rates": RATES, "trained_on": self.trained_on, "model": self.model}
        with whole_file(path) as file:
            np.savez_compressed(
                file,
                layers=np.array(self.layers, np.int32),
                own=self.own.astype(np.float16),
                before=self.before.astype(np.float16),
                constant=self.constant.astype(np.float16),
                notes=np.str_(json.dumps(notes)),
            )

    def check(self) -> None:
        """Raise ValueError where the arrays contradict one another."""
        num_layers, num_experts = self.constant.shape
        if (
            len(self.layers) != num_layers
            or self.own.shape != (num_layers, num_experts, len(RATES), num_experts)
            or self.before.shape[2:] != (num_experts, num_experts)
            or len(self.before) != num_layers
        ):
            raise ValueError("the shapes of its arrays contradict one another")
        if not all(np.isfinite(array).all() for array in (self.own, self.before, self.constant)):
            raise ValueError("a coefficient is not finite")


def read_fit(path: str | Path) -> HorizonFit:
    """Read what ``HorizonFit.write`` wrote.

    Raises:
        ConfigError: no such file.
        CheckpointError: it is damaged, or made for other rates.
    """
    if not Path(path).is_file():
        raise ConfigError(
            f"horizon={path}: there is no such file; moe-offload fit-predictor "
            "-o makes one, or bench/fit_horizon.py of traces"
        )
    try:
        with open_npz(Path(path)) as file:
            own, before, constant = (file[name].astype(np.float32) for name in ("own", "before", "constant"))
            layers = tuple(int(layer_idx) for layer_idx in file["layers"])
            notes = json.loads(str(file["notes"]))
        if notes["rates"] != list(RATES):
            raise ValueError(f"it was made for rates {notes['rates']}")
        fit = HorizonFit(layers, own, before, constant, tuple(notes["trained_on"]), str(notes["model"]))
        fit.check()
        return fit
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"horizon={path} is no fitted file or is damaged ({error or type(error).__name__}); remove it "
            "and make it again, by moe-offload fit-predictor or bench/fit_horizon.py"
        ) from error


@dataclass(frozen=True, eq=False)
class _Shared:
    """What the pools of a run, and replays, have in common."""

    coefficients: HorizonCoefficients
    layers: tuple[int, ...]
    trained_on: tuple[str, ...]
    version: str  # another for every file that was written


@lru_cache(maxsize=2)
def _share(path: Path, mtime_ns: int) -> _Shared:
    """Read a version of a file once."""
    fit = read_fit(path)
    coefficients = HorizonCoefficients(fit.own, list(RATES), fit.before, fit.constant)
    return _Shared(coefficients, fit.layers, fit.trained_on, str(mtime_ns))


def _shared_fit(path: Path) -> _Shared:
    return _share(path, path.stat().st_mtime_ns if path.is_file() else 0)


class HorizonPolicy(TablePolicy):
    """Evict the lowest forecast; ``path`` names a file of coefficients.

    Between the layers of one pool forecasts are compared as of each layer's last event. The book-keeping
    of TablePolicy is done natively here: a step's share of it is a few microseconds.
    """

    name = "horizon"

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        fit = None if path is None else _shared_fit(Path(path))
        self.trained_on = fit.trained_on if fit is not None else ()
        self._version = fit.version if fit is not None else ""
        # What the table has not been told of, the evicted first: a crossing costs more than what it does.
        self._evicted: list[ExpertKey] = []
        self._inserted: list[ExpertKey] = []
        self._table = HorizonTable(list(RATES), list(GENERIC_COEFFICIENTS))
        if fit is not None:
            self._table.use_fit(HorizonForecast(fit.coefficients), list(fit.layers))

    def on_route(
        self, layer_idx: int, expert_ids: Sequence[int], expert_weights: Sequence[float] | None
    ) -> None:
        self._table.observe(layer_idx, expert_ids)

    def on_routes(self, steps: list[tuple[int, Sequence[int], Sequence[float] | None]]) -> None:
        """``on_route`` of several steps in one crossing."""
        if type(self).on_route is HorizonPolicy.on_route:
            self._table.observe_steps(steps)
        else:  # a class made of this one sees them, too
            for step in steps:
                self.on_route(*step)

    def on_insert(self, key: ExpertKey) -> None:
        self._inserted.append(key)

    def on_evict(self, key: ExpertKey) -> None:
        if self._inserted:
            self.victims((), 0)  # tells the table, in order
        self._evicted.append(key)

    def victims(self, candidates: Collection[ExpertKey], count: int) -> list[ExpertKey]:
        wanted = min(count, len(candidates))
        lowest: list[ExpertKey] = self._table.lowest(
            self._evicted, self._inserted, wanted, len(candidates), ExpertKey
        )
        return lowest if len(lowest) == wanted else [key for key in lowest if key in candidates][:wanted]

    def observe(self, row: Rows, expert_ids: Ids, weights: Weights) -> None:
        self._table.observe_layers(np.asarray(expert_ids, np.int64))

    def scores(self) -> FloatArray:
        return self._table.forecasts().astype(np.float64)

    def reach(self, layer_idx: int, expert_id: int) -> int:
        self._table.reach(layer_idx, expert_id)
        return self._table.layers().index(layer_idx)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return what it has learned of the text so far, for ``restore`` in a later run."""
        layers = np.array(self._table.layers(), np.int64)
        return {"layers": layers, "parts": self._table.parts(), "fit": np.array(self._version)}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Begin with a share of ``state()`` of a policy of the same name; before any other call.

        With another fit than this one's it means nothing, and the policy begins anew: a fit made since.

        Raises:
            ValueError: the arrays contradict one another.
            KeyError: one is missing.
        """
        if str(state.get("fit", "")) != self._version:
            return
        if not np.isfinite(state["parts"]).all():
            raise ValueError("a forecast is not finite")
        parts = RESTORED_SHARE * state["parts"].astype(np.float32)
        self._table.set_parts(state["layers"].tolist(), parts)
