"""The replays of cache_hit_rate.py: every trace under every policy, in processes of their own."""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np

from moe_offload.config import parse_bytes
from moe_offload.planning.eviction import make_policy
from moe_offload.replay import layer_pools, replay
from moe_offload.replay_layers import replay_layers, scorer_of
from moe_offload.stats import OffloadStats
from moe_offload.terminal import Progress
from moe_offload.trace import RoutingTrace, sequence_digests

ASSUMED_EXPERT_BYTES = 1 << 20

Traces = list[tuple[str, RoutingTrace]]
TRACES: Traces = []  # a worker's own


def run_all(
    traces: Traces, names: list[str], sizes: list[list[int]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Replay every trace under every policy, several processes at a time; the two bounds always."""
    wanted = dict.fromkeys(["lru", "belady", *names])
    tasks = [(index, name) for index in range(len(traces)) for name in wanted]
    rows: dict[tuple[int, str], list[dict[str, Any]]] = {}
    with (
        Progress("replaying", sys.stderr, lambda count: f"{count:.0f} replays") as progress,
        _pool(traces, min(args.jobs, len(tasks))) as pool,
    ):
        futures = {pool.submit(run_one, i, name, sizes[i], args): (i, name) for i, name in tasks}
        for count, future in enumerate(as_completed(futures), start=1):
            rows[futures[future]] = future.result()
            progress.update(count, len(tasks))
    return add_bounds([{**row, "asked": name in names} for i, name in tasks for row in rows[i, name]])


def _pool(traces: Traces, jobs: int) -> Executor:
    """Return new processes that have the traces; a thread where one is enough."""
    if jobs <= 1:
        return ThreadPoolExecutor(1, initializer=_keep, initargs=(traces,))
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of libraries' threads
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_keep, initargs=(traces,))


def _keep(traces: Traces) -> None:
    TRACES[:] = traces


def run_one(index: int, name: str, sizes: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Replay one trace under one policy in all sizes."""
    stem, trace = TRACES[index]
    random.seed(args.seed)
    np.random.seed(args.seed)
    base = {"trace": stem, "policy": name, "pool": args.pool}
    policy = make_policy(name, oracles=True)
    shared = set(getattr(policy, "trained_on", ())) & set(sequence_digests(trace))
    if shared:
        refusal = f"{len(shared)} of its {len(trace.seq_len)} sequences are among the policy's training data"
        return [{**base, "slots": size, "hit_rate": None, "refused": refusal} for size in sizes]
    expert_bytes = bytes_of(trace, args)
    started = time.perf_counter()
    scorer = scorer_of(policy, trace) if args.pool == "layer" else None
    if scorer is not None:
        results = replay_layers(trace, scorer, sizes, expert_bytes)
    else:
        results = [
            replay(
                trace,
                layer_pools(trace, size, shared=args.pool == "shared"),
                lambda: make_policy(name, oracles=True),
                expert_bytes,
            )
            for size in sizes
        ]
    took_s = (time.perf_counter() - started) / len(sizes)
    return [
        {**base, "slots": size, **figures(stats, trace, args), "replay_s": round(took_s, 2)}
        for size, stats in zip(sizes, results, strict=True)
    ]


def figures(stats: OffloadStats, trace: RoutingTrace, args: argparse.Namespace) -> dict[str, Any]:
    read_s = stats.misses * args.latency_s + stats.demand_bytes / args.link_bytes_per_s
    return {
        "hit_rate": stats.hit_rate,
        "hits": stats.hits,
        "misses": stats.misses,
        "bytes_moved": stats.demand_bytes,
        "modelled_read_s_per_token": read_s / trace.num_tokens,
    }


def add_bounds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Set each row's distance to Belady and the share of the way from LRU to it; return those asked for."""
    bounds = {(r["trace"], r["slots"], r["policy"]): r["hit_rate"] for r in rows}
    for row in rows:
        lru, belady = (bounds[row["trace"], row["slots"], name] for name in ("lru", "belady"))
        if row["hit_rate"] is not None:
            row["below_belady"] = belady - row["hit_rate"]
            row["closed"] = (row["hit_rate"] - lru) / (belady - lru) if belady > lru else None
    return [row for row in rows if row.pop("asked")]


def bytes_of(trace: RoutingTrace, args: argparse.Namespace) -> dict[int, int]:
    """Return an expert's bytes by layer."""
    if args.expert_bytes:
        return dict.fromkeys(trace.layers, parse_bytes(args.expert_bytes))
    known = trace.metadata.get("expert_bytes", {})
    return {layer_idx: int(known.get(str(layer_idx), ASSUMED_EXPERT_BYTES)) for layer_idx in trace.layers}
