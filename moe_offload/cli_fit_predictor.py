"""`moe-offload fit-predictor`: record a text's routing, fit predictors and eviction policy, keep both."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_offload import cli_session
from moe_offload.config import gib
from moe_offload.errors import ConfigError
from moe_offload.terminal import Progress
from moe_offload.whole_file import why_not

if TYPE_CHECKING:
    from moe_offload.predictors.fit import Fitter, Recording
    from moe_offload.predictors.fit_file import PredictorFit

HELD_OUT_SHARE = 0.15
HELD_OUT_TOKENS = 3000
MEMORY_SHARE = 0.3  # of what the machine has free, for a recording


def run(args: argparse.Namespace) -> int:
    """Fit, report on held-out documents, write; return 0."""
    _check(args)
    cli_session.import_libraries()
    from moe_offload.predictors import fit_file
    from moe_offload.residency.policy_fit import policy_fit_path
    from moe_offload.runtime import fit_recording
    from moe_offload.runtime.predictor_choice import fit_path
    from moe_offload.storage.checkpoint_key import checkpoint_key

    documents = fit_recording.read_documents(args.text)
    fitted, held_out = fit_recording.split_documents(documents, HELD_OUT_SHARE, args.seed)
    checkpoint = cli_session.open_with_experts(args, "fit")
    output = args.output or fit_path(checkpoint)
    policy_output = args.output.with_suffix(".horizon.npz") if args.output else policy_fit_path(checkpoint)
    for place in (output, policy_output):
        _make_room(place)
    args.prefetch, args.no_warm_start, args.context = False, True, fit_recording.WINDOW_TOKENS
    tokenizer = cli_session.load_tokenizer(args)
    with cli_session.loaded_model(args, tokenizer) as loaded:
        model = loaded.model
        recordings = [
            _record(model, tokenizer, texts, count, label)
            for texts, count, label in (
                (fitted, _affordable(model, args.tokens), "recording"),
                (held_out, min(HELD_OUT_TOKENS, args.tokens), "recording held-out text"),
            )
        ]
        fitter = make_fitter(model, recordings[0], args.depth, checkpoint_key(checkpoint))
        _fit(fitter, network=not args.no_network)
        layouts = checkpoint.experts.layouts.values()
        expert_bytes = sum(layout.expert_bytes for layout in layouts) / len(layouts)
        report(model, fitter.fit, recordings[1], expert_bytes)
    fit_file.write_fit(output, fitter.fit)
    _print(fitter.fit, output)
    fitted_on, held_out_on = recordings
    num_experts, automatic = fitter.fit.num_experts, args.output is None
    _fit_policy(fitted_on, held_out_on, num_experts, policy_output, automatic=automatic)
    return 0


def _fit_policy(
    recording: Recording, held_out: Recording, num_experts: int, path: Path, *, automatic: bool
) -> None:
    """Fit horizon, print what it finds at a quarter of the experts, and keep it where it helps."""
    from moe_offload.runtime.policy_fitting import fit_policy, keep_if_better

    with Progress("fitting the eviction policy", sys.stderr, lambda done: f"{done:.0f} layers") as progress:
        fit = fit_policy(recording, num_experts, progress.update)
    report = keep_if_better(fit, held_out, num_experts, path)
    print(f"\nhit rates with {report.residents} of {num_experts} experts a layer resident, from cold")
    for name, rate in report.hit_rates.items():
        closed = report.closed(name)
        way = "" if closed is None else f"{closed:6.0%} of the way from lru to belady"
        print(f"{name:18} {rate:7.3f} {way}")
    if report.is_better:
        use = "used from now on" if automatic else f"use it by --policy horizon={path}"
        print(f"{path}: {gib(path.stat().st_size)}; {use}")
    else:
        print("the fitted policy finds no more than the general one, and is not kept")


def make_fitter(model: Any, recording: Recording, depth: int, key: str) -> Fitter:
    """Return the fitter of a loaded model's routers."""
    from moe_offload.errors import CheckpointError
    from moe_offload.predictors.fit import Fitter
    from moe_offload.runtime import skeleton
    from moe_offload.runtime.predictor_inputs import norms_of

    routers = {layer_idx: skeleton.router_of(model, layer_idx) for layer_idx in recording.layers}
    try:
        norms = norms_of(model, list(recording.layers))
    except CheckpointError:
        norms = {}
    return Fitter(recording, routers, norms, depth=depth, checkpoint=key)


