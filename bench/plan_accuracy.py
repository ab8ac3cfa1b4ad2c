"""Does `moe-offload plan` foretell the speed? A fixed grid of predictions, written down, then measured.

    python bench/plan_accuracy.py --synthetic qwen3.gguf gpt-oss.gguf --out accuracy.json [--resume]

Models: the bundled demo and files of bench/make_synthetic.py. For each 4 budgets (an eighth, a quarter,
a half, all of the experts) x 2 contexts x cold and warm. Hits and a prompt's experts are predicted by
replaying traces of *other* texts, the machine is measured (measure_steps, yardstick) before each load, and a
case's prediction is in the result file before the model that it is about is loaded. Then the model is
loaded, a prompt as long as the context is run, and tokens are decoded one by one: the first ones are the cold
case, those after as many others the warm one. Without generate()'s loop, and without prefetch, which `plan`
does not count.

A prediction is of the machine as it was when it was measured, and a virtual one changes by half within
seconds; where a disk's reads arrive in memory alone changes their speed by up to twice. So every case is
predicted and measured --rounds times, all cases once before any has its next round, each round's prediction
written before its measurement. A case's prediction is the median of its rounds', and so is what was measured:
none is chosen. How far apart measurements of one case lie is in the summary ("apart"), and what single rounds
were worth ("of_rounds"). The machine is measured once more after each run, and what would have been predicted
then is recorded, too ("afterwards"); a little arithmetic is timed beside the measuring and, between tokens,
beside the run, in Python and by all of the kernels' threads. The summary counts once more the cases during
which none of these differed by more than a fifth ("steady").

--resume keeps the rounds that an earlier run, cut short, has measured; --only takes some cases, by words of
their names ("50%,640 tokens": cases that have both).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from card import commit, cpu_name

ROOT = Path(__file__).resolve().parents[1]
SHARES = ("12.5%", "25%", "50%", "100%")
CONTEXTS = (64, 640)
COLD_TOKENS, BETWEEN_TOKENS, WARM_TOKENS = 64, 32, 128  # topics of the synthetic models last 128 tokens
PHASES = ("prefill", "cold", "warm")
PARTS = ("predicted", "measured")
DECODED_TOKENS = COLD_TOKENS + BETWEEN_TOKENS + WARM_TOKENS
MEASURED_FROM = 2000  # the measured text's first token
OTHERS_FROM = (1, 1100, 3000)  # those of traced texts, of a synthetic model
OTHER_FILES = ("README.md", "docs/ARCHITECTURE.md", "docs/LOG.md")  # and of the demo model
SAME_MACHINE = 1 / 5  # by which the times of the same arithmetic may differ
LOOP_STEPS = 100_000
WEIGHTS_BYTES, ROW_BYTES = 16 << 20, 2176  # in Q8_0, 2048 columns
EVERY_S = 0.25  # between looks at the pace; more often would slow tokens down
GOAL, GOAL_SHARE = 0.2, 0.9
SLACK_BYTES = 64 << 20  # the cap on experts decides, not bytes


def main() -> None:
    args = parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    record = load_record(args)
    yardstick = Yardstick()
    for number in range(args.rounds):
        for name, path in models(args):
            bench_model(name, path, record, args, number, yardstick)
    record["changes"] = changes(record["cases"])
    record["summary"] = summary(record["cases"])
    write(record, args.out)
    print(json.dumps({key: record[key] for key in ("bench", "machine", "commit", "summary")}))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--synthetic", type=Path, nargs="*", default=[], metavar="GGUF")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON")
    parser.add_argument("--rounds", type=int, default=3, help="that each case is predicted and measured")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose name has all of these")
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


def bench_model(
    name: str,
    path: Path,
    record: dict[str, Any],
    args: argparse.Namespace,
    number: int,
    yardstick: Yardstick,
) -> None:
    """Predict and measure one model's cases that have had no round of this number."""
    wanted = [(share, context) for context in CONTEXTS for share in SHARES]
    cases, words = record["cases"], [word.strip() for word in args.only.split(",")]
    missing = [
        key
        for key in wanted
        if all(word in case_key(name, *key, "") for word in words)
        and any(len(cases.get(case_key(name, *key, p), {}).get("rounds", [])) <= number for p in PHASES)
    ]
    if not missing:
        return
    for context in {context for _, context in missing}:
        record_traces(path, context)  # before the machine is looked at
    seen = rehearse(path, yardstick)
    for share, context in missing:
        predicted = predict(path, share, context, record_traces(path, context), *seen)
        record["written"] = {case_key(name, share, context, phase): predicted[phase] for phase in PHASES}
        write(record, args.out)
        found = measure(path, share, context, token_ids(path, context)[1])
        seen = rehearse(path, yardstick)
        afterwards = predict(path, share, context, record_traces(path, context), *seen)
        for phase in PHASES:
            now = predicted[phase] | {"afterwards": afterwards[phase]["tokens_per_s"]}
            settle(cases, case_key(name, share, context, phase), now, found[phase])
        write(record, args.out)
        print_table({key: cases[key] for key in (case_key(name, share, context, phase) for phase in PHASES)})


