"""Make a chosen predictor: its routers the loaded model's, its arrays a fit's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from moe_offload.errors import ConfigError
from moe_offload.planning.prediction import Predictor
from moe_offload.predictors import fit_file, history, learned, residual_gate
from moe_offload.predictors.cross_layer_gate import CrossLayerGate
from moe_offload.predictors.exact import TokenLookahead, token_tables
from moe_offload.predictors.fit_file import PredictorFit
from moe_offload.predictors.fitted import Hybrid, LowRankGate
from moe_offload.runtime import skeleton
from moe_offload.runtime.predictor_choice import GATE_DEPTH, NEEDS_FIT, PredictorChoice
from moe_offload.runtime.predictor_inputs import first_gate_of, norms_of, shared_expert_of


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
    curves = _curves(choice, "cross_layer_gate")
    first_gate = first_gate_of(model, routers[0]) if 0 in routers else None
    embed = model.get_input_embeddings()  # not the model: it lives until nobody but its offload needs it
    return CrossLayerGate(routers, depth=depth, curves=curves, first_gate=first_gate, embed=embed)


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
        embed=model.get_input_embeddings(),
        curves={**fit.curves("hybrid"), **{(-1, later): c for (_, later), c in fit.curves("first").items()}},
        directions=fit.by_layer("directions"),
        answers=fit.by_pair("answers"),
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
