"""Does reading predicted experts early pay, and how much of what could be gained is gained?

    python bench/prefetch.py [--model PATH] [--shares 12%,25%,50%] [--tokens 64] [--rounds 9] [--delay-s S]

Runs the real runtime with experts on disk. Every mode generates the same greedy tokens; within a round the
modes take turns in an order that changes from round to round, so that a busy machine slows all of them:

    none      experts are read when they are needed
    fate      the next layer's router on this layer's input, its top_k, always; chances are corrected by
              what came true, as ours' are, so that it is a little better than the rule alone
    history   what the token before chose in that layer, with ours' admission
    ours      the runtime's default: best predictor, admission, threshold on waste, off where it does not pay
    always    ours without its switch
    perfect   the routes that an earlier identical run recorded

A token's stall is what decoding waits for reads, prompts left out.
"recovered" is the share of the stall that perfect prediction removes. Intervals are of a paired bootstrap
over rounds. ``--delay-s`` makes every read of the real reader that much slower: a simulated slower disk, and
labelled so. Prints a card, a table, and one last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from card import commit, cpu_name
from energy import PhaseEnergy, measured_energy, per_token_text
from numpy.typing import NDArray

PROMPT = "The history of the city begins with a small harbour at the mouth of the river, where"
MODES = ("none", "fate", "history", "ours", "always", "perfect")
PROMPT_TOKENS = 32  # of --ascending
PERFECT_DEPTH = 4  # layers ahead
RESAMPLES = 10_000


def main() -> None:
    args = parse_args()

    import moe_offload

    results, energy = [], measured_energy()
    for share in args.shares.split(","):
        model = moe_offload.from_pretrained(
            args.model,
            experts=share,
            ram=args.ram,
            context=256 + args.tokens,
            policy=args.policy,
            predictor=args.predictor,
            warm_start=False,
        )
        inputs = prompt_of(args, model)
        if args.delay_s:
            model.offload.reader.inject("delay", delay_s=args.delay_s)
        results.append({"experts": share, **compare(model, inputs, args, energy)})
        model.offload.close()
    report(results, args, energy.meter.describe())
    energy.meter.close()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="Hugging Face folder or GGUF file; default: the bundled demo model")
    parser.add_argument("--shares", default="12%,25%,50%", help="experts in memory")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a run")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--policy", default="horizon")
    parser.add_argument("--predictor", default="auto", help="of ours")
    parser.add_argument(
        "--ascending",
        action="store_true",
        help="feed ids 0, 1, 2...: what make_synthetic.py --routing expects",
    )
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--ram", default="auto")
    parser.add_argument("--delay-s", type=float, default=0.0, help="added to every read: a simulated disk")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser.parse_args()


def prompt_of(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Return the prompt's ids; with --ascending all the ids, for none is chosen by the model."""
    import torch

    import moe_offload

    if args.ascending:
        return {"input_ids": torch.arange(PROMPT_TOKENS + args.tokens)[None], "forced": True}
    tokenizer = moe_offload.load_tokenizer(args.model)
    return {"input_ids": tokenizer(args.prompt, return_tensors="pt")["input_ids"]}


class Recorded:
    """The oracle: forecasts what an earlier identical run recorded, 1.0 or 0.0."""

    def __init__(
        self, experts: NDArray[Any], layers: Sequence[int], num_experts: int, passes: list[int]
    ) -> None:
        """``experts`` (T, L, K) of all passes, ``passes`` their lengths in tokens."""
        self._layers, self._position = list(layers), {layer: i for i, layer in enumerate(layers)}
        self._used = np.zeros((len(passes), len(layers), num_experts), np.float32)
        start = 0
        for number, length in enumerate(passes):
            for token in experts[start : start + length]:
                self._used[number, np.arange(len(layers))[:, None], token] = 1.0
            start += length
        self._pass = -1
        self.one_token = self  # answers as predictors/one_token.py does

    def new_sequence(self) -> None:
        self._pass = -1

    def first_input(self, token_ids: Any) -> Any:
        """Tell the next pass; of a tensor nothing is wanted but an address."""
        import torch

        self._pass += 1
        return torch.empty(0)

    def begin_step(self, token_ids: Any) -> list[Any]:
        self._pass += 1
        return self._ahead(-1)

    def observe(self, layer_idx: int, expert_ids: Any, expert_weights: Any) -> None:
        """It knows already."""

    def predict(self, layer_idx: int, *known: Any) -> list[Any]:
        return self._ahead(self._position[layer_idx])

    def likely(self, layer_idx: int, *known: Any) -> list[tuple[int, int, int, float]]:
        """Return the routes of the next layers, -1: of the first ones."""
        position = -1 if layer_idx < 0 else self._position[layer_idx]
        return [
            (windows, forecast.layer_idx, expert_id, 1.0)
            for windows, forecast in enumerate(self._ahead(position), start=1)
            for expert_id in np.flatnonzero(forecast.probabilities).tolist()
        ]

    def _ahead(self, position: int) -> list[Any]:
        """Return the next layers' routes; after the last layer come the next token's."""
        from moe_offload.planning.prediction import Forecast

        forecasts, count = [], len(self._layers)
        for ahead in range(1, PERFECT_DEPTH + 1):
            passes, layer = divmod(position + ahead, count)
            if self._pass + passes < len(self._used):
                forecasts.append(Forecast(self._layers[layer], self._used[self._pass + passes, layer]))
        return forecasts


