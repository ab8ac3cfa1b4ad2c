"""Which of several measured predictors is the best to run: what it finds against what it costs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LINK_BYTES_PER_S = 1e9  # of a disk that is waited for; a faster one makes predictions worth less
NEEDED_SHARE = 0.5  # of a token's experts that are not resident, where prefetching matters at all


def saved_us(recall: float, predict_us: float, top_k: int, expert_bytes: float) -> float:
    """Return the time that a predictor saves a layer step, its own taken off.

    Args:
        recall: of the true experts, one layer ahead.
        predict_us: its measured cost.
    """
    read_us = expert_bytes / LINK_BYTES_PER_S * 1e6
    return recall * NEEDED_SHARE * top_k * read_us - predict_us


def best_predictor(held_out: dict[str, Any], top_k: int, names: Iterable[str]) -> str | None:
    """Return whichever of ``names`` saves most by a fit's report; None where it reports none of them.

    Args:
        held_out: of the report: by predictor what predictors/evaluate.py's ``summarize`` returns, and
            "expert_bytes".
    """
    saved = {
        name: saved_us(
            held_out[name]["ahead"]["1"]["recall"],
            held_out[name]["predict_us"][0],
            top_k,
            held_out["expert_bytes"],
        )
        for name in names
        if name in held_out
    }
    return max(saved, key=saved.__getitem__) if saved else None