def settle(cases: dict[str, Any], key: str, predicted: dict[str, Any], measured: dict[str, Any]) -> None:
    """Add a round; the case's rates are the medians of its rounds', all else is of the last one."""
    rounds = cases.get(key, {}).get("rounds", [])
    rounds.append({"predicted": predicted, "measured": measured})
    cases[key] = {"rounds": rounds} | {
        part: rounds[-1][part] | {"tokens_per_s": statistics.median(rates(rounds, part))} for part in PARTS
    }


def rates(rounds: list[dict[str, Any]], part: str) -> list[float]:
    """Return the tokens per second of each round, predicted or measured."""
    return [one[part]["tokens_per_s"] for one in rounds]


def apart(case: dict[str, Any]) -> float:
    """Return how much more the fastest measurement of a case gave than the slowest."""
    measured = rates(case["rounds"], "measured")
    return float(max(measured) / min(measured) - 1)


def change(case: dict[str, Any]) -> float:
    """Return by how much the machine's speed differed before, during and after a measurement, at most."""
    return max(change_of(one["predicted"], one["measured"]) for one in case["rounds"])


def change_of(predicted: dict[str, Any], measured: dict[str, Any]) -> float:
    pairs = [*zip(measured["pace_s"], predicted["pace_s"], strict=True)]
    pairs.append((predicted["afterwards"], predicted["tokens_per_s"]))
    return max(max(now / then, then / now) for now, then in pairs) - 1


class Pace:
    """How fast the machine is now and then: seconds of a loop in Python and of a product by all threads."""

    def __init__(self) -> None:
        import torch

        from moe_offload.measure import random_weights

        self._rows, self._x = WEIGHTS_BYTES // ROW_BYTES, torch.randn(1, 2048)
        self._weights = random_weights(WEIGHTS_BYTES)[: self._rows * ROW_BYTES]
        self.seen: list[tuple[float, float]] = []

    def look(self, times: int = 1) -> None:
        from moe_offload import ops
        from moe_offload.storage.expert_format import GgmlType

        for _ in range(times):
            started, total = time.perf_counter(), 0
            for number in range(LOOP_STEPS):
                total += number
            looped = time.perf_counter()
            ops.linear(self._x, self._weights, GgmlType.Q8_0, self._rows, 2048)
            ended = time.perf_counter()
            self.seen.append((looped - started, ended - looped))

    def take(self) -> list[float]:
        """Return the medians of what was seen since the last time."""
        medians = [statistics.median(times) for times in zip(*self.seen, strict=True)]
        self.seen = []
        return medians


class Yardstick:
    """The overheads, measured anew when the machine has changed."""

    def __init__(self) -> None:
        self._loop_s, self._overheads, self._pace = 0.0, None, Pace()

    def overheads(self) -> Any:
        from moe_offload.runtime.yardstick import measure_overheads

        self._pace.look(5)
        now_s = self._pace.take()[0]
        if self._overheads is None or abs(now_s / self._loop_s - 1) > SAME_MACHINE:
            self._overheads, self._loop_s = measure_overheads(), now_s
        return self._overheads


def case_key(name: str, share: str, context: int, phase: str) -> str:
    return f"{name}, {share} of the experts, {context} tokens, {phase}"


@cache
def token_ids(path: Path, context: int) -> tuple[list[list[int]], list[int]]:
    """Return ids of some texts for the traces and other ones for the measurement."""
    from moe_offload.config import DEMO_MODEL

    count = context + DECODED_TOKENS
    if path != DEMO_MODEL:
        texts = [list(range(first, first + count)) for first in OTHERS_FROM]
        return texts, list(range(MEASURED_FROM, MEASURED_FROM + count))
    import moe_offload

    tokenizer = moe_offload.load_tokenizer()
    files = [tokenizer((ROOT / name).read_text(encoding="utf-8"))["input_ids"] for name in OTHER_FILES]
    return [ids[:count] for ids in files], files[0][MEASURED_FROM : MEASURED_FROM + count]


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


