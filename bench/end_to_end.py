"""How fast is a mixture-of-experts model here, beside llama.cpp on the same file, and how fast could it be?

    python bench/end_to_end.py [--mixes q4_0,q4_k_m] [--places ram,2GiB,4GiB] [--rounds 3] [--dir PATH]
    python bench/end_to_end.py --quick
    python bench/end_to_end.py --resume --only q4_0/2GiB
    python bench/end_to_end.py --places ram@2048,2GiB@4096 --mixes q4_0     # a longer prompt

Makes synthetic models of Qwen3-30B-A3B's layers where --dir has none, then runs both programs in turn, each
time in a process of its own: all in RAM, and in memory cgroups with nothing of the file in the page cache.
Prefill is one prompt, decode forces the ids that follow. Every result is written to DIR/end_to_end.jsonl as
soon as it is there; --resume keeps those. Ceilings (moe_offload/planning/cost_model.py): packed bytes that a
token needs over the memory's read bandwidth, and what it missed over the disk's, measured beside each run.
Prints a card, tables and one last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import peer_llama_cpp as peer
from card import commit, cpu_name
from cgroup import CgroupUnavailableError, MemoryCgroup
from end_to_end_figures import memory_of
from end_to_end_report import print_card, report
from end_to_end_runs import BENCH, FULL, QUICK, Records, Sizes, measure, schedule

from moe_offload.config import GIB, gib, parse_bytes
from moe_offload.terminal import Progress


def main() -> int:
    args = parse_args()
    sizes = QUICK if args.quick else FULL
    models = {mix: make_model(mix, sizes, args.dir) for mix in args.mixes}
    records = Records(args.dir / ("quick.jsonl" if args.quick else "end_to_end.jsonl"), args.resume)
    print_card(args, asdict(sizes), models)
    notes = list(obstacles(args))
    for note in notes:
        print(note)
    started = time.perf_counter()
    with Progress("measuring", sys.stderr, lambda count: f"{count:.0f} runs") as progress:
        total = estimate(args)
        for count, run in enumerate(schedule(args, records), start=1):
            if run.key not in records:
                records.add(run, measure(run, sizes, models[run.mix], args))
            progress.update(count, max(total, count))
    results = report(records.rows, models, sizes.prompt_tokens)
    print(
        json.dumps(
            {
                "bench": "end_to_end", "machine": cpu_name(), "commit": commit(), "threads": args.threads,
                "took_s": round(time.perf_counter() - started), **asdict(sizes), "notes": notes,
                "results": results,
            }
        )
    )  # fmt: skip
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_offload_bench"
    names = lambda text: [name.strip() for name in text.split(",") if name.strip()]  # noqa: E731
    parser.add_argument("--dir", type=Path, default=cache, help="of models and results")
    parser.add_argument("--mixes", type=names, default=["q4_0", "q4_k_m"])
    parser.add_argument(
        "--places",
        type=names,
        help='"ram" and sizes of cgroups, perhaps with @TOKENS of a longer prompt; default: ram,2GiB,4GiB',
    )
    parser.add_argument("--only", type=names, help="only these, as MIX/PLACE: q4_0/ram,q4_k_m/2GiB")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--option", action="append", default=[], help="NAME=VALUE of from_pretrained, for ours"
    )
    parser.add_argument("--no-peer", action="store_true", help="leave llama.cpp out")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run has measured")
    parser.add_argument("--quick", action="store_true", help="a toy model, one round: does it work?")
    args = parser.parse_args()
    args.places = args.places or (["ram", "1GiB"] if args.quick else ["ram", "2GiB", "4GiB"])
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.mixes = args.mixes[:1] if args.quick else args.mixes
    if args.only:
        args.mixes = [mix for mix in args.mixes if any(part.split("/")[0] == mix for part in args.only)]
        args.places = [
            place for place in args.places if any(part.endswith(f"/{place}") for part in args.only)
        ]
    args.options = dict(option.split("=", 1) for option in args.option)
    args.dir.mkdir(parents=True, exist_ok=True)
    return args


def make_model(mix: str, sizes: Sizes, folder: Path) -> Path:
    """Return the synthetic model, made if it is missing and the disk has room."""
    path = folder / f"{sizes.like}-{sizes.layers}-layers-{mix}.gguf"
    if not path.exists():
        needed, free = (12 * GIB if sizes.like != "toy" else GIB // 16), shutil.disk_usage(folder).free
        if free < needed:
            raise SystemExit(
                f"{folder} has {gib(free)} free, a model needs up to {gib(needed)}; name another --dir"
            )
        print(f"making {path}", file=sys.stderr)
        command = [sys.executable, str(BENCH / "make_synthetic.py"), "--like", sizes.like, "--mix", mix]
        subprocess.run(
            [*command, "--layers", str(sizes.layers), "--out", str(path)], check=True, stdout=sys.stderr
        )
    return path


def obstacles(args: argparse.Namespace) -> Iterator[str]:
    """Say what cannot be measured here and take it out of ``args``."""
    if not args.no_peer and not peer.is_installed():
        args.no_peer = True
        yield f"no comparison: {peer.NOT_INSTALLED}"
    try:
        for memory in {memory_of(place) for place in args.places} - {"ram"}:
            MemoryCgroup(parse_bytes(memory)).__exit__()
    except CgroupUnavailableError as error:
        args.places = [place for place in args.places if memory_of(place) == "ram"]
        yield f"no runs inside cgroups: none can be made here ({error})"


def estimate(args: argparse.Namespace) -> int:
    """Return about how many runs there will be, for the progress line."""
    pair = 1 if args.no_peer else 2
    num_cgroups = len([place for place in args.places if memory_of(place) != "ram"])
    in_cgroups = max(1, args.rounds - 1) * num_cgroups * (1 + pair)
    return len(args.mixes) * (2 + args.rounds * (1 + pair) + in_cgroups + len(peer.IN_MEMORY) - 1)


if __name__ == "__main__":
    sys.exit(main())
