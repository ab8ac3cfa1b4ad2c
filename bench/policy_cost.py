"""What does an eviction policy's book-keeping cost a decode step, in microseconds of one layer?

    python bench/policy_cost.py [--policies horizon,lru,ewma] [--layers 48] [--experts 128] [--top-k 8]

One pool over all layers, as the runtime has it, a quarter of the experts resident by default, routing that
keeps about half of every token's experts. The calls that a cache makes of a policy (insertions, the choice,
victims, evictions) are recorded once and then made again by themselves, through Python, as the runtime
makes them; what the loop itself takes is measured with a policy that only repeats the recorded victims and
subtracted. ``horizon+fit`` is horizon with coefficients for every layer (random: their values cost nothing).
Prints a card, a table, and one last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from card import commit, cpu_name

from moe_offload.planning.eviction import EvictionPolicy, LruPolicy, make_policy
from moe_offload.planning.plans import PoolPlan
from moe_offload.planning.policies.horizon import RATES, HorizonFit
from moe_offload.replay import Event, ReplayPool
from moe_offload.stats import OffloadStats
from moe_offload.storage.expert_format import ExpertKey

KEPT = 0.5  # of a token's experts, from the token before
NUM_BEFORE = 7  # layers, of horizon+fit


class Step(NamedTuple):
    """One layer's step as the cache told it."""

    inserted: list[ExpertKey]
    layer_idx: int
    expert_ids: list[int]
    weights: list[float]
    victims: list[ExpertKey]


class Repeats:
    """A policy that knows whom it has to evict: what the loop costs without one."""

    name = "repeats"

    def __init__(self, steps: list[Step]) -> None:
        self._victims = iter([step.victims for step in steps if step.victims])

    def on_route(self, layer_idx: int, expert_ids: Any, expert_weights: Any) -> None:
        """Nothing to note."""

    def on_insert(self, key: ExpertKey) -> None:
        """Nothing to note."""

    def on_evict(self, key: ExpertKey) -> None:
        """Nothing to note."""

    def victims(self, candidates: Collection[ExpertKey], count: int) -> list[ExpertKey]:
        return next(self._victims)


class Recorder(LruPolicy):
    """LRU, with its calls kept as steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._inserted: list[ExpertKey] = []

    def on_insert(self, key: ExpertKey) -> None:
        super().on_insert(key)
        self._inserted.append(key)

    def on_route(self, layer_idx: int, expert_ids: Any, expert_weights: Any) -> None:
        super().on_route(layer_idx, expert_ids, expert_weights)
        self.steps.append(Step(self._inserted, layer_idx, list(expert_ids), list(expert_weights), []))
        self._inserted = []

    def on_evict(self, key: ExpertKey) -> None:
        super().on_evict(key)
        self.steps[-1].victims.append(key)


def main() -> None:
    args = parse_args()
    steps, hit_rate = record(args)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row_of(name, steps, args, Path(folder)) for name in args.policies.split(",")]
    print(
        f"{cpu_name()}, commit {commit()}: {args.experts} experts x {args.layers} layers, top {args.top_k}, "
    )
    print(f"{args.resident:.0%} resident, hit rate {hit_rate:.2f}, {len(steps) - args.layers} layer steps\n")
    print("| policy | us per layer step | the choice alone |\n|---|---|---|")
    for row in rows:
        print(f"| {row['policy']} | {row['us']:.2f} | {row['choice_us']:.2f} |")
    print(json.dumps({"bench": "policy_cost", "machine": cpu_name(), "commit": commit(), **vars(args),
                      "hit_rate": hit_rate, "results": rows}))  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policies", default="horizon,horizon+fit,lru,ewma")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--resident", type=float, default=0.25, help="share of the experts")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def record(args: argparse.Namespace) -> tuple[list[Step], float]:
    """Return the steps of a run under LRU that changes the policy's victims in nothing but who they are."""
    num_experts = args.experts * args.layers
    staging = args.top_k
    plan = PoolPlan(
        1, tuple(range(args.layers)), num_experts, round(args.resident * num_experts) + staging, staging
    )
    recorder, stats = Recorder(), OffloadStats()
    pool = ReplayPool(plan, args.experts, recorder, stats, dict.fromkeys(range(args.layers), 1))
    for event in routing(args):
        pool.route(event)
    return recorder.steps, stats.hit_rate


def routing(args: argparse.Namespace) -> list[Event]:
    """Each layer keeps about ``KEPT`` of its experts from token to token and draws the others."""
    generator = np.random.default_rng(args.seed)
    last = [generator.choice(args.experts, args.top_k, replace=False) for _ in range(args.layers)]
    events = []
    for _ in range(args.tokens):
        for layer_idx, before in enumerate(last):
            kept = before[generator.random(args.top_k) < KEPT]
            others = np.setdiff1d(np.arange(args.experts), kept)
            drawn = generator.choice(others, args.top_k - len(kept), replace=False)
            last[layer_idx] = np.concatenate([kept, drawn])
            ids = sorted(last[layer_idx].tolist())
            events.append(Event(layer_idx, ids, [1.0 / args.top_k] * args.top_k, None))
    return events


def row_of(name: str, steps: list[Step], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    make = maker(name, args, folder)
    took = {"us": [], "choice_us": []}
    for _ in range(args.rounds):
        loop_s = replay_s(Repeats(steps), steps)
        took["us"].append((replay_s(make(), steps) - loop_s) / len(steps) * 1e6)
        took["choice_us"].append(choices_s(make(), steps) / len(steps) * 1e6)
    return {"policy": name, **{key: statistics.median(values) for key, values in took.items()}}


def maker(name: str, args: argparse.Namespace, folder: Path) -> Callable[[], EvictionPolicy]:
    if name != "horizon+fit":
        return lambda: make_policy(name)
    path = folder / "random.npz"
    generator, experts = np.random.default_rng(args.seed), args.experts
    own, before = (
        generator.normal(size=(args.layers, *shape)).astype(np.float32) * 0.01
        for shape in ((experts, len(RATES), experts), (NUM_BEFORE, experts, experts))
    )
    constant = np.zeros((args.layers, experts), np.float32)
    HorizonFit(tuple(range(args.layers)), own, before, constant, (), "random").write(path)
    return lambda: make_policy(f"horizon={path}")


def replay_s(policy: EvictionPolicy, steps: list[Step]) -> float:
    """Make the recorded calls of ``policy``, as many victims as recorded, its own; return the seconds."""
    residents: dict[ExpertKey, None] = {}
    started = time.perf_counter()
    for inserted, layer_idx, expert_ids, weights, victims in steps:
        for key in inserted:
            if key not in residents:
                residents[key] = None
                policy.on_insert(key)
        policy.on_route(layer_idx, expert_ids, weights)
        if victims:
            for key in policy.victims(residents.keys(), len(victims)):
                policy.on_evict(key)
                del residents[key]
    return time.perf_counter() - started


def choices_s(policy: EvictionPolicy, steps: list[Step]) -> float:
    started = time.perf_counter()
    for _, layer_idx, expert_ids, weights, _ in steps:
        policy.on_route(layer_idx, expert_ids, weights)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
