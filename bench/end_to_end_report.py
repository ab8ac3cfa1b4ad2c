"""What end_to_end.py prints: card, tables and what a reader should know of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from card import commit, cpu_name
from end_to_end_figures import Row, place_result, prompt_tokens_of

from moe_offload.config import gib
from moe_offload.header_sizes import bytes_per_token
from moe_offload.storage.checkpoint import open_checkpoint


def print_card(args: argparse.Namespace, sizes: dict[str, Any], models: dict[str, Path]) -> None:
    """Say where, what and how much, before anything is measured."""
    print(f"{cpu_name()}, {args.threads} threads, commit {commit()}, {args.rounds} interleaved rounds")
    print(", ".join(f"{name} {value}" for name, value in sizes.items()))
    for mix, path in models.items():
        token = bytes_per_token(open_checkpoint(path), sizes["prompt_tokens"])
        parts = (
            f"dense {gib(token.dense_bytes)}, experts {gib(token.expert_bytes)}, cache {gib(token.kv_bytes)}"
        )
        print(f"{mix}: {gib(path.stat().st_size)} file; a token reads {gib(token.total_bytes)} ({parts})")


def report(rows: Sequence[Row], models: dict[str, Path], prompt_tokens: int) -> list[Row]:
    """Print the tables; return one result per mix and place."""
    results = []
    for mix, path in models.items():
        print_facts(rows, mix)
        for place in dict.fromkeys(row["place"] for row in rows if row["mix"] == mix):
            num_tokens = prompt_tokens_of(place, prompt_tokens)
            token = bytes_per_token(open_checkpoint(path), num_tokens)
            result = place_result(rows, mix, place, token, num_tokens)
            if result is not None:
                results.append(result)
    print_table(results)
    for row in rows:
        if "error" in row:
            print(f"failed: {row['key']}: {row['error']}")
    return results


def print_facts(rows: Sequence[Row], mix: str) -> None:
    """Print what holds for the model wherever it runs: its routing, and whether the work is done."""
    for row in (row for row in rows if row["mix"] == mix):
        if row.get("srp_16") is not None:
            print(
                f"{mix}: measured routing: {row['adjacent_reuse']:.0%} of a token's experts are the next "
                f"token's, SRP(16) {row['srp_16']:.2f}, a quarter of the experts has "
                f"{row['top_quarter_share']:.0%} of the uses"
            )
        if "flipping_used_changes_logits" in row:
            idle = row.get("flipping_idle_changes_logits")
            verdict = "changes" if row["flipping_used_changes_logits"] else "DOES NOT CHANGE"
            rest = (
                "" if idle is None else f", in an unused one {'CHANGES' if idle else 'does not change'} them"
            )
            print(f"{mix}: one flipped byte in a used expert {verdict} the logits{rest}")


def print_table(results: Sequence[Row]) -> None:
    """Print the table of all mixes and places."""
    heads = [
        "mix",
        "place",
        "decode tok/s",
        "llama.cpp",
        "ratio",
        "by median token",
        "llama.cpp",
        "ratio",
        "of ceiling",
        "of disk",
        "hits",
        "read/token",
    ]
    heads += ["prefill tok/s", "llama.cpp", "ratio", "of disk", "reads counted"]
    heads += ["decode J/token", "prefill J/token"]
    print("\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for r in results:
        error = r.get("io_counter_error")
        decode = [
            cell
            for kind in ("decode", "median_decode")
            for cell in (
                text(r[f"ours_{kind}"]),
                text(r.get(f"peer_{kind}")),
                text(r.get(f"{kind}_ratio"), "x"),
            )
        ]
        bounds = [percent(r.get("decode_of_ceiling")), percent(r.get("decode_of_disk"))]
        reads = [f"{r['hit_rate']:.0%}", f"{r['needed_read_bytes_per_token'] / 1e6:.0f} MB"]
        prefill = [text(r["ours_prefill"]), text(r.get("peer_prefill")), text(r.get("prefill_ratio"), "x")]
        counted = [percent(r.get("prefill_of_disk")), "-" if error is None else f"{error:+.1%}"]
        joules = [text(r[name]) for name in ("decode_joules_per_token", "prefill_joules_per_token")]
        cells = [r["mix"], r["place"], *decode, *bounds, *reads, *prefill, *counted, *joules]
        print("| " + " | ".join(cells) + " |")
    print("\nmedian (min–max) over rounds; ceiling: packed bytes of a token at the measured read bandwidth,")
    print(
        "or what it missed at the disk's, whichever is slower; reads counted: /proc/self/io over our counters"
    )
    for r in results:
        print(f"{r['mix']} {r['place']}: {'; '.join(facts(r))}")


def facts(r: Row) -> list[str]:
    """Return what a reader of the table should know of one of its rows."""
    settings = dict.fromkeys(
        value for name, value in r.items() if name.startswith("peer_") and name.endswith("_settings")
    )
    return [
        f"decode step {r['native_step']}",
        f"{r['slots']} of {r['experts']} experts in memory",
        r["energy"],
        f"the same tokens everywhere: {'yes' if r['same_tokens_everywhere'] else 'NO'}",
        *(f"llama.cpp: {name}" for name in settings),
    ]


def text(value: Row | None, unit: str = "") -> str:
    """Return "median (min–max)" with three digits."""
    if value is None:
        return "-"
    median, low, high = (f"{value[name]:.3g}{unit}" for name in ("median", "min", "max"))
    return f"{median} ({low}–{high})"


def percent(value: Row | None) -> str:
    if value is None:
        return "-"
    return f"{value['median']:.0%} ({value['min']:.0%}–{value['max']:.0%})"
