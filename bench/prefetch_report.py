"""What bench/prefetch.py makes of its runs: medians, intervals of a paired bootstrap, tables, JSON."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from card import commit, cpu_name
from energy import per_token_text

RESAMPLES = 10_000


def figures(name: str, runs: dict[str, list[dict[str, Any]]], seed: int) -> dict[str, Any]:
    """Return medians over the rounds; against "none": speed and stall, paired, with 95% intervals."""
    mine = runs[name]
    median: dict[str, Any] = {
        key: None if mine[0][key] is None else statistics.median(run[key] for run in mine)
        for key in mine[0]
        if key != "state"
    }
    result = {**median, "state": mine[-1]["state"]}
    if "none" in runs:
        speed = np.array([[run["tokens_per_s"] for run in runs[which]] for which in (name, "none")])
        result["faster"] = interval(
            lambda rows: np.median(speed[0, rows] / speed[1, rows]) - 1, len(mine), seed
        )
    if {"none", "perfect"} <= set(runs):
        stall = np.array([[run["stall_s"] for run in runs[which]] for which in ("none", name, "perfect")])

        def recovered(rows: Any) -> Any:
            none, own, perfect = np.median(stall[:, rows], axis=1)
            return (none - own) / (none - perfect) if none > perfect else np.nan

        result["recovered"] = interval(recovered, len(mine), seed)
    return result


def interval(statistic: Callable[[Any], Any], count: int, seed: int) -> list[float]:
    """Return [estimate, 2.5%, 97.5%] over resampled rounds."""
    generator = np.random.default_rng(seed)
    samples = [float(statistic(generator.integers(0, count, count))) for _ in range(RESAMPLES // 10)]
    low, high = np.nanpercentile(samples, [2.5, 97.5]) if not np.isnan(samples).all() else (np.nan,) * 2
    return [float(statistic(np.arange(count))), float(low), float(high)]


def report(results: list[dict[str, Any]], args: argparse.Namespace, energy: str) -> None:
    disk = (
        f"simulated disk: {args.delay_s * 1e3:g} ms more per read" if args.delay_s else "this machine's disk"
    )
    print(
        f"{cpu_name()}, {args.model or 'demo model'}, {disk}, {args.rounds} rounds of {args.tokens} tokens, "
    )
    print(f"policy {args.policy}, commit {commit()}; {energy}\n")
    print(
        "| experts | mode | tok/s | faster (95%) | stall | recovered (95%) | used | late | wasted | J/tok | |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for result in results:
        for name, row in result["modes"].items():
            faster = "{:+.1%} ({:+.1%} to {:+.1%})".format(*row["faster"]) if "faster" in row else ""
            recovered = "{:.0%} ({:.0%} to {:.0%})".format(*row["recovered"]) if "recovered" in row else ""
            print(
                f"| {result['experts']} | {name} | {row['tokens_per_s']:.1f} | {faster} "
                f"| {row['stall_s'] * 1e3:.2f} ms | {recovered} | {row['useful_bytes'] / 1e6:.2f} MB "
                f"| {row['late_bytes'] / 1e6:.2f} MB | {row['wasted_bytes'] / 1e6:.2f} MB "
                f"({row['wasted_share']:.0%}) | {per_token_text(row)} | {row['state']}"
            )
    print_answers(results)
    card = {"bench": "prefetch", "machine": cpu_name(), "commit": commit(), "energy": energy, **vars(args)}
    print(json.dumps({**card, "simulated_disk": bool(args.delay_s), "results": results}))


def print_answers(results: list[dict[str, Any]]) -> None:
    """Print what the benchmark asks, share by share: does ours pay?"""
    print("\n| experts | stall of none | of perfect | recovered by ours (95%) | wasted | speed (95%) |")
    print("|---|---|---|---|---|---|")
    for result in results:
        none, ours, perfect = (result["modes"].get(name) for name in ("none", "ours", "perfect"))
        if none and ours and perfect:
            print(
                f"| {result['experts']} | {none['stall_s'] * 1e3:.2f} ms | {perfect['stall_s'] * 1e3:.2f} ms "
                "| {:.0%} ({:.0%} to {:.0%}) ".format(*ours["recovered"])
                + f"| {ours['wasted_share']:.0%} "
                + "| {:+.1%} ({:+.1%} to {:+.1%}) |".format(*ours["faster"])
            )
    print()
