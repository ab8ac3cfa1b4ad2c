"""What plan_accuracy.py found: how far predictions were off, and how far the machine was from itself.

A case has rounds, each with what was predicted and what was then measured; see ``settle``.
"""

from __future__ import annotations

import statistics
from typing import Any

SHARES = ("12.5%", "25%", "50%", "100%")
PARTS = ("predicted", "measured")
SAME_MACHINE = 1 / 5  # by which the times of the same arithmetic may differ
GOAL, GOAL_SHARE = 0.2, 0.9


def case_key(name: str, share: str, context: int, phase: str) -> str:
    return f"{name}, {share} of the experts, {context} tokens, {phase}"


def settle(cases: dict[str, Any], key: str, predicted: dict[str, Any], measured: dict[str, Any]) -> None:
    """Add a round; the case's rates are the medians of its rounds', all else is of the last one."""
    rounds = cases.get(key, {}).get("rounds", [])
    rounds.append({"predicted": predicted, "measured": measured})
    cases[key] = {"rounds": rounds} | {
        part: rounds[-1][part] | {"tokens_per_s": statistics.median(rates(rounds, part))} for part in PARTS
    }


def rates(rounds: list[dict[str, Any]], part: str) -> list[float]:
    """Return the tokens per second of each round, predicted or measured."""
    return [one[part]["tokens_per_s"] for one in rounds]


def error(case: dict[str, Any]) -> float:
    """Return predicted over measured speed, less one."""
    return float(case["predicted"]["tokens_per_s"] / case["measured"]["tokens_per_s"] - 1)


def apart(case: dict[str, Any]) -> float:
    """Return how much more the fastest measurement of a case gave than the slowest."""
    measured = rates(case["rounds"], "measured")
    return float(max(measured) / min(measured) - 1)


def change(case: dict[str, Any]) -> float:
    """Return by how much the machine's speed differed between a rehearsal and its measurement, at most."""
    return max(change_of(one["predicted"], one["measured"]) for one in case["rounds"])


def change_of(predicted: dict[str, Any], measured: dict[str, Any]) -> float:
    pairs = zip(measured["pace_s"], predicted["pace_s"], strict=True)
    return max(max(now / then, then / now) for now, then in pairs) - 1


def summary(cases: dict[str, Any]) -> dict[str, Any]:
    """Return how many cases are within the goal, for decoding and for prompts."""
    result: dict[str, Any] = {"goal": f"within {GOAL:.0%} in {GOAL_SHARE:.0%} of the cases, each kind"}
    for kind in ("decode", "prefill"):
        found = [case for key, case in cases.items() if key.endswith("prefill") == (kind == "prefill")]
        steady = [case for case in found if change(case) <= SAME_MACHINE]
        result[kind] = of_errors([error(case) for case in found])
        result[kind]["steady"] = of_errors([error(case) for case in steady])
        result[kind]["of_rounds"] = of_errors([error(one) for case in found for one in case["rounds"]])
        result[kind]["apart"] = statistics.median([apart(case) for case in found]) if found else 0.0
    result["changes"] = of_errors([change["error"] for change in changes(cases).values()])
    result["met"] = all(result[kind]["share"] >= GOAL_SHARE for kind in ("decode", "prefill"))
    return result


def changes(cases: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return what more memory was said to bring to decoding and what it brought: `plan`'s "to change it".

    Each budget against the next smaller one, both loaded and measured; rates as a multiple of the smaller's.
    """
    found = {}
    for key, case in cases.items():
        name, share, rest = key.split(", ", 2)
        position = SHARES.index(share.split()[0])
        smaller = cases.get(f"{name}, {SHARES[position - 1]} of the experts, {rest}") if position else None
        if smaller is None or rest.endswith("prefill"):
            continue
        said, seen = (case[part]["tokens_per_s"] / smaller[part]["tokens_per_s"] for part in PARTS)
        found[f"{SHARES[position - 1]} to {key}"] = {
            "predicted": said,
            "measured": seen,
            "error": said / seen - 1,
        }
    return found


def of_errors(errors: list[float]) -> dict[str, Any]:
    """Return how many errors there are, and how many are within the goal."""
    within = sum(abs(value) <= GOAL for value in errors)
    if not errors:
        return {"cases": 0}
    return {
        "cases": len(errors),
        "within": within,
        "share": within / len(errors),
        "median_error": statistics.median(errors),
        "worst_error": max(errors, key=abs),
    }


def print_table(cases: dict[str, Any]) -> None:
    for key, case in cases.items():
        predicted, measured = case["predicted"], case["measured"]
        hits = f"{predicted['hit_rate']:.0%}/{measured['hit_rate']:.0%}" if "hit_rate" in measured else "-"
        print(
            f"{key:60} {predicted['tokens_per_s']:9.4g} predicted {measured['tokens_per_s']:9.4g} measured "
            f"{error(case):+6.0%}  hits {hits:9} {predicted.get('binding', ''):8} machine "
            f"{'changed by' if change(case) > SAME_MACHINE else 'within'} {change(case):.0%}, "
            f"{len(case['rounds'])} measurements {apart(case):.0%} apart",
            flush=True,
        )