@cache
def record_traces(path: Path, context: int) -> list[Any]:
    """Return the routing of the texts that a prediction goes by."""
    return [record_trace(path, ids) for ids in token_ids(path, context)[0]]


def record_trace(path: Path, ids: list[int]) -> Any:
    """Return the routing of the trace's text: its prompt, then token by token."""
    model = load(path, "100%", len(ids) - DECODED_TOKENS)
    try:
        with model.offload.trace() as recorder:
            run(model, ids, [DECODED_TOKENS])
        return recorder.trace()
    finally:
        model.offload.close()


def rehearse(path: Path, yardstick: Yardstick) -> tuple[Any, list[float]]:
    """Return what the machine gives to the model now, as `plan` measures it, and its pace meanwhile."""
    from moe_offload.measure_steps import measure_steps
    from moe_offload.runtime.native_families import native_step_reason
    from moe_offload.storage.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    overheads = replace(yardstick.overheads(), token_s=0.0)
    pace = Pace()
    pace.look(5)
    is_native = native_step_reason(checkpoint.config) is None
    machine = replace(measure_steps(checkpoint, is_native=is_native), overheads=overheads)
    pace.look(5)
    return machine, pace.take()


def predict(
    path: Path, share: str, context: int, traces: list[Any], machine: Any, pace_s: list[float]
) -> dict[str, dict[str, Any]]:
    """Return what plan says of prefill, cold and warm decoding on the machine as it was measured."""
    from moe_offload.header_costs import place
    from moe_offload.hit_outlook import Hits, replayed_hits
    from moe_offload.outlook import Planner
    from moe_offload.storage.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    process, config = process_of(checkpoint), choices(share, context)
    budget = ram_bytes(path, share, context)
    planners = [
        Planner(checkpoint, machine, config, process=process, trace=trace, prompt_tokens=context)
        for trace in traces
    ]
    placement = place(checkpoint, config, ram_bytes=budget, process=process)
    chunks = [planner.chunks(placement) for planner in planners]
    prefill = planners[0].prefill(placement, [mean_of(same) for same in zip(*chunks, strict=True)])
    assert prefill is not None
    found = {"prefill": {"tokens_per_s": prefill.tokens_per_s, "walls_s": dict(prefill.walls_s)}}
    splits = {
        "cold": (context, context + COLD_TOKENS),
        "warm": (context + COLD_TOKENS + BETWEEN_TOKENS, None),
    }
    for phase, (first, end) in splits.items():
        parts = [trace if end is None else trace.head(end) for trace in traces]
        hits = [
            replayed_hits(checkpoint, placement.pools, part, config.policy, split=first)[1] for part in parts
        ]
        misses = [statistics.fmean(shares) for shares in zip(*(hit.misses for hit in hits), strict=True)]
        hit_rate = statistics.fmean(hit.rate for hit in hits)
        speed = planners[0].decode(placement, Hits(hit_rate, tuple(misses)))
        found[phase] = {
            "tokens_per_s": speed.tokens_per_s, "binding": speed.binding, "hit_rate": hit_rate,
            "walls_s": dict(speed.walls_s),
        }  # fmt: skip
    found["warm"]["machine"] = asdict(machine)
    return {phase: {**values, "pace_s": pace_s} for phase, values in found.items()}


def mean_of(chunks: Any) -> Any:
    """Return the same chunk of several texts as one."""
    used, read = (statistics.fmean(getattr(chunk, name) for chunk in chunks) for name in ("used", "read"))
    return replace(chunks[0], used=used, read=read)


def measure(path: Path, share: str, context: int, ids: list[int]) -> dict[str, dict[str, Any]]:
    """Load the model and return tokens per second of the prompt, the first tokens, and later ones."""
    model = load(path, share, context)
    try:
        marks = run(model, ids, [COLD_TOKENS, BETWEEN_TOKENS, WARM_TOKENS])
    finally:
        model.offload.close()
    counts = {"prefill": (0, context), "cold": (1, COLD_TOKENS), "warm": (3, WARM_TOKENS)}
    return {
        phase: {"tokens_per_s": count / marks[position]["seconds"], **marks[position]}
        for phase, (position, count) in counts.items()
    }


