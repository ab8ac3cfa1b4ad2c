"""From a predictor's name to the object: what it needs of the model, and of a fit made earlier.

``choose_predictor`` runs before the budget is divided, so that a fit's arrays are in the process when its
memory is measured; ``make_predictor`` runs when the routers have their weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.planning.prediction import Predictor
from moe_offload.planning.predictor_worth import best_predictor
from moe_offload.predictors import fit_file, history, learned, residual_gate
from moe_offload.predictors.cross_layer_gate import CrossLayerGate
from moe_offload.predictors.exact import TokenLookahead, token_tables
from moe_offload.predictors.fit_file import PredictorFit
from moe_offload.predictors.fitted import Hybrid, LowRankGate
from moe_offload.runtime import skeleton
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.checkpoint_key import cache_folder, checkpoint_key

GATE_DEPTH = 2  # at most: the prefetcher looks as far as reading takes
NORM_NAMES = ("post_attention_layernorm", "ffn_norm", "pre_feedforward_layernorm")
SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp")

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
    "hybrid": ("hybrid", "first", "curve.hybrid", "curve.first"),
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


def choose_predictor(name: str, checkpoint: Checkpoint) -> PredictorChoice:
    """Resolve "auto", "fitted" and "NAME=FILE"; read what the predictor needs of a fit.

    "auto" is what saves most by the report of this checkpoint's fit, its own cost taken off (the gate
    may be that), and the cross-layer gate where there is no fit. "fitted" insists on a fitted one.

    Raises:
        ConfigError: no such predictor, or it needs a fit and there is none.
        CheckpointError: the fit is damaged.
    """
    base, _, file = name.partition("=")
    if ":" in base or base == "none":
        return PredictorChoice(name)
    if base not in NAMES:
        known = ", ".join(NAMES)
        raise ConfigError(f'predictor={name!r} is unknown; known are {known}, or "package.module:Class"')
    path = Path(file) if file else fit_path(checkpoint)
    if base in ("auto", "fitted"):
        base = _best(path, required=base == "fitted" or bool(file))
    groups = GROUPS[base]
    if base not in NEEDS_FIT and not path.is_file():
        return PredictorChoice(base)
    fit = fit_file.read_fit(path, {*groups, f"curve.{base}", "stay"})
    if fit.checkpoint != checkpoint_key(checkpoint):
        raise ConfigError(f"{path} was fitted to {fit.checkpoint}, not to {checkpoint.path}")
    return PredictorChoice(base, fit)


def _best(path: Path, *, required: bool) -> str:
    """Return what saves most by the fit's report; without a fit the gate, unless one is required."""
    if not path.is_file() and not required:
        return "cross_layer_gate"
    fit = fit_file.read_fit(path, ())
    names = FITTED if required else (*FITTED, "cross_layer_gate")
    best = best_predictor(fit.report.get("held_out", {}), fit.top_k, names) or "hybrid"
    if best == "learned" and not learned.is_available():
        print(
            "moe-offload: note: onnxruntime is not installed, so the fit's linear predictor is used; "
            "pip install 'moe_offload[learned]' for its network",
            file=sys.stderr,
        )
        return "hybrid"
    return best


def make_predictor(
    choice: PredictorChoice, model: Any, layers: list[int], *, depth: int | None = None
) -> Predictor | None:
    """Return the predictor, its routers the model's; None for "none".

    Args:
        layers: decoder indices of the MoE layers.
        depth: layers ahead; None: as far as the fit reaches, or GATE_DEPTH.

    Raises:
        ConfigError: the model has not what the predictor needs.
        CheckpointError: a router that cannot be asked from outside.
    """
    if choice.name == "none":
        return None
    if depth is None:
        depth = choice.fit.depth if choice.fit is not None and choice.name in NEEDS_FIT else GATE_DEPTH
    tables = token_tables({i: module for i in layers for module in _routers_in(model, i)})
    layers = [layer_idx for layer_idx in layers if layer_idx not in tables]
    routers = {layer_idx: skeleton.router_of(model, layer_idx) for layer_idx in layers}
    predictor: Predictor = _MAKERS.get(choice.name, _imported)(choice, model, routers, depth)
    if not tables:
        return predictor
    num_experts = next(iter(routers.values())).weight.shape[0] if routers else _largest_id(tables) + 1
    exact: Predictor = TokenLookahead(tables, num_experts, predictor)
    return exact


