"""Ratios for laptops that are not at hand, from recorded routing and the cost model; labelled ``modelled``.

A trace is replayed token by token through a card that holds a share of each layer's experts; the scheduler
under test judges each layer with a data sheet's bandwidths times what programs usually reach of them. Only
experts are counted: the dense part is the same for all. Decayed frequency stands for every method's cache
but the static ones: the hottest experts of the whole trace, seen in advance, or whole layers. Copies that
admit an expert without serving the step use the link while it idles, and only then happen. No GPU's result.

    python bench/gpu_modelled.py [--traces FILE.npz ...] [--tokens 1500] [--expert-bytes N]

replays other recordings than the demo model's (any file that trace.read_trace reads).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from card import commit

from moe_offload.device import load_profile
from moe_offload.planning.scheduler import SCHEDULERS, LayerWork, Schedule
from moe_offload.trace import RoutingTrace, read_trace

PROFILES = ("rtx-4060-laptop", "rtx-3060-desktop")
EXPERT_BYTES = 3 * 2048 * 768 * 18 // 32  # Qwen3-30B-A3B's in Q4_0
REACHED = {"ram": 0.75, "vram": 0.8, "link": 0.85}  # of a data sheet's peak
COPY_LATENCY_S, LAUNCH_S = 10e-6, 5e-6
DECAY = 0.98
NUM_TRACES = 3  # seconds of replay each
NO_ENERGY = "no energy: no machine ran, and data sheets give limits of power, not what a token draws"
SHARES = (0.12, 0.25, 0.5)
METHODS = ("hybrid", "on_demand", "static_split", "static_layers", "hybrimoe_greedy")


def main() -> None:
    args = parse_args()
    found = []
    for row in rows(args.traces, args.tokens, args.expert_bytes):
        ratios = ", ".join(f"{method} {ratio:.2f}" for method, ratio in row["others_over_ours"].items())
        print(f"{row['profile']} {row['vram_percent']}%: {ratios}", flush=True)
        found.append(row)
    said = {"tokens": args.tokens, "expert_bytes": args.expert_bytes, "commit": commit()}
    print(json.dumps({"bench": "gpu_modelled", "label": "modelled", **said, "rows": found}))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, nargs="+", default=demo_traces())
    parser.add_argument("--tokens", type=int, help="of each trace, from its beginning; default: all")
    parser.add_argument("--expert-bytes", type=int, default=EXPERT_BYTES)
    return parser.parse_args()


def demo_traces() -> list[Path]:
    """Return recordings of the demo model."""
    return sorted((Path(__file__).parent / "data" / "traces").glob("*.npz"))[:NUM_TRACES]


def rows(
    traces: Sequence[Path] = (), tokens: int | None = None, expert_bytes: int = EXPERT_BYTES
) -> Iterator[dict[str, Any]]:
    """Yield seconds per token for experts, by machine, share in VRAM and method; medians over the traces."""
    paths = traces or demo_traces()
    loaded = [read_trace(path).decode_only() for path in paths]
    loaded = [trace if tokens is None else trace.head(tokens) for trace in loaded]
    for name in PROFILES:
        for share in SHARES:
            seconds = {
                method: float(
                    np.median([token_s(trace, name, share, method, expert_bytes) for trace in loaded])
                )
                for method in METHODS
            }
            ours = seconds["hybrid"]
            yield {
                "label": "modelled",
                "profile": name,
                "vram_percent": round(100 * share),
                "traces": [path.name for path in paths],
                "expert_s_per_token": seconds,
                "energy": NO_ENERGY,
                "others_over_ours": {method: value / ours for method, value in seconds.items()},
            }


def token_s(
    trace: RoutingTrace, profile_name: str, share: float, method: str, expert_bytes: int = EXPERT_BYTES
) -> float:
    """Return the seconds of a token's experts over all layers, the second half of the trace."""
    profile = load_profile(profile_name)
    cpu_s = expert_bytes / (profile.value("ram", "read_bandwidth") * REACHED["ram"])
    gpu_s = expert_bytes / (profile.value("gpu", "read_bandwidth") * REACHED["vram"])
    link = profile.value("link", "to_device_bandwidth") * REACHED["link"]
    copy_s = expert_bytes / link + COPY_LATENCY_S
    slots = max(trace.top_k, int(share * trace.num_experts))
    num_layers = len(trace.layers)
    layers = [_Layer(trace, i, slots, is_static=method.startswith("static")) for i in range(num_layers)]
    if method == "static_layers":  # whole layers on the card, as llama.cpp's --n-cpu-moe
        for i, layer in enumerate(layers):
            layer.resident[:] = i < round(share * num_layers)
        method = "static_split"
    total_s, counted, first = 0.0, 0, trace.num_tokens // 2
    for token in range(trace.num_tokens):
        for i, layer in enumerate(layers):
            ids = trace.experts[token, i].astype(np.int64)
            n = len(ids)
            work = LayerWork(
                cpu_s=np.full(n, cpu_s),
                gpu_s=np.full(n, gpu_s),
                on_gpu=layer.resident[ids],
                in_ram=np.ones(n, np.bool_),
                copy_s=copy_s,
                gpu_start_s=LAUNCH_S,
            )
            schedule = layer.step(ids, work, SCHEDULERS[method])
            if token >= first:
                total_s += schedule.finish_s
        counted += token >= first
    return total_s / counted


class _Layer:
    """What of a layer lies in VRAM, and how hot its experts are."""

    def __init__(self, trace: RoutingTrace, index: int, slots: int, *, is_static: bool) -> None:
        counts = np.bincount(trace.experts[:, index].ravel(), minlength=trace.num_experts)
        self.resident = np.zeros(trace.num_experts, np.bool_)
        self.resident[np.argsort(-counts, kind="stable")[:slots] if is_static else slice(0, slots)] = True
        self.heat = np.zeros(trace.num_experts)
        self.is_static, self.idle_link_s = is_static, 0.0

    def step(self, ids: np.ndarray, work: LayerWork, scheduler: Callable[[LayerWork], Schedule]) -> Schedule:
        """Schedule a step; what was copied for it stays, and idle link time admits what is hotter."""
        schedule = scheduler(work)
        if self.is_static:
            return schedule
        self.heat *= DECAY
        self.heat[ids] += 1
        copied = ids[schedule.on_gpu & ~work.on_gpu]
        self.idle_link_s += max(0.0, schedule.finish_s - len(copied) * work.copy_s)
        for expert_id in copied:
            self._admit(int(expert_id))
        for expert_id in ids[~schedule.on_gpu & ~work.on_gpu]:
            if self.idle_link_s >= work.copy_s and self.heat[expert_id] > self._coldest()[1]:
                self.idle_link_s -= work.copy_s
                self._admit(int(expert_id))
        self.idle_link_s = min(self.idle_link_s, 4 * work.copy_s)  # what is not used is not saved up
        return schedule

    def _coldest(self) -> tuple[int, float]:
        found = np.flatnonzero(self.resident)
        victim = int(found[np.argmin(self.heat[found])])
        return victim, float(self.heat[victim])

    def _admit(self, expert_id: int) -> None:
        self.resident[self._coldest()[0]] = False
        self.resident[expert_id] = True


if __name__ == "__main__":
    main()
