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
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peer_llama_cpp as peer
from card import commit, cpu_name
from cgroup import CgroupUnavailableError, MemoryCgroup
from end_to_end_report import best_variants, memory_of, print_card, prompt_tokens_of, report

from moe_offload.config import GIB, gib, parse_bytes
from moe_offload.terminal import Progress

BENCH = Path(__file__).resolve().parent
CHILD_LIMIT_S = 600
# Of a cgroup, what ours may hold: its memory guard wants 256 MiB free, kernel and page cache need some.
CGROUP_RESERVE_BYTES = 272 << 20


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    like: str
    layers: int
    prompt_tokens: int
    decode_tokens: int
    warm_tokens: int  # before decoding in a cgroup counts: the cache finds its residents
    peer_cgroup_tokens: int  # of llama.cpp in a cgroup, where a token takes seconds
    decode_limit_s: float  # two tokens are measured however long they take
    ram_test_bytes: int
    disk_test_s: float


FULL = Sizes("qwen3-30b-a3b", 24, 512, 64, 48, 5, 25.0, 1 << 30, 3.0)
QUICK = Sizes("toy", 2, 40, 6, 2, 6, 10.0, 64 << 20, 0.3)


@dataclass(frozen=True)
class Run:
    """One child process."""

    mix: str
    place: str  # "ram" or the size of a cgroup, "@" and the prompt's tokens where they are not Sizes'
    program: str
    round_idx: int
    settings: peer.Settings | None = None
    details: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def memory(self) -> str:
        return memory_of(self.place)

    @property
    def key(self) -> str:
        variant = f"/{self.settings.name}" if self.settings else ""
        return f"{self.mix}/{self.place}/{self.program}{variant}/{self.round_idx}"


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


class Records:
    """Results by key, each appended to a file of JSON lines when it is there."""

    def __init__(self, path: Path, keep: bool) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if keep and path.exists():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            self.rows = [row for row in rows if "error" not in row]  # what failed is tried again
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def __contains__(self, key: str) -> bool:
        return any(row["key"] == key for row in self.rows)

    def add(self, run: Run, result: dict[str, Any]) -> None:
        settings = peer.describe(run.settings) if run.settings else None
        row = {
            "key": run.key, "mix": run.mix, "place": run.place, "program": run.program,
            "round": run.round_idx, "settings": settings, "commit": commit(), **result,
        }  # fmt: skip
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{run.key}: {summary(row)}", file=sys.stderr)


def summary(row: dict[str, Any]) -> str:
    """Return one line for those who watch."""
    if "error" in row:
        return f"failed: {row['error']}"
    parts = []
    if row.get("prefill_s"):
        parts.append(f"prefill {row['prefill_s']:.2f} s")
    if row.get("token_s"):
        parts.append(f"decode {len(row['token_s']) / sum(row['token_s']):.2f} tok/s")
    rates = [
        f"{name} {row[name] / 1e9:.1f} GB/s"
        for name in ("ram_bytes_per_s", "disk_bytes_per_s")
        if name in row
    ]
    flips = [f"{name} {value}" for name, value in row.items() if name.startswith(("flipping", "srp"))]
    return ", ".join([*parts, *rates, *flips])


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


def schedule(args: argparse.Namespace, records: Records) -> Iterator[Run]:
    """Yield the runs: within a round everything once, ours and the peer's in turns."""
    for round_idx in range(args.rounds):
        for mix in args.mixes:
            places = [place for place in args.places if not args.only or f"{mix}/{place}" in args.only]
            if not places:
                continue
            if round_idx == 0:
                yield Run(mix, "ram", "routing", 0)
                yield Run(mix, "ram", "flip", 0)
            for place in places:
                if memory_of(place) != "ram" and 0 < round_idx == args.rounds - 1:
                    continue  # a round less: the peer takes minutes there
                # Disks of virtual machines change by the minute: measured right beside ours.
                runs = [Run(mix, place, "bandwidth", round_idx), Run(mix, place, "ours", round_idx)]
                if not args.no_peer:
                    runs += [
                        Run(mix, place, "llama", round_idx, settings)
                        for settings in peer_settings(place, round_idx, mix, records)
                    ]
                yield from runs if round_idx % 2 == 0 else reversed(runs)


def peer_settings(place: str, round_idx: int, mix: str, records: Records) -> tuple[peer.Settings, ...]:
    """Return all settings in the first round, later those that were best at decode or at prefill."""
    candidates = peer.IN_MEMORY if memory_of(place) == "ram" else peer.IN_CGROUP
    candidates = peer.with_batches(candidates, prompt_tokens_of(place, 0))
    best = best_variants(records.rows, mix, place) if round_idx else set()
    return tuple(settings for settings in candidates if settings.name in best) or candidates


def measure(run: Run, sizes: Sizes, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run a child and return what it said; "error" when it ended badly."""
    is_small = run.program in ("flip", "routing")
    prompt_tokens = prompt_tokens_of(run.place, sizes.prompt_tokens)
    spec = {
        "program": run.program, "model": str(model), "threads": args.threads, "options": options(args),
        "prompt_tokens": min(prompt_tokens, 8) if run.program == "flip" else prompt_tokens,
        "decode_tokens": sizes.decode_tokens, "warm_tokens": 0 if run.memory == "ram" else sizes.warm_tokens,
        "warm_up": run.memory == "ram" and not is_small, "decode_limit_s": sizes.decode_limit_s,
        "vocab_size": vocab_size(model), "first_id": 300, "ram": "auto",
        "ram_test_bytes": sizes.ram_test_bytes, "disk_test_s": sizes.disk_test_s,
        "settings": asdict(run.settings) if run.settings else None,
    }  # fmt: skip
    if is_small:
        spec["ram"] = str(3 * GIB)
    with ExitStack() as stack:
        if run.memory != "ram" and run.program != "bandwidth":
            limit_bytes = parse_bytes(run.memory)
            group = stack.enter_context(MemoryCgroup(limit_bytes))
            drop_page_cache(model)
            spec |= {"cgroup_procs": str(group.procs), "ram": str(limit_bytes - CGROUP_RESERVE_BYTES)}
            if run.program == "llama":
                spec |= {"decode_tokens": sizes.peer_cgroup_tokens, "warm_tokens": 1}
        return run_child(spec)


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Return --option's values; true, false and numbers as such."""
    values = {}
    for name, text in args.options.items():
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return values


def vocab_size(model: Path) -> int:
    from moe_offload.storage.checkpoint import open_checkpoint

    return open_checkpoint(model).spec.vocab_size


def drop_page_cache(path: Path) -> None:
    """Let the kernel forget the file's pages."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def run_child(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the union of the JSON objects that the child printed."""
    command = [sys.executable, str(BENCH / "end_to_end_child.py"), json.dumps(spec)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"} if spec["program"] != "llama" else None
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    error = None
    try:
        out, err = child.communicate(timeout=CHILD_LIMIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        error = f"not done after {CHILD_LIMIT_S} s"
    except BaseException:
        child.kill()
        child.wait()
        raise
    result: dict[str, Any] = {}
    for line in out.splitlines():
        if line.startswith("{"):
            result |= json.loads(line)
    if child.returncode and error is None:
        last = err.strip().splitlines()[-1:] or [""]
        error = f"exit status {child.returncode}: {last[0]}"
    return result if error is None else {**result, "error": error}


if __name__ == "__main__":
    sys.exit(main())
