"""Fit the eviction policy to what fit-predictor recorded, and say on held-out text what it is worth."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moe_offload.errors import ConfigError
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.policies.horizon import HorizonFit
from moe_offload.planning.policies.horizon_fit import fit_horizon
from moe_offload.predictors.fit import Recording
from moe_offload.replay_layers import replay_layers, scorer_of
from moe_offload.trace import RoutingTrace, make_trace

RESIDENT_SHARE = 0.25  # of a layer's experts, where the policies are compared


@dataclass(frozen=True)
class PolicyReport:
    """Hit rates by policy on held-out text, from cold, with ``residents`` experts of each layer."""

    residents: int
    hit_rates: dict[str, float]

    @property
    def is_better(self) -> bool:
        """Whether the fit finds more than the coefficients that are the same for every model."""
        return self.hit_rates["horizon, fitted"] > self.hit_rates["horizon"]

    def closed(self, name: str) -> float | None:
        """Return the share of the way from LRU to Belady; None where there is no way to go."""
        lru, belady = self.hit_rates["lru"], self.hit_rates["belady"]
        return (self.hit_rates[name] - lru) / (belady - lru) if belady > lru else None


def trace_of(recording: Recording, num_experts: int) -> RoutingTrace:
    """Return a recording's routing as if each of its tokens had been decoded."""
    return make_trace(
        recording.experts,
        num_experts=num_experts,
        weights=recording.weights,
        layers=recording.layers,
        seq_len=recording.seq_len,
    )


def fit_policy(
    recording: Recording, num_experts: int, on_progress: Callable[[int, int], None] | None = None
) -> HorizonFit:
    """Return horizon's coefficients for the recorded model; ``on_progress``: (layers done, in all)."""
    return fit_horizon([trace_of(recording, num_experts)], on_progress=on_progress)


def keep_if_better(fit: HorizonFit, held_out: Recording, num_experts: int, path: Path) -> PolicyReport:
    """Compare on held-out text, and write the fit where it finds more than none.

    Raises:
        ConfigError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fit.write(partial)
        report = compare(trace_of(held_out, num_experts), partial)
        if report.is_better:
            partial.replace(path)
    except OSError as error:
        raise ConfigError(
            f"the fitted policy cannot be written to {path}: {error.strerror}; set XDG_CACHE_HOME to another "
            "folder or pass -o"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return report


def compare(trace: RoutingTrace, fit_path: Path) -> PolicyReport:
    """Replay a trace under LRU, under horizon without and with a fit, and under Belady's rule."""
    names = {name: name for name in ("lru", "horizon")}
    names |= {"horizon, fitted": f"horizon={fit_path}", "belady": "belady"}
    residents = max(1, int(RESIDENT_SHARE * trace.num_experts))
    expert_bytes = dict.fromkeys(trace.layers, 1)
    rates = {}
    for label, name in names.items():
        scorer = scorer_of(make_policy(name, oracles=True), trace)
        assert scorer is not None, f"{name} is replayed layer by layer"
        rates[label] = replay_layers(trace, scorer, [residents], expert_bytes)[0].hit_rate
    return PolicyReport(residents, rates)
