"""The runs of end_to_end.py: which, in which order, each in a process of its own; what is kept of them."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peer_llama_cpp as peer
from card import commit
from cgroup import MemoryCgroup
from end_to_end_figures import best_variants, decode_speed, median_speed, memory_of, prompt_tokens_of

from moe_offload.config import GIB, parse_bytes

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
        parts.append(f"decode {decode_speed(row):.2f} tok/s, by the median token {median_speed(row):.2f}")
    rates = [
        f"{name} {row[name] / 1e9:.1f} GB/s"
        for name in ("ram_bytes_per_s", "disk_bytes_per_s")
        if name in row
    ]
    flips = [f"{name} {value}" for name, value in row.items() if name.startswith(("flipping", "srp"))]
    return ", ".join([*parts, *rates, *flips])


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
