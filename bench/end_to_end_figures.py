"""Speeds, ratios and ceilings of end_to_end.py: pure functions of its records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from moe_offload.planning.cost_model import TokenBytes, decode_floor_s, prefill_floor_s

Row = dict[str, Any]


def memory_of(place: str) -> str:
    """Return "ram", or the size of the cgroup that a place is."""
    return place.partition("@")[0]


def prompt_tokens_of(place: str, default: int) -> int:
    """Return the tokens of the prompt in a place: "2GiB@4096" has 4096."""
    return int(place.partition("@")[2] or default)


def decode_speed(row: Row) -> float:
    return len(row["token_s"]) / sum(row["token_s"])


def median_speed(row: Row) -> float:
    """Return the speed of the median token, which no other program's turn on the cores has slowed."""
    return 1 / statistics.median(row["token_s"])


def prefill_speed(row: Row, prompt_tokens: int) -> float:
    return float(prompt_tokens / row["prefill_s"])


def usable(rows: Sequence[Row], mix: str, place: str, program: str) -> list[Row]:
    """Return the runs that measured both prefill and decode."""
    return [
        row
        for row in rows
        if (row["mix"], row["place"], row["program"]) == (mix, place, program)
        and row.get("prefill_s")
        and row.get("token_s")
    ]


def best_variants(rows: Sequence[Row], mix: str, place: str) -> set[str]:
    """Return the names of the peer's settings that decode and that prefill fastest."""
    runs = usable(rows, mix, place, "llama")
    if not runs:
        return set()
    fastest = max(runs, key=decode_speed), min(runs, key=lambda row: row["prefill_s"])
    return {row["settings"]["name"] for row in fastest}


def place_result(
    rows: Sequence[Row], mix: str, place: str, token: TokenBytes, prompt_tokens: int
) -> Row | None:
    """Return medians with spread, ratios and ceilings of one mix in one place; None without our runs."""
    ours = usable(rows, mix, place, "ours")
    if not ours:
        return None
    bandwidth = {
        row["round"]: row
        for row in rows
        if (row["mix"], row["place"], row["program"]) == (mix, place, "bandwidth")
        and "disk_bytes_per_s" in row
    }
    result: Row = {
        "mix": mix, "place": place, "token_bytes": token.total_bytes,
        "ours_decode": spread([decode_speed(row) for row in ours]),
        "ours_median_decode": spread([median_speed(row) for row in ours]),
        "ours_prefill": spread([prefill_speed(row, prompt_tokens) for row in ours]),
        "native_step": ours[-1].get("native_step"),
        "slots": ours[-1].get("slots"), "experts": ours[-1].get("experts"),
    }  # fmt: skip
    result |= peer_figures(rows, mix, place, ours, prompt_tokens)
    result |= cache_figures(ours) | energy_figures(ours)
    rounds = [(row, bandwidth[row["round"]]) for row in ours if row["round"] in bandwidth]
    if rounds:
        result |= ceilings(rounds, token)
    same_prompt = [
        row
        for row in usable_everywhere(rows, mix)
        if prompt_tokens_of(row["place"], 0) == prompt_tokens_of(place, 0)
    ]
    choices = {tuple(row["choices"]) for row in same_prompt}
    shortest = min(len(choice) for choice in choices)
    result["same_tokens_everywhere"] = len({choice[:shortest] for choice in choices}) == 1
    return result


def usable_everywhere(rows: Sequence[Row], mix: str) -> list[Row]:
    return [row for row in rows if row["mix"] == mix and row["program"] == "ours" and row.get("choices")]


