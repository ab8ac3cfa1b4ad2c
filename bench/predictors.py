"""How well do predictors name the next layers' experts, how well calibrated, and what do they cost?

    python bench/predictors.py --text FOLDER [--model M] [--depth 4] [--json-out FILE]

FOLDER holds DOMAIN.txt or DOMAIN.txt.xz, documents separated by lines <|endoftext|>. Predictors are fitted
on some documents and measured on others, by the objects and calls of a run. Recall is the share of the
router's choices among the top_k most probable experts (k+2 and 2k: among more). "for .97" is how many
experts a layer step fetches when a least probability is set so that 97% of the choices are among them:
times an expert's bytes, that is what recall costs. "0 ahead" is the first layer, before any router. "l>0"
leaves out what is forecast from the first layer. The previous token and the oracle are bounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

from card import commit, cpu_name

from moe_offload.terminal import Progress

BOUNDS = ("previous_token", "oracle")
GATE = "cross_layer_gate"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="default: the bundled demo model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=30000, help="to fit on")
    parser.add_argument("--held-out-tokens", type=int, default=4000)
    parser.add_argument("--documents", type=int, default=40, help="of each domain")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--predictors", default="all", help="names, comma between; default all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json-out", type=Path, help="also write the last line to this file")
    args = parser.parse_args()
    card = {"processor": cpu_name(), "cores": len(os.sched_getaffinity(0)), "commit": commit()}
    print("\n".join(f"{name:18} {value}" for name, value in card.items()))

    import moe_offload
    from moe_offload.cli_fit_predictor import make_fitter
    from moe_offload.runtime import fit_recording
    from moe_offload.storage.checkpoint import open_checkpoint

    if args.json_out is not None:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
    fitted, held_out = fit_recording.split_documents(documents(args), 0.25, args.seed)
    tokenizer = moe_offload.load_tokenizer(args.model)
    model = moe_offload.from_pretrained(args.model, experts="all", predictor="none", context=512)
    layouts = open_checkpoint(args.model or moe_offload.config.DEMO_MODEL).experts.layouts.values()
    expert_bytes = sum(layout.expert_bytes for layout in layouts) / len(layouts)
    recordings = []
    for texts, count, label in ((fitted, args.tokens, "fit"), (held_out, args.held_out_tokens, "held out")):
        started = time.perf_counter()
        with Progress(f"recording to {label}", sys.stderr, lambda done: f"{done:.0f} tok") as progress:
            recordings.append(
                fit_recording.record(
                    model, tokenizer, texts, count, seed=args.seed, on_progress=progress.update
                )
            )
        print(f"{label:18} {recordings[-1].num_tokens} tokens, {time.perf_counter() - started:.0f} s")
    fitter = make_fitter(model, recordings[0], args.depth, "bench")
    seconds = fit(fitter, args.predictors)
    print(f"{'fitted in':18} {', '.join(f'{name} {s:.1f} s' for name, s in seconds.items())}")
    results = measure(model, fitter.fit, recordings[1], expert_bytes, args)
    table(results, args.depth)
    by_layer(results, args.depth)
    verdict(results)
    line = json.dumps(
        {
            "card": card,
            "model": model.offload.spec.model_type if args.model is None else args.model.name,
            "tokens": {"fit": recordings[0].num_tokens, "held_out": recordings[1].num_tokens},
            "seed": args.seed,
            "top_k": fitter.fit.top_k,
            "num_experts": fitter.fit.num_experts,
            "expert_bytes": expert_bytes,
            "fit_s": seconds,
            "results": results,
        }
    )
    if args.json_out is not None:
        args.json_out.write_text(line + "\n", encoding="utf-8")
    print(line)


def documents(args: argparse.Namespace) -> list[str]:
    """Return as many documents of every domain, at random."""
    from moe_offload.runtime.fit_recording import read_documents

    paths = [path for pattern in ("*.txt", "*.txt.xz") for path in sorted(args.text.glob(pattern))]
    if not paths:
        sys.exit(f"{args.text} holds no .txt and no .txt.xz")
    chosen = []
    for path in paths:
        found = read_documents([path])
        random.Random(args.seed).shuffle(found)
        chosen += found[: args.documents]
    return chosen


def fit(fitter, wanted: str) -> dict[str, float]:
    """Fit what is wanted; return the seconds of each stage."""
    stages = ["counts", "gates", "low_rank", "hybrid", "network"]
    if wanted != "all":
        needless = {"low_rank": "low_rank_gate", "network": "learned"}
        stages = [name for name in stages if needless.get(name, "") in f"{wanted},"]
    seconds = {}
    for name in stages:
        started = time.perf_counter()
        with Progress(f"fitting {name}", sys.stderr):
            getattr(fitter, name)()
        seconds[name] = time.perf_counter() - started
    return seconds


def measure(model, fit, recording, expert_bytes: float, args: argparse.Namespace) -> dict[str, dict]:
    """Return each predictor's summary; one that the model has no part for gives its reason."""
    from moe_offload.errors import CheckpointError, ConfigError
    from moe_offload.predictors.evaluate import evaluate, summarize
    from moe_offload.predictors.exact import Oracle
    from moe_offload.runtime.predictor_choice import GROUPS, PredictorChoice
    from moe_offload.runtime.predictor_making import make_predictor

    wanted = [*GROUPS, "oracle"] if args.predictors == "all" else args.predictors.split(",")
    layers, results = list(fit.layers), {}
    for name in wanted:
        try:
            if name == "oracle":
                predictor = Oracle(layers, recording.experts, fit.num_experts, depth=args.depth)
            else:
                predictor = make_predictor(PredictorChoice(name, fit), model, layers, depth=args.depth)
        except (ConfigError, CheckpointError) as error:
            results[name] = {"left_out": str(error)}
            continue
        with Progress(f"measuring {name}", sys.stderr, lambda tokens: f"{tokens:.0f} tok") as progress:
            evaluation = evaluate(predictor, recording, fit.num_experts, progress.update)
        results[name] = summarize(evaluation, fit.top_k, expert_bytes, args.depth)
        results[name]["reliability"] = evaluation.reliability(1)
    return results


