"""Does `moe-offload plan` foretell the speed? A fixed grid of predictions, written down, then measured.

    python bench/plan_accuracy.py --synthetic qwen3.gguf gpt-oss.gguf --out accuracy.json [--resume]

Models: the bundled demo and files of bench/make_synthetic.py. For each 4 budgets (an eighth, a quarter,
a half, all of the experts) x 2 contexts x cold and warm. The hit rate is predicted by replaying a trace of
*other* text, the machine is measured (measure_steps, yardstick) before each load, and a case's prediction is
in the result file before the model that it is about is loaded. Then the model is loaded, a prompt as long
as the context is run, and tokens are decoded one by one: the first ones are the cold case, those after
as many others the warm one. Without generate()'s loop, and without prefetch, which `plan` does not count.
Each load is repeated and the fastest counts, as other work can only slow it.

--resume keeps what an earlier run, cut short, has measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from card import commit, cpu_name

ROOT = Path(__file__).resolve().parents[1]
SHARES = ("12.5%", "25%", "50%", "100%")
CONTEXTS = (64, 640)
COLD_TOKENS, BETWEEN_TOKENS, WARM_TOKENS = 32, 32, 48
DECODED_TOKENS = COLD_TOKENS + BETWEEN_TOKENS + WARM_TOKENS
OTHER_TEXT = 2000  # tokens after which the measured text begins; the trace's is what comes first
GOAL, GOAL_SHARE = 0.2, 0.9
SLACK_BYTES = 64 << 20  # the cap on experts decides, not bytes


def main() -> None:
    args = parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    record = load_record(args)
    for name, path in models(args):
        bench_model(name, path, record, args)
    record["summary"] = summary(record["cases"])
    write(record, args.out)
    print_table(record["cases"])
    print(json.dumps({key: record[key] for key in ("bench", "machine", "commit", "summary")}))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--synthetic", type=Path, nargs="*", default=[], metavar="GGUF")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON")
    parser.add_argument("--rounds", type=int, default=2, help="loads of each case; the fastest counts")
    parser.add_argument("--resume", action="store_true", help="measure only what --out does not have")
    return parser.parse_args()


def models(args: argparse.Namespace) -> list[tuple[str, Path]]:
    from moe_offload.config import DEMO_MODEL

    return [(path.stem, path) for path in (DEMO_MODEL, *args.synthetic)]


def load_record(args: argparse.Namespace) -> dict[str, Any]:
    if args.resume and args.out.exists():
        record: dict[str, Any] = json.loads(args.out.read_text())
        return record
    return {"bench": "plan_accuracy", "machine": cpu_name(), "commit": commit(), "cases": {}}


def write(record: dict[str, Any], out: Path) -> None:
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, out)


def bench_model(name: str, path: Path, record: dict[str, Any], args: argparse.Namespace) -> None:
    """Predict and measure what the record lacks of one model."""
    wanted = [(share, context) for context in CONTEXTS for share in SHARES]
    cases = record["cases"]
    missing = [key for key in wanted if "measured" not in cases.get(case_key(name, *key, "warm"), {})]
    if not missing:
        return
    from moe_offload.runtime.yardstick import measure_overheads

    overheads = measure_overheads()
    ids = {context: token_ids(path, context) for context in CONTEXTS}
    traces = {context: record_trace(path, ids[context][0]) for context in {c for _, c in missing}}
    for share, context in missing:
        predictions = predict(path, share, context, traces[context], overheads)
        for phase, prediction in predictions.items():
            cases[case_key(name, share, context, phase)] = {"predicted": prediction}
        write(record, args.out)
        for phase, measured in best_of(args.rounds, path, share, context, ids[context][1]).items():
            cases[case_key(name, share, context, phase)]["measured"] = measured
        write(record, args.out)
        print_table({key: cases[key] for key in list(cases)[-len(predictions) :]})


def case_key(name: str, share: str, context: int, phase: str) -> str:
    return f"{name}, {share} of the experts, {context} tokens, {phase}"


def token_ids(path: Path, context: int) -> tuple[list[int], list[int]]:
    """Return ids for the trace and other ones for the measurement."""
    from moe_offload.config import DEMO_MODEL

    count = context + DECODED_TOKENS
    if path != DEMO_MODEL:
        return list(range(1, 1 + count)), list(range(OTHER_TEXT, OTHER_TEXT + count))
    import moe_offload

    tokenizer = moe_offload.load_tokenizer()
    ids = tokenizer((ROOT / "README.md").read_text(encoding="utf-8"))["input_ids"]
    return ids[:count], ids[OTHER_TEXT : OTHER_TEXT + count]


def load(path: Path, share: str, context: int) -> Any:
    import moe_offload

    return moe_offload.from_pretrained(
        path, ram=ram_bytes(path, share, context), experts=share, context=context + DECODED_TOKENS,
        prefetch=False, warm_start=False, profile="none",
    )  # fmt: skip


def choices(share: str, context: int) -> Any:
    from moe_offload.config import RuntimeConfig

    return RuntimeConfig(experts=share, context_tokens=context + DECODED_TOKENS)


def process_of(checkpoint: Any) -> Any:
    """Return this process as the loader will find it."""
    from moe_offload.header_costs import fresh_process
    from moe_offload.runtime.offload import base_bytes

    return replace(fresh_process(checkpoint), base_bytes=base_bytes())


def ram_bytes(path: Path, share: str, context: int) -> int:
    from moe_offload.header_costs import place
    from moe_offload.storage.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    plan = place(checkpoint, choices(share, context), ram_bytes=1 << 40, process=process_of(checkpoint))
    return plan.total_bytes + SLACK_BYTES


def record_trace(path: Path, ids: list[int]) -> Any:
    """Return the routing of the trace's text: its prompt, then token by token."""
    model = load(path, "100%", len(ids) - DECODED_TOKENS)
    try:
        with model.offload.trace() as recorder:
            run(model, ids, [DECODED_TOKENS])
        return recorder.trace()
    finally:
        model.offload.close()


