"""Does `moe-offload plan` foretell the speed? A fixed grid of predictions, written down, then measured.

    python bench/plan_accuracy.py --synthetic qwen3.gguf gpt-oss.gguf --out accuracy.json [--resume]

Models: the bundled demo and files of bench/make_synthetic.py. For each 4 budgets (an eighth, a quarter, a
half, all of the experts) x 2 contexts x cold and warm. Hits and a prompt's experts are predicted by
replaying traces of *other* texts, the machine is measured (measure_steps, yardstick) before a model's cases
of a context, and a case's prediction is in the result file before the model that it is about is loaded.
Then the model is loaded, a prompt as long as the context is run, and tokens are decoded one by one: the
first ones are the cold case, those after as many others the warm one. What takes little time is loaded and
measured again, up to four times, and all of the seconds count. Without generate()'s loop, and without
prefetch, which `plan` does not count.

A virtual machine changes by half within seconds. A prediction is of the machine as it is as a rule: the
median of each figure over all rehearsals so far. Every case is predicted and measured --rounds times, all
cases once before any has its next round, each round with another text measured and the others traced, its
prediction written before its measurement. A case's prediction is the median of its rounds', and so is what
was measured: none is chosen. How far apart measurements of one case lie is in the summary ("apart"), and
what single rounds were worth ("of_rounds"). A little arithmetic is timed beside the measuring and, between
tokens, beside the run, in Python and by all of the kernels' threads; the summary counts once more the cases
during which neither differed by more than a fifth ("steady").

--resume keeps the rounds that an earlier run, cut short, has measured; --only takes some cases, by words of
their names ("50%,640 tokens": cases that have both).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from card import commit, cpu_name
from plan_accuracy_predict import Rehearsals, predict
from plan_accuracy_report import SHARES, case_key, changes, print_table, settle, summary
from plan_accuracy_runs import measure, texts, trace_of

CONTEXTS = (64, 640)
PHASES = ("prefill", "cold", "warm")


def main() -> None:
    args = parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record, rehearsals = load_record(args), Rehearsals()
    for number in range(args.rounds):
        for name, path in models(args):
            for context in CONTEXTS:
                bench_cases(name, path, context, record, args, number, rehearsals)
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
    parser.add_argument("--rounds", type=int, default=4, help="that each case is predicted and measured")
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


def bench_cases(
    name: str,
    path: Path,
    context: int,
    record: dict[str, Any],
    args: argparse.Namespace,
    number: int,
    rehearsals: Rehearsals,
) -> None:
    """Predict and measure one model's cases of a context that have had no round of this number."""
    cases, words = record["cases"], [word.strip() for word in args.only.split(",")]
    missing = [
        share
        for share in SHARES
        if all(word in case_key(name, share, context, "") for word in words)
        and any(
            len(cases.get(case_key(name, share, context, phase), {}).get("rounds", [])) <= number
            for phase in PHASES
        )
    ]
    if not missing:
        return
    measured_text = number % len(texts(path, context))
    others = [i for i in range(len(texts(path, context))) if i != measured_text]
    traces = [trace_of(path, context, text) for text in others]
    rehearsals.rehearse(path)
    for share in missing:
        keys = {phase: case_key(name, share, context, phase) for phase in PHASES}
        predicted = predict(path, share, context, traces, rehearsals)
        record["written"] = {keys[phase]: predicted[phase] for phase in PHASES}
        write(record, args.out)
        found = measure(path, share, context, texts(path, context)[measured_text])
        for phase in PHASES:
            settle(cases, keys[phase], predicted[phase], found[phase])
        write(record, args.out)
        print_table({key: cases[key] for key in keys.values()})


if __name__ == "__main__":
    main()
