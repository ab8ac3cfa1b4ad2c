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
    runs: dict[tuple[str, bool], list[dict[str, Any]]] = {key: [] for key in models}
    for _ in range(args.rounds):
        for key, model in models.items():
            runs[key].append(measure(model, inputs, args.tokens))
    texts = {tuple(run.pop("tokens")) for results in runs.values() for run in results}
    assert len(texts) == 1, "placement changed a token"
    report(runs, args)


def measure(model: Any, inputs: Any, num_tokens: int) -> dict[str, Any]:
    """Generate once; return the run's own counters."""
    before = model.offload.stats().as_dict()
    out = model.generate(**inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)
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
    }


def report(runs: dict[tuple[str, bool], list[dict[str, Any]]], args: argparse.Namespace) -> None:
    """Print the card, the table and one last line of JSON."""
    print(f"{cpu_name()}, {args.rounds} interleaved rounds of {args.tokens} tokens, commit {commit()}\n")
    print("| experts in memory | prefetch | tok/s (min–max) | hit rate | read/token | wasted | stall/token |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for (share, prefetch), results in runs.items():
        median = {name: statistics.median(run[name] for run in results) for name in results[0]}
        speeds = [run["tokens_per_s"] for run in results]
        print(
            f"| {share} | {'on' if prefetch else 'off'} "
            f"| {median['tokens_per_s']:.1f} ({min(speeds):.1f}–{max(speeds):.1f}) "
            f"| {median['hit_rate']:.0%} | {median['read_bytes_per_token'] / 1e6:.2f} MB "
            f"| {median['wasted_bytes_per_token'] / 1e6:.2f} MB "
            f"| {median['stall_s_per_token'] * 1e3:.2f} ms |"
        )
        rows.append({"experts": share, "prefetch": prefetch, "speeds": speeds, **median})
    print(json.dumps({"bench": "decode_speed", "machine": cpu_name(), "commit": commit(), "results": rows}))


if __name__ == "__main__":
    main()