class Fixed:
    """A threshold that stays where it is."""

    value = 0.5

    def skip(self, *known: Any) -> None:
        """Nothing is counted."""

    def update(self, *known: Any, **named: Any) -> None:
        """Nothing moves it."""


def compare(
    model: Any, inputs: dict[str, Any], args: argparse.Namespace, energy: PhaseEnergy
) -> dict[str, Any]:
    """Run all modes by turns; return each one's runs and what follows from them."""
    settings = settings_of(model, inputs, args, energy)
    names = [name for name in args.modes.split(",") if name in settings]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    texts = set()
    for number in range(args.warm_up + args.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            settings[name]()
            tokens, run = measure(model, inputs, args.tokens, energy)
            texts.add(tokens)
            if number >= args.warm_up:
                runs[name].append(run)
    assert len(texts) == 1, "prefetch changed a token"
    return {"modes": {name: figures(name, runs, args.seed) for name in names}, "runs": runs}


def settings_of(
    model: Any, inputs: dict[str, Any], args: argparse.Namespace, energy: PhaseEnergy
) -> dict[str, Callable[[], None]]:
    """Return for each mode what sets the model's prefetcher to it, with the mode's own state."""
    from moe_offload.planning.gain_switch import LEFT_BY_PREFETCH, GainSwitch
    from moe_offload.planning.prefetch_plan import Threshold
    from moe_offload.predictors.cross_layer_gate import CrossLayerGate
    from moe_offload.runtime import skeleton
    from moe_offload.runtime.predictor_choice import PredictorChoice
    from moe_offload.runtime.predictor_making import make_predictor

    prefetcher = model.offload.prefetcher
    link, default = prefetcher.link, prefetcher._predictor
    layers = sorted(skeleton.experts_modules(model))
    routers = {i: skeleton.router_of(model, i) for i in layers}
    history = make_predictor(PredictorChoice("previous_token"), model, layers)

    def setting(predictor: Any, **kwargs: Any) -> Callable[[], None]:
        def apply() -> None:
            prefetcher.use(predictor, **kwargs)
            if predictor is not None:
                predictor.new_sequence()

        return apply

    with model.offload.trace() as recorder:
        prefetcher.use(None, switch=None)
        generate(model, inputs, args.tokens, energy)
    trace = recorder.trace()
    perfect = Recorded(trace.experts, trace.layers, trace.num_experts, trace.step_tokens.tolist())
    settings = {
        "none": setting(None, switch=None),
        "fate": setting(CrossLayerGate(routers), switch=None, threshold=Fixed()),
        "history": setting(history, switch=None, threshold=Threshold(), link=link),
        "ours": setting(
            default, switch=GainSwitch(left_over=LEFT_BY_PREFETCH), threshold=Threshold(), link=link
        ),
        "always": setting(default, switch=None, threshold=Threshold(), link=link),
        "perfect": setting(perfect, switch=None, threshold=Fixed(), link=link),
    }
    return settings


def feed(model: Any, input_ids: Any, num_tokens: int, energy: PhaseEnergy) -> tuple[int, ...]:
    """Decode the last ``num_tokens`` of ``input_ids`` one by one; return what the model would have said."""
    import torch

    cache = model.offload.new_cache(input_ids.shape[1])
    said: list[int] = []
    with torch.no_grad():
        model(input_ids=input_ids[:, :-num_tokens], past_key_values=cache, use_cache=True)
        energy(input_ids, None)
        for position in range(input_ids.shape[1] - num_tokens, input_ids.shape[1]):
            token = input_ids[:, position : position + 1]
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            said.append(int(out.logits[0, -1].argmax()))
            energy(input_ids, None)
    return tuple(said)


def generate(model: Any, inputs: dict[str, Any], num_tokens: int, energy: PhaseEnergy) -> tuple[int, ...]:
    if "forced" in inputs:
        return feed(model, inputs["input_ids"], num_tokens, energy)
    out = model.generate(
        **inputs,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        logits_processor=[energy],
    )
    return tuple(out[0].tolist())


def measure(
    model: Any, inputs: dict[str, Any], num_tokens: int, energy: PhaseEnergy
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Generate once; return the tokens and the decode part of the counters, joules per token of both."""
    before = model.offload.stats().as_dict()
    energy.begin()
    tokens = generate(model, inputs, num_tokens, energy)
    prompt_tokens = inputs["input_ids"].shape[1] - (num_tokens if "forced" in inputs else 0)
    joules = energy.per_token(prompt_tokens)
    after = model.offload.stats().as_dict()
    delta = {name: after[name] - before[name] for name in before if not isinstance(before[name], str)}
    steps = delta["decode_steps"]
    needs = delta["hits"] + delta["prefetch_hits"] + delta["misses"]
    used = delta["prefetch_useful_bytes"] + delta["prefetch_late_bytes"]
    wasted = delta["prefetch_wasted_bytes"]
    return tokens, {
        "tokens_per_s": steps / delta["decode_s"],
        "stall_s": (delta["stall_s"] - delta["prefill_stall_s"]) / steps,
        "resident_rate": delta["hits"] / needs,
        "useful_bytes": delta["prefetch_useful_bytes"] / steps,
        "late_bytes": delta["prefetch_late_bytes"] / steps,
        "wasted_bytes": wasted / steps,
        "demand_bytes": delta["demand_bytes"] / steps,
        "wasted_share": wasted / max(1, delta["demand_bytes"] + used + wasted),
        "state": model.offload.prefetcher.describe(),
        **joules,
    }


def figures(name: str, runs: dict[str, list[dict[str, Any]]], seed: int) -> dict[str, Any]:
    """Return medians over the rounds; against "none": speed and stall, paired, with 95% intervals."""
    mine = runs[name]
    median: dict[str, Any] = {
        key: None if mine[0][key] is None else statistics.median(run[key] for run in mine)
        for key in mine[0]
        if key != "state"
    }
    result = {**median, "state": mine[-1]["state"]}
    if "none" in runs:
        speed = np.array([[run["tokens_per_s"] for run in runs[which]] for which in (name, "none")])
        result["faster"] = interval(
            lambda rows: np.median(speed[0, rows] / speed[1, rows]) - 1, len(mine), seed
        )
    if {"none", "perfect"} <= set(runs):
        stall = np.array([[run["stall_s"] for run in runs[which]] for which in ("none", name, "perfect")])

        def recovered(rows: Any) -> Any:
            none, own, perfect = np.median(stall[:, rows], axis=1)
            return (none - own) / (none - perfect) if none > perfect else np.nan

        result["recovered"] = interval(recovered, len(mine), seed)
    return result


def interval(statistic: Callable[[Any], Any], count: int, seed: int) -> list[float]:
    """Return [estimate, 2.5%, 97.5%] over resampled rounds."""
    generator = np.random.default_rng(seed)
    samples = [float(statistic(generator.integers(0, count, count))) for _ in range(RESAMPLES // 10)]
    low, high = np.nanpercentile(samples, [2.5, 97.5]) if not np.isnan(samples).all() else (np.nan,) * 2
    return [float(statistic(np.arange(count))), float(low), float(high)]


def report(results: list[dict[str, Any]], args: argparse.Namespace, energy: str) -> None:
    disk = (
        f"simulated disk: {args.delay_s * 1e3:g} ms more per read" if args.delay_s else "this machine's disk"
    )
    print(
        f"{cpu_name()}, {args.model or 'demo model'}, {disk}, {args.rounds} rounds of {args.tokens} tokens, "
    )
    print(f"policy {args.policy}, commit {commit()}; {energy}\n")
    print(
        "| experts | mode | tok/s | faster (95%) | stall | recovered (95%) | used | late | wasted | J/tok | |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for result in results:
        for name, row in result["modes"].items():
            faster = "{:+.1%} ({:+.1%} to {:+.1%})".format(*row["faster"]) if "faster" in row else ""
            recovered = "{:.0%} ({:.0%} to {:.0%})".format(*row["recovered"]) if "recovered" in row else ""
            print(
                f"| {result['experts']} | {name} | {row['tokens_per_s']:.1f} | {faster} "
                f"| {row['stall_s'] * 1e3:.2f} ms | {recovered} | {row['useful_bytes'] / 1e6:.2f} MB "
                f"| {row['late_bytes'] / 1e6:.2f} MB | {row['wasted_bytes'] / 1e6:.2f} MB "
                f"({row['wasted_share']:.0%}) | {per_token_text(row)} | {row['state']}"
            )
    print_answers(results)
    card = {"bench": "prefetch", "machine": cpu_name(), "commit": commit(), "energy": energy, **vars(args)}
    print(json.dumps({**card, "simulated_disk": bool(args.delay_s), "results": results}))


def print_answers(results: list[dict[str, Any]]) -> None:
    """Print what the benchmark asks, share by share: does ours pay?"""
    print("\n| experts | stall of none | of perfect | recovered by ours (95%) | wasted | speed (95%) |")
    print("|---|---|---|---|---|---|")
    for result in results:
        none, ours, perfect = (result["modes"].get(name) for name in ("none", "ours", "perfect"))
        if none and ours and perfect:
            print(
                f"| {result['experts']} | {none['stall_s'] * 1e3:.2f} ms | {perfect['stall_s'] * 1e3:.2f} ms "
                "| {:.0%} ({:.0%} to {:.0%}) ".format(*ours["recovered"])
                + f"| {ours['wasted_share']:.0%} "
                + "| {:+.1%} ({:+.1%} to {:+.1%}) |".format(*ours["faster"])
            )
    print()


if __name__ == "__main__":
    main()