def report(model: Any, fit: PredictorFit, held_out: Recording, expert_bytes: float) -> None:
    """Measure the gate and the fitted predictors on held-out text; put it into ``fit.report``."""
    from moe_offload.planning.predictor_worth import best_predictor
    from moe_offload.predictors.evaluate import evaluate, summarize
    from moe_offload.runtime.predictor_choice import PredictorChoice
    from moe_offload.runtime.predictor_making import make_predictor

    results = {}
    for name in ("cross_layer_gate", "hybrid", *(["learned"] if fit.groups.get("network") else [])):
        predictor = make_predictor(PredictorChoice(name, fit), model, list(fit.layers), depth=fit.depth)
        assert predictor is not None
        with Progress(f"measuring {name}", sys.stderr, lambda tokens: f"{tokens:.0f} tok") as progress:
            evaluation = evaluate(predictor, held_out, fit.num_experts, progress.update)
        results[name] = summarize(evaluation, fit.top_k, expert_bytes, fit.depth)
    fit.report["held_out"] = {"tokens": held_out.num_tokens, "expert_bytes": expert_bytes, **results}
    fit.report["best"] = best_predictor(fit.report["held_out"], fit.top_k, ("hybrid", "learned"))


def _check(args: argparse.Namespace) -> None:
    if not 1 <= args.depth <= 4:
        raise ConfigError(f"--depth {args.depth}: from 1 to 4 layers ahead can be fitted")
    if args.tokens < 1000:
        raise ConfigError(f"--tokens {args.tokens}: at least 1000 are needed; 30000 is a good number")
    cli_session.check_output("-o", args.output, ".npz")


def _make_room(place: Path) -> None:
    """Refuse a place that cannot be written to, before minutes of work and not after."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        reason = why_not(place)
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
    if reason:
        raise ConfigError(f"{place} {reason}; set XDG_CACHE_HOME to another folder or pass -o")


def _affordable(model: Any, tokens: int) -> int:
    """Return how many of ``tokens`` a recording may have in the memory that is free; say if fewer."""
    from moe_offload.residency.memory import available_bytes
    from moe_offload.runtime.fit_recording import recording_bytes_per_token

    spec = model.offload.spec
    per_token = recording_bytes_per_token(len(spec.moe_layers), spec.hidden_size, spec.top_k)
    most = int(MEMORY_SHARE * available_bytes() / per_token)
    if most < tokens:
        print(
            f"moe-offload: note: {tokens} tokens would take {gib(per_token * tokens)}; {most} are recorded",
            file=sys.stderr,
        )
    return min(tokens, most)


def _record(model: Any, tokenizer: Any, documents: list[str], tokens: int, label: str) -> Recording:
    from moe_offload.runtime.fit_recording import record

    with Progress(label, sys.stderr, lambda done: f"{done:.0f} tok") as progress:
        return record(model, tokenizer, documents, tokens, on_progress=progress.update)


def _fit(fitter: Fitter, *, network: bool) -> None:
    with Progress("counting", sys.stderr):
        fitter.counts()
        fitter.gates()
    stages = [("fitting low rank", fitter.low_rank), ("fitting", fitter.hybrid)]
    if network:
        stages.append(("training", fitter.network))
    for label, stage in stages:
        with Progress(label, sys.stderr, lambda done: f"{done:.0f} layers") as progress:
            stage(progress.update)


def _print(fit: PredictorFit, output: Path) -> None:
    """Print one line for each predictor and distance, then where the fit is."""
    from moe_offload.planning.predictor_worth import best_predictor

    held_out = fit.report["held_out"]
    names = [name for name in held_out if isinstance(held_out[name], dict)]
    print(f"held-out text, {held_out['tokens']} tokens; top {fit.top_k} of {fit.num_experts}")
    print(
        f"{'predictor':18} {'ahead':>5} {'recall':>7} {'experts for .97':>16} {'calibration':>12} {'µs':>6}"
    )
    for name in names:
        for ahead, row in held_out[name]["ahead"].items():
            needed = row["guesses_for_recall"]["0.97"]
            cost = f"{held_out[name]['predict_us'][0]:6.0f}" if ahead == "1" else ""
            error = row["calibration_error"]
            print(f"{name:18} {ahead:>5} {row['recall']:7.3f} {needed:16.2f} {error:12.3f} {cost}")
    size = gib(output.stat().st_size)
    print(f"{output}: {size}; the best is {fit.report['best']}")
    automatic = best_predictor(held_out, fit.top_k, ("hybrid", "learned", "cross_layer_gate"))
    if automatic != fit.report["best"]:
        print(f"predictor auto takes {automatic}: guessing better costs more here than it saves")
