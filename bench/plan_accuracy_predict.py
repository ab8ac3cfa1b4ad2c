"""What `plan` says of a case, from what the machine gave in all rehearsals so far: for plan_accuracy.py."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from plan_accuracy_runs import (
    BETWEEN_TOKENS,
    COLD_TOKENS,
    Pace,
    choices,
    fresh_pages,
    process_of,
    ram_bytes,
)


@dataclass
class Rehearsals:
    """What the machine was measured to give, again and again: `plan` keeps the same, and takes medians."""

    overheads: list[Any] = field(default_factory=list)
    steps: dict[Path, list[Any]] = field(default_factory=dict)
    pace_s: list[float] = field(default_factory=list)  # during the last one

    def rehearse(self, path: Path) -> None:
        """Measure what the program and the model's steps cost now."""
        from moe_offload.measure_steps import measure_steps
        from moe_offload.runtime.native_families import native_step_reason
        from moe_offload.runtime.yardstick import measure_overheads
        from moe_offload.storage.checkpoint import open_checkpoint

        checkpoint, pace = open_checkpoint(path), Pace()
        is_native = native_step_reason(checkpoint.config) is None
        pace.look(5)
        with fresh_pages():
            self.overheads.append(replace(measure_overheads(), token_s=0.0))
        pace.look(5)
        with fresh_pages():
            self.steps.setdefault(path, []).append(measure_steps(checkpoint, is_native=is_native))
        pace.look(5)
        self.pace_s = pace.take()

    def machine(self, path: Path) -> Any:
        """Return the machine as it is as a rule."""
        from moe_offload.planning.machine_speed import medians

        return replace(medians(self.steps[path]), overheads=medians(self.overheads))


def predict(
    path: Path, share: str, context: int, traces: list[Any], rehearsals: Rehearsals
) -> dict[str, dict[str, Any]]:
    """Return what plan says of prefill, cold and warm decoding on the machine as it was measured."""
    from moe_offload.header_costs import place
    from moe_offload.outlook import Planner
    from moe_offload.storage.checkpoint import open_checkpoint

    checkpoint, machine = open_checkpoint(path), rehearsals.machine(path)
    process, config = process_of(checkpoint), choices(share, context)
    planners = [
        Planner(checkpoint, machine, config, process=process, trace=trace, prompt_tokens=context)
        for trace in traces
    ]
    placement = place(checkpoint, config, ram_bytes=ram_bytes(path, share, context), process=process)
    chunks = [planner.chunks(placement) for planner in planners]
    prefill = planners[0].prefill(placement, [mean_of(same) for same in zip(*chunks, strict=True)])
    assert prefill is not None
    found: dict[str, dict[str, Any]] = {"prefill": {"tokens_per_s": prefill.tokens_per_s}}
    found["prefill"]["walls_s"] = dict(prefill.walls_s)
    splits = {
        "cold": (context, context + COLD_TOKENS),
        "warm": (context + COLD_TOKENS + BETWEEN_TOKENS, None),
    }
    for phase, (first, end) in splits.items():
        parts = [trace if end is None else trace.head(end) for trace in traces]
        hits = mean_hits(checkpoint, placement, parts, config.policy, first)
        speed = planners[0].decode(placement, hits)
        found[phase] = {
            "tokens_per_s": speed.tokens_per_s, "binding": speed.binding, "hit_rate": hits.rate,
            "walls_s": dict(speed.walls_s),
        }  # fmt: skip
    found["warm"]["machine"] = asdict(machine)
    return {phase: {**values, "pace_s": rehearsals.pace_s} for phase, values in found.items()}


def mean_hits(checkpoint: Any, placement: Any, traces: list[Any], policy: str, first: int) -> Any:
    """Return what tokens from ``first`` on find in memory, on average over texts."""
    from moe_offload.hit_outlook import Hits, replayed_hits

    hits = [replayed_hits(checkpoint, placement.pools, trace, policy, split=first)[1] for trace in traces]
    misses = [statistics.fmean(shares) for shares in zip(*(hit.misses for hit in hits), strict=True)]
    return Hits(statistics.fmean(hit.rate for hit in hits), tuple(misses))


def mean_of(chunks: Any) -> Any:
    """Return the same chunk of several texts as one."""
    names = ("used", "read", "fresh")
    return replace(chunks[0], **{n: statistics.fmean(getattr(chunk, n) for chunk in chunks) for n in names})