def spread(values: Sequence[float]) -> Row:
    """Return median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def peer_figures(rows: Sequence[Row], mix: str, place: str, ours: Sequence[Row], prompt_tokens: int) -> Row:
    """Return the peer's speeds at its best settings for each, and the ratios round by round."""
    runs = usable(rows, mix, place, "llama")
    if not runs:
        return {}
    result: Row = {}
    for phase, speed in (
        ("decode", decode_speed),
        ("median_decode", median_speed),
        ("prefill", lambda row: prefill_speed(row, prompt_tokens)),
    ):
        by_settings: dict[str, list[Row]] = {}
        for row in runs:
            by_settings.setdefault(row["settings"]["name"], []).append(row)
        most = max(len(group) for group in by_settings.values())
        full = {name: group for name, group in by_settings.items() if len(group) == most}
        name, group = max(full.items(), key=lambda item: statistics.median(map(speed, item[1])))
        peer_by_round = {row["round"]: speed(row) for row in group}
        result[f"peer_{phase}"] = spread(list(peer_by_round.values()))
        result[f"peer_{phase}_settings"] = name
        ratios = [speed(row) / peer_by_round[row["round"]] for row in ours if row["round"] in peer_by_round]
        if ratios:
            result[f"{phase}_ratio"] = spread(ratios)
    return result


def cache_figures(ours: Sequence[Row]) -> Row:
    """Return hit rate and reads of decoding, and how far our counters are from the kernel's."""
    counters = [row["decode_counters"] for row in ours]
    needs = [c["hits"] + c["prefetch_hits"] + c["misses"] for c in counters]
    found = [c["hits"] + c["prefetch_hits"] for c in counters]
    result: Row = {
        "hit_rate": statistics.median(f / n for f, n in zip(found, needs, strict=True)),
        "resident_rate": statistics.median(c["hits"] / n for c, n in zip(counters, needs, strict=True)),
        "needed_read_bytes_per_token": statistics.median(needed_read_bytes(row) for row in ours),
        "wasted_read_bytes_per_token": statistics.median(
            c["prefetch_wasted_bytes"] / c["decode_steps"] for c in counters
        ),
        "stall_s_per_token": statistics.median(c["stall_s"] / c["decode_steps"] for c in counters),
        "peak_bytes": max(row["peak_bytes"] for row in ours),
    }
    errors = [
        row["io_read_bytes"] / row["counted_read_bytes"] - 1 for row in ours if row["counted_read_bytes"]
    ]
    if errors:
        result["io_counter_error"] = max(errors, key=abs)
    return result


def energy_figures(ours: Sequence[Row]) -> Row:
    """Return joules per token, idle subtracted, where something counted them, and what did or why none."""
    result: Row = {"energy": ours[-1].get("energy", "no energy: not measured")}
    for name in ("prefill_joules_per_token", "decode_joules_per_token"):
        values = [row[name] for row in ours if row.get(name) is not None]
        result[name] = spread(values) if values else None
    return result


def needed_read_bytes(row: Row) -> float:
    """Return the bytes a decoded token read that it needed: all but wasted speculation."""
    c = row["decode_counters"]
    return float(
        (c["demand_bytes"] + c["prefetch_useful_bytes"] + c["prefetch_late_bytes"]) / c["decode_steps"]
    )


def ceilings(rounds: Sequence[tuple[Row, Row]], token: TokenBytes) -> Row:
    """Return the shares of what memory and disk allow that ours reached, round by round."""
    decode, disk, prefill = [], [], []
    for row, machine in rounds:
        reads = needed_read_bytes(row)
        floor_s = decode_floor_s(
            token,
            ram_bytes_per_s=machine["ram_bytes_per_s"],
            missed_bytes=reads,
            disk_bytes_per_s=machine["disk_bytes_per_s"],
        )
        decode.append(decode_speed(row) * floor_s)
        disk.append(decode_speed(row) * reads / machine["disk_bytes_per_s"])
        if row["prefill_stream_bytes"]:
            floor_s = prefill_floor_s(row["prefill_stream_bytes"], machine["disk_bytes_per_s"])
            prefill.append(floor_s / row["prefill_s"])
    return {
        "decode_of_ceiling": spread(decode),
        "decode_of_disk": spread(disk),
        **({"prefill_of_disk": spread(prefill)} if prefill else {}),
        "ram_bytes_per_s": statistics.median(machine["ram_bytes_per_s"] for _, machine in rounds),
        "disk_bytes_per_s": statistics.median(machine["disk_bytes_per_s"] for _, machine in rounds),
    }