def _routers_in(model: Any, layer_idx: int) -> list[nn.Module]:
    layer = skeleton.decoder_layers(model)[layer_idx]
    return [module for module in layer.modules() if hasattr(module, "tid2eid")]


def _largest_id(tables: Mapping[int, Any]) -> int:
    return max(int(table.max()) for table in tables.values())


Routers = dict[int, Any]


def _gate(choice: PredictorChoice, model: Any, routers: Routers, depth: int) -> Any:
    return CrossLayerGate(routers, depth=depth, curves=_curves(choice, "cross_layer_gate"))


def _imported(choice: PredictorChoice, model: Any, routers: Routers, depth: int) -> Any:
    """Return the class at an import path, called as CrossLayerGate is."""
    module_name, _, class_name = choice.name.partition(":")
    try:
        predictor = getattr(import_module(module_name), class_name)(routers, depth=depth)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"predictor={choice.name!r} cannot be made: {error}") from error
    missing = [
        method
        for method in ("new_sequence", "begin_step", "observe", "predict")
        if not callable(getattr(predictor, method, None))
    ]
    if missing:
        raise ConfigError(f"predictor={choice.name!r} has no {', '.join(missing)}")
    return predictor


def _frequency(choice: PredictorChoice, model: Any, routers: Routers, depth: int) -> Any:
    return history.Frequency(list(routers), _num_experts(routers), depth=depth)


def _previous_token(choice: PredictorChoice, model: Any, routers: Routers, depth: int) -> Any:
    stay = {} if choice.fit is None else {i: float(a[0]) for i, a in choice.fit.by_layer("stay").items()}
    top_k = residual_gate.RouterScores(next(iter(routers.values()))).top_k
    return history.PreviousToken(list(routers), _num_experts(routers), top_k=top_k, depth=depth, stay=stay)


def _static(choice: PredictorChoice, model: Any, routers: Routers, depth: int) -> Any:
    return history.Static(_fit(choice).by_layer("popularity"), depth=depth)


def _transition(choice: PredictorChoice, model: Any, routers: Routers, depth: int) -> Any:
    tables = _fit(choice).by_pair("transition")
    return history.Transition(list(routers), _num_experts(routers), tables, depth=depth)


def _residual(choice: PredictorChoice, model: Any, routers: Routers, depth: int) -> Any:
    curves = _curves(choice, "residual_gate")
    return residual_gate.ResidualGate(routers, norms_of(model, list(routers)), depth=depth, curves=curves)


def _shared_expert(choice: PredictorChoice, model: Any, routers: Routers, depth: int) -> Any:
    sizes = {i: float(array[0]) for i, array in _fit(choice).by_layer("residual_rms").items()}
    if set(routers) - set(sizes):
        raise ConfigError("predictor='shared_expert_gate': the fit has no size of the residual; fit again")
    return residual_gate.SharedExpertGate(
        routers,
        norms_of(model, list(routers)),
        depth=depth,
        curves=_curves(choice, "residual_gate"),
        shared_experts={i: shared_expert_of(model, i) for i in routers},
        residual_rms=sizes,
    )


def _mean_output(choice: PredictorChoice, model: Any, routers: Routers, depth: int) -> Any:
    return residual_gate.MeanOutputGate(
        routers,
        norms_of(model, list(routers)),
        depth=depth,
        curves=_curves(choice, "mean_output_gate"),
        mean_scores=_fit(choice).by_pair("mean_scores"),
    )


def _low_rank(choice: PredictorChoice, model: Any, routers: Routers, depth: int) -> Any:
    fit = _fit(choice)
    down, up, shift = (fit.by_pair(f"low_rank.{part}") for part in ("down", "up", "shift"))
    maps = {pair: (down[pair], up[pair], shift[pair]) for pair in down}
    return LowRankGate(routers, maps, depth=depth, curves=_curves(choice, "low_rank_gate"))


