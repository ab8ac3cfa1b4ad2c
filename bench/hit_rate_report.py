"""What cache_hit_rate.py prints and writes: tables, CSV, JSON, a plot, and the machine's card."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any


def print_tables(rows: list[dict[str, Any]]) -> None:
    for trace, slots in dict.fromkeys((row["trace"], row["slots"]) for row in rows):
        print(f"{trace}, {slots} slots a layer\n")
        print("| policy | hit rate | below Belady | closed | moved | modelled read/token |")
        print("|---|---|---|---|---|---|")
        group = [row for row in rows if (row["trace"], row["slots"]) == (trace, slots)]
        for row in sorted(group, key=lambda row: -(row["hit_rate"] or 0.0)):
            print(table_line(row))
        print()


def table_line(row: dict[str, Any]) -> str:
    if row["hit_rate"] is None:
        return f"| {row['policy']} | refused: {row['refused']} | | | | |"
    closed = "" if row["closed"] is None else f"{row['closed']:.0%}"
    return (
        f"| {row['policy']} | {row['hit_rate']:.4f} | {row['below_belady']:.4f} | {closed} "
        f"| {row['bytes_moved'] / 1e9:.1f} GB | {row['modelled_read_s_per_token'] * 1e3:.2f} ms |"
    )


def write_files(result: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.csv:
        shared = {name: value for name, value in result.items() if name != "results"}
        rows = [{**row, **shared} for row in result["results"]]
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
            writer.writeheader()
            writer.writerows(rows)
    if args.plot:
        plot(result["results"], args.plot)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no plot: matplotlib is not installed (pip install "moe_offload[bench]")', file=sys.stderr)
        return
    traces = list(dict.fromkeys(row["trace"] for row in rows))
    figure = Figure(figsize=(6 * len(traces), 5), layout="constrained")
    for axes, trace in zip(figure.subplots(1, len(traces), squeeze=False)[0], traces, strict=True):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            points = [
                r for r in rows if (r["trace"], r["policy"]) == (trace, policy) and r["hit_rate"] is not None
            ]
            axes.plot([r["slots"] for r in points], [r["hit_rate"] for r in points], "o-", label=policy)
        axes.set(title=trace, xlabel="resident experts a layer", ylabel="hit rate")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
