"""How often would each eviction policy find an expert in memory, on recorded routing?

    python bench/cache_hit_rate.py --trace FILE... --slots 4,8,16 --policies lru,ewma,belady
    python bench/cache_hit_rate.py --trace RUN.npz --as-run

Replays decode tokens from cold through the runtime's own policies, event-atomically: a layer's experts
of a token are looked up together, then the misses come in, then victims are chosen. --slots counts
resident experts a layer; slots for a step's misses come on top. "closed" is the share of the way from
LRU to Belady (the most hits that any policy can have). Times are modelled: misses x (latency +
bytes / bandwidth), nothing overlapped. Prints a card, tables, and one last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from card import commit, cpu_name
from hit_rate_replays import Traces, bytes_of, run_all
from hit_rate_report import print_tables, write_files
from starts import print_starts, start_rates
from trace_statistics import segment_cache_hit_rates, segment_routing

from moe_offload.config import parse_bytes
from moe_offload.device import load_profile
from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.planning.eviction import ORACLES, POLICIES, make_policy
from moe_offload.planning.plans import PoolPlan
from moe_offload.replay import replay
from moe_offload.trace import RoutingTrace, read_trace

SRP_WINDOWS, SCH_WINDOW = (4, 16, 64, 256), 16


def main() -> int:
    args = parse_args()
    started = time.perf_counter()
    try:
        if args.profile:
            use_profile(args)
        check_arguments(args)
        names = policy_names(args.policies)
        traces = [(path.stem, load(path, args)) for path in args.trace]
        if args.as_run:
            return report_runs(traces, args)
        check_names(names)
        sizes = [sizes_of(trace, args) for _, trace in traces]
        for (stem, trace), counts in zip(traces, sizes, strict=True):
            describe(stem, trace, counts, args)
        rows = run_all(traces, names, sizes, args)
    except (ConfigError, CheckpointError) as error:
        print(f"cache_hit_rate: error: {error}", file=sys.stderr)
        return 2
    print_tables(rows)
    starts = (
        start_rates(traces, [n for n in names if n not in ORACLES], sizes, args.starts) if args.starts else []
    )
    if starts:
        print_starts(starts)
    result = {**card(args), "took_s": round(time.perf_counter() - started, 1), "results": rows}
    result |= {"starts": starts} if starts else {}
    write_files(result, args)
    print(json.dumps(result))
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, nargs="+", required=True, help=".npz, .npy, .csv, .jsonl")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--slots", help="resident experts a layer: 4,8,16 (default: 1/8, 1/4, 1/2 of them)")
    size.add_argument("--bytes", help="resident experts of all layers together, as sizes: 2GiB,4GiB")
    parser.add_argument("--policies", default="all", help='names, import paths "pkg.mod:Class", or all')
    parser.add_argument(
        "--pool", choices=["layer", "shared"], default="layer", help="a cache a layer, or one"
    )
    parser.add_argument("--num-experts", type=int, help="of a layer, for traces that do not say")
    parser.add_argument("--expert-bytes", help="of one expert; default: the trace's, else 1 MiB is assumed")
    parser.add_argument("--max-tokens", type=int, help="only the first tokens of each trace")
    parser.add_argument("--phase", choices=["decode", "all"], default="decode", help="which tokens count")
    parser.add_argument(
        "--profile", help="device profile, by name or file: its figures instead of the next two"
    )
    parser.add_argument(
        "--tier", choices=["disk", "link"], default="disk", help="what misses cross on the profile's device"
    )
    parser.add_argument("--link-bytes-per-s", type=float, default=2e9, help="of the modelled device")
    parser.add_argument("--latency-s", type=float, default=1e-4, help="of a read on the modelled device")
    parser.add_argument(
        "--as-run", action="store_true", help="replay with the recorded run's plan and policy"
    )
    parser.add_argument(
        "--starts", type=int, metavar="TOKENS",
        help="also: hit rate of the first TOKENS from cold, started warm, and warm by another trace",
    )  # fmt: skip
    parser.add_argument("--no-statistics", action="store_true", help="leave out SRP and SCH")
    parser.add_argument("--seed", type=int, default=0, help="for policies that draw random numbers")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG; needs matplotlib")
    return parser.parse_args()


def policy_names(text: str) -> list[str]:
    return (
        [*POLICIES, *ORACLES] if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what would be noticed after minutes of replay, or never."""
    for path in (args.csv, args.json, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path} cannot be written: there is no folder {path.absolute().parent}")
        if path is not None and path.is_dir():
            raise ConfigError(f"{path} is a folder; give a file in it")
    for name in ("max_tokens", "starts", "jobs", "num_experts"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least 1 is wanted")
    if args.link_bytes_per_s <= 0 or args.latency_s < 0:
        raise ConfigError("--link-bytes-per-s must be above 0, --latency-s 0 or more")


def use_profile(args: argparse.Namespace) -> None:
    """Take bandwidth and latency of a tier from the device profile; a latency that it lacks is none."""
    profile = load_profile(args.profile)
    name = "read_bandwidth" if args.tier == "disk" else "to_device_bandwidth"
    args.link_bytes_per_s = profile.value(args.tier, name)
    latency = profile.figures[args.tier].get("latency")
    args.latency_s = latency.value if latency else 0.0


def check_names(names: list[str]) -> None:
    """Refuse a wrong name before minutes of replay."""
    if not names:
        raise ConfigError("--policies names none")
    for name in names:
        make_policy(name, oracles=True)


def load(path: Path, args: argparse.Namespace) -> RoutingTrace:
    trace = read_trace(path, args.num_experts)
    if args.as_run:
        return trace
    if args.phase == "all":
        trace = trace.head(trace.num_tokens, single_steps=True)
    trace = trace.decode_only()
    if args.max_tokens:
        trace = trace.head(args.max_tokens)
    if not trace.num_tokens:
        raise ConfigError(f"trace {path} has no decode tokens; --phase all takes the prompts' tokens too")
    return trace


def sizes_of(trace: RoutingTrace, args: argparse.Namespace) -> list[int]:
    """Return the cache sizes in resident experts a layer."""
    if args.bytes:
        all_layers_bytes = sum(bytes_of(trace, args).values())
        counts = [parse_bytes(text) // all_layers_bytes for text in args.bytes.split(",")]
    elif args.slots:
        if not all(part.strip().isdigit() for part in args.slots.split(",")):
            raise ConfigError(f"--slots {args.slots!r} is not a list of numbers such as 4,8,16")
        counts = [int(part) for part in args.slots.split(",")]
    else:
        counts = [trace.num_experts // share for share in (8, 4, 2)]
    if min(counts) < 1:
        raise ConfigError(f"a cache of {min(counts)} experts a layer holds nothing; ask for more")
    return counts


def describe(stem: str, trace: RoutingTrace, sizes: list[int], args: argparse.Namespace) -> None:
    """Print what the trace is, how cacheable it is, and which sizes are hopeless."""
    print(
        f"{stem}: {trace.num_tokens} tokens of {len(trace.seq_len)} sequences, {len(trace.layers)} layers, "
        f"{trace.top_k} of {trace.num_experts} experts"
    )
    if not args.no_statistics:
        parts = [segment_routing(trace, window) for window in SRP_WINDOWS]
        srp = ", ".join(f"m={p.window_tokens} {p.srp:.3f} (rho {p.rho:.2f})" for p in parts if p)
        print(f"  SRP {srp}")
        rates = segment_cache_hit_rates(trace, SCH_WINDOW, sizes)
        sch = ", ".join(f"{size} slots {rate:.3f}" for size, rate in zip(sizes, rates, strict=True))
        print(f"  SCH m={SCH_WINDOW}: {sch}")
    for size in sizes:
        if size < trace.top_k:
            print(
                f"  warning: {size} resident experts a layer is under one token's working set "
                f"(top_k {trace.top_k} in each of {len(trace.layers)} layers)"
            )
    print()


def report_runs(traces: Traces, args: argparse.Namespace) -> int:
    """Replay recorded runs under their own plan and policy, and compare the counters."""
    results, same = [], True
    for stem, trace in traces:
        missing = sorted({"plan", "policy", "expert_bytes", "stats"} - set(trace.metadata))
        if missing:
            raise ConfigError(f"{stem} is no recorded run: its metadata lacks {', '.join(missing)}")
        policy = str(trace.metadata["policy"])
        pools = [
            PoolPlan(**{**pool, "layers": tuple(pool["layers"])}) for pool in trace.metadata["plan"]["pools"]
        ]
        stats = replay(trace, pools, lambda policy=policy: make_policy(policy), bytes_of(trace, args))
        recorded = without_prefetch(trace.metadata["stats"])
        prefetch = (
            "on: what it read and a step used counts as missed" if trace.metadata.get("prefetch") else "off"
        )
        print(f"{stem}: policy {policy}, prefetch {prefetch}")
        for name, value in recorded.items():
            mark = "" if value == getattr(stats, name) else "  differs"
            same &= not mark
            print(f"  {name:14} recorded {value:14}  replayed {getattr(stats, name):14}{mark}")
        row = {"trace": stem, "policy": policy, "slots": sum(pool.num_slots for pool in pools)}
        counters = {name: getattr(stats, name) for name in recorded}
        results.append({**row, "hit_rate": stats.hit_rate, "bytes_moved": stats.demand_bytes, **counters})
    print(json.dumps({**card(args), "same": same, "results": results}))
    return 0 if same else 1


def without_prefetch(recorded: dict[str, int]) -> dict[str, int]:
    """Return a run's counters as they are without prefetch, which changes neither residents nor needs."""
    ahead = recorded["prefetch_useful_bytes"] + recorded["prefetch_late_bytes"]
    return {
        "hits": recorded["hits"],
        "misses": recorded["misses"] + recorded["prefetch_hits"],
        "demand_bytes": recorded["demand_bytes"] + ahead,
        "stream_bytes": recorded["stream_bytes"],
        "evictions": recorded["evictions"],
    }


def card(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "bench": "cache_hit_rate",
        "machine": cpu_name(),
        "cores": os.cpu_count(),
        "commit": commit(),
        "seed": args.seed,
        "profile": args.profile,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "link_bytes_per_s": args.link_bytes_per_s,
        "latency_s": args.latency_s,
    }


if __name__ == "__main__":
    sys.exit(main())