def table(results: dict[str, dict], depth: int) -> None:
    """Print recall, over-fetch, calibration and cost, one block for each distance."""
    heads = ("recall", "l>0", "k+2", "2k", "for .97", "MB", "calibration", "µs")
    for ahead in map(str, range(depth + 1)):
        print(f"\n{ahead + ' ahead':26}" + "".join(f"{head:>12}" for head in heads))
        for name, result in results.items():
            if ahead in result.get("ahead", {}):
                row, cost = result["ahead"][ahead], result["predict_us"]
                cells = (
                    row["recall"],
                    None if ahead == "0" else row["recall_beyond_layer_0"],
                    row["recall_plus_2"],
                    row["recall_double"],
                    row["guesses_for_recall"]["0.97"],
                    row["bytes_for_recall"]["0.97"] / 1e6,
                    row["calibration_error"],
                    None if cost is None else cost[0],
                )
                label = name + (" (bound)" if name in BOUNDS else "")
                print(f"{label:26}" + "".join(f"{'' if c is None else format(c, '.3f'):>12}" for c in cells))
    for result in results.values():
        if "left_out" in result:
            print(f"left out: {result['left_out']}")


def by_layer(results: dict[str, dict], depth: int) -> None:
    """Print recall by forecast layer for the gate and the best."""
    for name in (GATE, best_of(results)):
        for ahead in map(str, range(1, depth + 1)):
            if ahead in results.get(name, {}).get("ahead", {}):
                recalls = results[name]["ahead"][ahead]["recall_by_layer"].values()
                print(f"{name:18} {ahead} ahead by layer: {' '.join(f'{recall:.2f}' for recall in recalls)}")


def best_of(results: dict[str, dict]) -> str:
    """Return the predictor of the highest recall one layer ahead, the oracle apart."""
    recall = {
        name: result["ahead"]["1"]["recall"]
        for name, result in results.items()
        if name != "oracle" and "1" in result.get("ahead", {})
    }
    return max(recall, key=recall.__getitem__)


def verdict(results: dict[str, dict]) -> None:
    """Print which share of the gap between gate reuse and 1 the best closes, and its bytes for 0.97."""
    best = best_of(results)
    if GATE not in results:
        return
    for ahead, gate in results[GATE]["ahead"].items():
        ours = results[best]["ahead"][ahead]
        closed = (ours["recall"] - gate["recall"]) / (1.0 - gate["recall"])
        bytes_ours, bytes_gate = ours["bytes_for_recall"]["0.97"], gate["bytes_for_recall"]["0.97"]
        results[best].setdefault("gap_closed", {})[ahead] = closed
        print(
            f"{best}, {ahead} ahead: closes {closed:.1%} of the gap between gate reuse and 1; recall 0.97 "
            f"takes {bytes_ours / bytes_gate:.0%} of the bytes"
        )


if __name__ == "__main__":
    main()