def run(model: Any, ids: list[int], parts: list[int]) -> list[dict[str, Any]]:
    """Run the prompt and then each part's tokens one by one; return seconds and hit rate of each."""
    import torch

    stats, prompt = model.offload.stats, len(ids) - DECODED_TOKENS
    marks: list[dict[str, Any]] = []
    pace = Pace()
    with torch.no_grad():
        pace.look(5)
        started = time.perf_counter()
        cache = model(torch.tensor([ids[:prompt]]), logits_to_keep=1).past_key_values
        seconds = time.perf_counter() - started
        pace.look(5)
        marks.append({"seconds": seconds, "pace_s": pace.take()})
        for part in parts:
            before, times = stats().as_dict(), []
            pace.look(2)
            looked = time.perf_counter()
            for token in ids[prompt : prompt + part]:
                started = time.perf_counter()
                model(torch.tensor([[token]]), past_key_values=cache)
                times.append(time.perf_counter() - started)
                if time.perf_counter() - looked > EVERY_S:
                    pace.look()
                    looked = time.perf_counter()
            pace.look(2)
            prompt += part
            after = stats().as_dict()
            hits, misses = (after[name] - before[name] for name in ("hits", "misses"))
            marks.append(
                {
                    "seconds": sum(times),
                    "median_s": statistics.median(times),
                    "hit_rate": hits / max(1, hits + misses),
                    "pace_s": pace.take(),
                }
            )
    return marks


def error(case: dict[str, Any]) -> float:
    """Return predicted over measured speed, less one."""
    return float(case["predicted"]["tokens_per_s"] / case["measured"]["tokens_per_s"] - 1)


def summary(cases: dict[str, Any]) -> dict[str, Any]:
    """Return how many cases are within the goal, for decoding and for prompts."""
    result: dict[str, Any] = {"goal": f"within {GOAL:.0%} in {GOAL_SHARE:.0%} of the cases, each kind"}
    for kind in ("decode", "prefill"):
        found = [case for key, case in cases.items() if key.endswith("prefill") == (kind == "prefill")]
        steady = [case for case in found if change(case) <= SAME_MACHINE]
        result[kind] = of_errors([error(case) for case in found])
        result[kind]["steady"] = of_errors([error(case) for case in steady])
        result[kind]["of_rounds"] = of_errors([error(one) for case in found for one in case["rounds"]])
        result[kind]["apart"] = statistics.median([apart(case) for case in found]) if found else 0.0
    result["changes"] = of_errors([change["error"] for change in changes(cases).values()])
    result["met"] = all(result[kind]["share"] >= GOAL_SHARE for kind in ("decode", "prefill"))
    return result


def changes(cases: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return what more memory was said to bring to decoding and what it brought: `plan`'s "to change it".

    Each budget against the next smaller one, both loaded and measured; rates as a multiple of the smaller's.
    """
    found = {}
    for key, case in cases.items():
        name, share, rest = key.split(", ", 2)
        position = SHARES.index(share.split()[0])
        smaller = cases.get(f"{name}, {SHARES[position - 1]} of the experts, {rest}") if position else None
        if smaller is None or rest.endswith("prefill"):
            continue
        said, seen = (case[part]["tokens_per_s"] / smaller[part]["tokens_per_s"] for part in PARTS)
        found[f"{SHARES[position - 1]} to {key}"] = {
            "predicted": said,
            "measured": seen,
            "error": said / seen - 1,
        }
    return found


def of_errors(errors: list[float]) -> dict[str, Any]:
    """Return how many errors there are, and how many are within the goal."""
    within = sum(abs(value) <= GOAL for value in errors)
    if not errors:
        return {"cases": 0}
    return {
        "cases": len(errors),
        "within": within,
        "share": within / len(errors),
        "median_error": statistics.median(errors),
        "worst_error": max(errors, key=abs),
    }


def print_table(cases: dict[str, Any]) -> None:
    for key, case in cases.items():
        predicted, measured = case["predicted"], case["measured"]
        hits = f"{predicted['hit_rate']:.0%}/{measured['hit_rate']:.0%}" if "hit_rate" in measured else "-"
        print(
            f"{key:60} {predicted['tokens_per_s']:9.4g} predicted {measured['tokens_per_s']:9.4g} measured "
            f"{error(case):+6.0%}  (afterwards {predicted['afterwards']:.4g})  hits {hits:9} "
            f"{predicted.get('binding', ''):8} machine "
            f"{'changed by' if change(case) > SAME_MACHINE else 'within'} {change(case):.0%}, "
            f"{len(case['rounds'])} measurements {apart(case):.0%} apart",
            flush=True,
        )


if __name__ == "__main__":
    main()
