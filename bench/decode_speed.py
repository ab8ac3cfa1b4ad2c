"""How fast does a model decode with a part of its experts in memory, with and without prefetch?

    python bench/decode_speed.py [--model PATH] [--shares 12%,25%,50%,100%] [--tokens 64] [--rounds 5]

Every configuration generates greedily from the same prompt. Configurations take turns within a
round, so that a busy machine slows all of them; medians over the rounds are printed with their
spread. The share in parentheses is of experts in memory at all, slots for reads in flight included.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from card import commit, cpu_name
from energy import PhaseEnergy, open_meter

PROMPT = "The history of the city begins with a small harbour at the mouth of the river, where"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="Hugging Face folder or GGUF file; default: the bundled demo model")
    parser.add_argument("--shares", default="12%,25%,50%,100%")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ram", default="auto")
    args = parser.parse_args()

    import moe_offload

    tokenizer = moe_offload.load_tokenizer(args.model)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    models = {
        (share, prefetch): moe_offload.from_pretrained(
            args.model, experts=share, prefetch=prefetch, ram=args.ram, context=len(PROMPT) + args.tokens
        )
        for share in args.shares.split(",")
        for prefetch in (False, True)
    }
    meter = open_meter()
    meter.measure_idle()
    energy = PhaseEnergy(meter)
    runs: dict[tuple[str, bool], list[dict[str, Any]]] = {key: [] for key in models}
    for _ in range(args.rounds):
        for key, model in models.items():
            runs[key].append(measure(model, inputs, args.tokens, energy))
    texts = {tuple(run.pop("tokens")) for results in runs.values() for run in results}
    assert len(texts) == 1, "placement changed a token"
    meter.close()
    report(runs, args, meter.describe())


def measure(model: Any, inputs: Any, num_tokens: int, energy: PhaseEnergy) -> dict[str, Any]:
    """Generate once; return the run's own counters, and joules per token."""
    before = model.offload.stats().as_dict()
    energy.begin()
    out = model.generate(
        **inputs,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        logits_processor=[energy],
    )
    joules = energy.per_token(inputs["input_ids"].shape[1])
    after = model.offload.stats().as_dict()
    delta = {name: after[name] - before[name] for name in before}
    needs = delta["hits"] + delta["prefetch_hits"] + delta["misses"]
    return {
        "tokens": out[0].tolist(),
        "tokens_per_s": delta["decode_steps"] / delta["decode_s"],
        "hit_rate": (delta["hits"] + delta["prefetch_hits"]) / needs,
        "read_bytes_per_token": delta["bytes_read"] / num_tokens,
        "wasted_bytes_per_token": delta["prefetch_wasted_bytes"] / num_tokens,
        "stall_s_per_token": delta["stall_s"] / num_tokens,
        **joules,
    }


def report(runs: dict[tuple[str, bool], list[dict[str, Any]]], args: argparse.Namespace, energy: str) -> None:
    """Print the card, the table and one last line of JSON."""
    print(f"{cpu_name()}, {args.rounds} interleaved rounds of {args.tokens} tokens, commit {commit()}")
    print(f"{energy}\n")
    print(
        "| experts in memory | prefetch | tok/s (min–max) | hit rate | read/token | wasted | stall/token "
        "| decode J/token | prefill J/token |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for (share, prefetch), results in runs.items():
        median = {name: median_of([run[name] for run in results]) for name in results[0]}
        speeds = [run["tokens_per_s"] for run in results]
        print(
            f"| {share} | {'on' if prefetch else 'off'} "
            f"| {median['tokens_per_s']:.1f} ({min(speeds):.1f}–{max(speeds):.1f}) "
            f"| {median['hit_rate']:.0%} | {median['read_bytes_per_token'] / 1e6:.2f} MB "
            f"| {median['wasted_bytes_per_token'] / 1e6:.2f} MB "
            f"| {median['stall_s_per_token'] * 1e3:.2f} ms "
            f"| {joules(median['decode_joules_per_token'])} | {joules(median['prefill_joules_per_token'])} |"
        )
        rows.append({"experts": share, "prefetch": prefetch, "speeds": speeds, **median})
    card = {"bench": "decode_speed", "machine": cpu_name(), "commit": commit(), "energy": energy}
    print(json.dumps({**card, "results": rows}))


def median_of(values: list[float | None]) -> float | None:
    """Return the median; None where nothing was counted."""
    counted = [value for value in values if value is not None]
    return statistics.median(counted) if counted else None


def joules(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    main()