def predict(path: Path, share: str, context: int, trace: Any, overheads: Any) -> dict[str, dict[str, Any]]:
    """Return what plan says of prefill, cold and warm decoding; measures the machine first."""
    from moe_offload.header_costs import place
    from moe_offload.measure_steps import measure_steps
    from moe_offload.outlook import Planner, replayed_hit_rates
    from moe_offload.planning.roofline import decode_speed
    from moe_offload.storage.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    machine = replace(measure_steps(checkpoint), overheads=replace(overheads, token_s=0.0))
    budget, process = ram_bytes(path, share, context), process_of(checkpoint)
    planner = Planner(checkpoint, machine, choices(share, context), process=process, prompt_tokens=context)
    placement = place(checkpoint, planner.config, ram_bytes=budget, process=process)
    prefill = planner.outlook(budget).prefill
    assert prefill is not None
    found = {"prefill": {"tokens_per_s": prefill.tokens_per_s, "walls_s": dict(prefill.walls_s)}}
    splits = {
        "cold": (context, context + COLD_TOKENS),
        "warm": (context + COLD_TOKENS + BETWEEN_TOKENS, None),
    }
    for phase, (first, end) in splits.items():
        part = trace if end is None else trace.head(end)
        hit_rate = replayed_hit_rates(checkpoint, placement.pools, part, planner.config.policy, split=first)[
            1
        ]
        speed = decode_speed(planner.token, machine, planner.shape(placement), hit_rate=hit_rate)
        found[phase] = {
            "tokens_per_s": speed.tokens_per_s, "binding": speed.binding, "hit_rate": hit_rate,
            "walls_s": dict(speed.walls_s), "machine": asdict(machine),
        }  # fmt: skip
    return found


def best_of(rounds: int, path: Path, share: str, context: int, ids: list[int]) -> dict[str, dict[str, Any]]:
    """Return the fastest of some runs, phase by phase: what else the machine did only slows."""
    runs = [measure(path, share, context, ids) for _ in range(rounds)]
    return {phase: max((run[phase] for run in runs), key=lambda r: r["tokens_per_s"]) for phase in runs[0]}


def measure(path: Path, share: str, context: int, ids: list[int]) -> dict[str, dict[str, Any]]:
    """Load the model and return tokens per second of the prompt, the first tokens, and later ones."""
    model = load(path, share, context)
    try:
        marks = run(model, ids, [COLD_TOKENS, BETWEEN_TOKENS, WARM_TOKENS])
    finally:
        model.offload.close()
    return {
        "prefill": {"tokens_per_s": context / marks[0]["seconds"]},
        "cold": {"tokens_per_s": COLD_TOKENS / marks[1]["seconds"], **marks[1]},
        "warm": {"tokens_per_s": WARM_TOKENS / marks[3]["seconds"], **marks[3]},
    }


def run(model: Any, ids: list[int], parts: list[int]) -> list[dict[str, Any]]:
    """Run the prompt and then each part's tokens one by one; return seconds and hit rate of each."""
    import torch

    stats, prompt = model.offload.stats, len(ids) - DECODED_TOKENS
    marks = []
    with torch.no_grad():
        started = time.perf_counter()
        cache = model(torch.tensor([ids[:prompt]]), logits_to_keep=1).past_key_values
        marks.append({"seconds": time.perf_counter() - started})
        for part in parts:
            before, times = stats().as_dict(), []
            for token in ids[prompt : prompt + part]:
                started = time.perf_counter()
                model(torch.tensor([[token]]), past_key_values=cache)
                times.append(time.perf_counter() - started)
            prompt += part
            after = stats().as_dict()
            hits, misses = (after[name] - before[name] for name in ("hits", "misses"))
            marks.append(
                {
                    "seconds": sum(times),
                    "median_s": statistics.median(times),
                    "hit_rate": hits / max(1, hits + misses),
                }
            )
    return marks


def error(case: dict[str, Any]) -> float:
    """Return predicted over measured speed, less one."""
    return float(case["predicted"]["tokens_per_s"] / case["measured"]["tokens_per_s"] - 1)


def summary(cases: dict[str, Any]) -> dict[str, Any]:
    """Return how many cases are within the goal, for decoding and for prompts."""
    result: dict[str, Any] = {"goal": f"within {GOAL:.0%} in {GOAL_SHARE:.0%} of decode cases"}
    for kind in ("decode", "prefill"):
        errors = [
            error(case) for key, case in cases.items() if key.endswith("prefill") == (kind == "prefill")
        ]
        within = sum(abs(value) <= GOAL for value in errors)
        result[kind] = {
            "cases": len(errors),
            "within": within,
            "share": within / len(errors),
            "median_error": statistics.median(errors),
            "worst_error": max(errors, key=abs),
        }
    result["met"] = result["decode"]["share"] >= GOAL_SHARE
    return result


def print_table(cases: dict[str, Any]) -> None:
    for key, case in cases.items():
        predicted, measured = case["predicted"], case["measured"]
        hits = f"{predicted['hit_rate']:.0%}/{measured['hit_rate']:.0%}" if "hit_rate" in measured else "-"
        print(
            f"{key:60} {predicted['tokens_per_s']:9.4g} predicted {measured['tokens_per_s']:9.4g} measured "
            f"{error(case):+6.0%}  hits {hits:9}  {predicted.get('binding', '')}",
            flush=True,
        )


if __name__ == "__main__":
    main()