def _hybrid(choice: PredictorChoice, model: Any, routers: Routers, depth: int) -> Any:
    fit = _fit(choice)
    return Hybrid(
        list(routers),
        fit.num_experts,
        fit.hidden_size,
        fit.by_pair("hybrid"),
        top_k=fit.top_k,
        depth=depth,
        first_tables=fit.by_layer("first"),
        embed=partial(embed, model),
        curves={**fit.curves("hybrid"), **{(-1, later): c for (_, later), c in fit.curves("first").items()}},
    )


def _learned(choice: PredictorChoice, model: Any, routers: Routers, depth: int) -> Any:
    fit = _fit(choice)
    graphs = {i: array.tobytes() for i, array in fit.by_layer("network").items()}
    if not graphs:
        raise ConfigError("predictor='learned': the fit was made without a network; run fit-predictor again")
    if depth != fit.depth:
        raise ConfigError(f"predictor='learned' was fitted for {fit.depth} layers ahead, not for {depth}")
    return learned.Learned(
        list(routers),
        fit.num_experts,
        fit.hidden_size,
        graphs,
        top_k=fit.top_k,
        depth=depth,
        first=_hybrid(choice, model, routers, depth),
        curves=fit.curves("learned"),
    )


_MAKERS: dict[str, Callable[[PredictorChoice, Any, Routers, int], Any]] = {
    "cross_layer_gate": _gate,
    "frequency": _frequency,
    "previous_token": _previous_token,
    "static": _static,
    "transition": _transition,
    "residual_gate": _residual,
    "shared_expert_gate": _shared_expert,
    "mean_output_gate": _mean_output,
    "low_rank_gate": _low_rank,
    "hybrid": _hybrid,
    "learned": _learned,
}


def _fit(choice: PredictorChoice) -> PredictorFit:
    assert choice.fit is not None, f"{choice.name} was chosen without its fit"
    return choice.fit


def _curves(choice: PredictorChoice, name: str) -> dict[fit_file.Pair, Any]:
    return {} if choice.fit is None else choice.fit.curves(name)


def _num_experts(routers: Routers) -> int:
    return int(next(iter(routers.values())).weight.shape[0])


# What predictors need of a transformers model.


def norms_of(model: Any, layers: list[int]) -> dict[int, nn.Module]:
    """Return the norm before the router of each layer.

    Raises:
        CheckpointError: a layer has none by a name that is known.
    """
    norms = {}
    for layer_idx in layers:
        layer = skeleton.decoder_layers(model)[layer_idx]
        found = [getattr(layer, name) for name in NORM_NAMES if hasattr(layer, name)]
        if len(found) != 1:
            raise CheckpointError(
                f"layer {layer_idx} has {len(found)} norms that may stand before its router; choose another "
                "predictor"
            )
        norms[layer_idx] = found[0]
    return norms


def shared_expert_of(model: Any, layer_idx: int) -> Callable[[Tensor], Tensor]:
    """Return the shared expert of a layer as a function of the router's input.

    Raises:
        ConfigError: the layer has none.
    """
    for module in skeleton.decoder_layers(model)[layer_idx].modules():
        for name in SHARED_NAMES:
            shared = getattr(module, name, None)
            if isinstance(shared, nn.Module):
                return partial(_run_shared, shared, getattr(module, "shared_expert_gate", None))
    raise ConfigError(f"predictor='shared_expert_gate': layer {layer_idx} has no shared expert")


def _run_shared(shared: nn.Module, gate: nn.Module | None, router_input: Tensor) -> Tensor:
    output: Tensor = shared(router_input)
    return output if gate is None else torch.sigmoid(gate(router_input)) * output


@torch.no_grad()
def embed(model: Any, token_ids: Tensor) -> Tensor:
    """Return the model's (T, H) embeddings of (T,) token ids."""
    embeddings: Tensor = model.get_input_embeddings()(token_ids)
    return embeddings
