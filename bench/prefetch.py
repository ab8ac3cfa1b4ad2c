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
from typing import Any

from energy import PhaseEnergy, measured_energy
from prefetch_modes import MODES, settings_of
from prefetch_report import figures, report

PROMPT = "The history of the city begins with a small harbour at the mouth of the river, where"
PROMPT_TOKENS = 32  # of --ascending


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


def compare(
    model: Any, inputs: dict[str, Any], args: argparse.Namespace, energy: PhaseEnergy
) -> dict[str, Any]:
    """Run all modes by turns; return each one's runs and what follows from them."""
    settings = settings_of(model, lambda: generate(model, inputs, args.tokens, energy))
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


if __name__ == "__main__":
    main()
