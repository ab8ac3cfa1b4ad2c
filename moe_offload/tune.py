"""`tune`: measure the machine, let the cost model rank settings, and let real runs decide.

What is written was faster than the plain defaults in runs that took turns with them, beyond the noise of
those runs, or it is the defaults.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_offload import ops
from moe_offload.planning.profile_speed import split_overhead
from moe_offload.planning.scheduler import SCHEDULERS
from moe_offload.planning.time_budget import Clock, TimeBudget
from moe_offload.planning.tuning import (
    DUEL_ROUNDS,
    LEAST_DUEL_ROUNDS,
    NO_PREDICTOR,
    Choice,
    Gain,
    Predictability,
    TuningFacts,
    paired_gain,
    plan_runs,
    ranked,
    thread_counts,
    to_verify,
    token_s,
    worth_a_duel,
)
from moe_offload.runtime.model import from_pretrained
from moe_offload.runtime.predictor_choice import GATE_DEPTH, NEEDS_FIT, choose_predictor
from moe_offload.runtime.tuning_run import (
    DEPTHS,
    MOST_TOKENS,
    Rounds,
    Text,
    TuningRun,
    take_turns,
)
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.tune_facts import DEFAULT_POLICY, DEFAULT_PREDICTOR, Say, device_pools, tuning_facts
from moe_offload.tune_tiers import Tiers

TIGHT = "25%"  # where every expert fits, what is kept and read ahead is judged with a quarter of them
MOST_CANDIDATES = 8
SCREEN_SHARE, WRITE_SHARE, RECORD_SHARE = 0.45, 0.12, 0.12  # of a stage's time
FIRST_SHARE = 0.4  # of the time, for threads alone where every expert fits
DEFAULT_SCHEDULER = "hybrid"


@dataclass
class Stage:
    """What real runs under one budget showed.

    Attributes:
        name: which experts fit, in words.
        choice: what is to be used.
        rival: what came closest to the defaults, or beat them; None: nothing else ran.
        gain: of the rival against the defaults, and ``pairs``: in how many rounds of both.
    """

    name: str
    defaults: Choice
    choice: Choice
    rival: Choice | None = None
    gain: Gain | None = None
    verdict: str = ""
    pairs: int = 0
    tokens: int = 0
    layer_overhead_s: float = 0.0  # of a layer that misses nothing
    stall_overhead_s: float | None = None  # what misses add to one; None: there were too few
    predictors: Mapping[str, Predictability] = field(default_factory=dict)  # by name, as they were measured
    ram_bytes: int = 0
    slots: int = 0
    device_slots: int = 0
    slower: list[Choice] = field(default_factory=list)  # than the defaults in any turns, beyond noise or not
    runs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """One load of the model: its cap on experts, and the settings that are open in it."""

    name: str
    experts: str | int | None
    cache: bool


def default_choice(checkpoint: Checkpoint, has_device: bool = False) -> Choice:
    """Return what from_pretrained does without a profile."""
    found = choose_predictor(DEFAULT_PREDICTOR, checkpoint)
    depth = found.fit.depth if found.fit is not None and found.name in NEEDS_FIT else GATE_DEPTH
    scheduler = DEFAULT_SCHEDULER if has_device else None
    return Choice(ops.usable_cores(), DEFAULT_POLICY, DEFAULT_PREDICTOR, depth, scheduler)


class Tuner:
    """Verifies settings on one checkpoint.

    Args:
        load: further arguments of from_pretrained: ram, experts, context, device, vram.
        budget: of all stages together.
        say: told what is being done.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        path: Path,
        tiers: Tiers,
        budget: TimeBudget,
        load: dict[str, Any],
        *,
        say: Say = lambda what, share: None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.checkpoint, self.path, self.tiers, self.budget = checkpoint, path, tiers, budget
        self.load, self.say, self.clock = load, say, clock
        self.defaults = default_choice(checkpoint, tiers.device is not None)
        self.schedulers = list(SCHEDULERS) if tiers.device is not None else [None]

    def stages(self) -> list[Stage]:
        """Verify settings in the caller's budget, and where all experts fit into it, in a tight one, too."""
        first = self._stage(Plan("as the budget has it", self.load.get("experts"), True), self.budget)
        if not first.slots_hold_all:
            return [first.stage]
        tight = Plan(f"with {TIGHT} of the experts in memory", TIGHT, True)
        second = self._stage(tight, self.budget, first.stage.choice)
        return [first.stage, second.stage]

    def _stage(self, plan: Plan, budget: TimeBudget, before: Choice | None = None) -> _Result:
        self.say(f"loading the model, {plan.name}", 0.0)
        model = from_pretrained(
            self.path,
            **{**self.load, "experts": plan.experts},
            policy=DEFAULT_POLICY,
            predictor=DEFAULT_PREDICTOR,
            prefetch=True,
            num_threads=ops.usable_cores(),
            profile="none",
            warm_start=False,
        )
        try:
            holds_all = all(pool.num_staging == 0 for pool in model.offload.plan.pools)
            share = FIRST_SHARE if holds_all else 1.0  # the rest is for the tight budget
            run = TuningRun(model, self.checkpoint, self.clock)
            part = TimeBudget(share * budget.left_s, self.clock)
            stage = self._verify(run, replace(plan, cache=plan.cache and not holds_all), part, before)
            stage.ram_bytes = model.offload.plan.ram_bytes
            stage.slots = sum(pool.num_slots for pool in model.offload.plan.pools)
            stage.device_slots = sum(pool.num_slots for pool in device_pools(run))
            return _Result(stage, holds_all)
        finally:
            model.offload.close()

    def _verify(self, run: TuningRun, plan: Plan, budget: TimeBudget, before: Choice | None) -> Stage:
        """Return what runs under one budget show; threads and scheduler stay as decided ``before``."""
        defaults = self.defaults
        stage = Stage(plan.name, defaults, defaults)
        self.say(f"recording {plan.name}", 0.0)
        text = run.write(MOST_TOKENS, budget.share(WRITE_SHARE))
        trace = run.record(text, budget.share(RECORD_SHARE))
        facts = tuning_facts(run, self.tiers, text, trace, has_cache=plan.cache, say=self.say)
        counts = [before.num_threads] if before else thread_counts(ops.usable_cores())
        schedulers = [before.scheduler] if before else self.schedulers
        ranking = ranked(facts, counts, DEPTHS, schedulers)
        if not plan.cache:
            same = [replace(defaults, num_threads=count) for count in counts]
            ranking = [replace(choice, scheduler=name) for choice in same for name in schedulers]
            same = [replace(defaults, vram_staging=to.vram_staging) for _, to in facts.divided]
            ranking = sorted(dict.fromkeys([*ranking, *same]), key=lambda choice: token_s(choice, facts))
        candidates = to_verify(defaults, ranking, MOST_CANDIDATES)
        if before is not None and before != defaults:
            candidates = list(dict.fromkeys([defaults, before, *candidates]))
        stage.predictors = facts.predictors
        self._decide(run, text, stage, candidates, facts, budget)
        return stage

    def _decide(
        self,
        run: TuningRun,
        text: Text,
        stage: Stage,
        candidates: list[Choice],
        facts: TuningFacts,
        budget: TimeBudget,
    ) -> None:
        """Let all candidates take turns, then the best of them and the defaults alone; the duel decides."""
        defaults = stage.defaults
        step_s = statistics.median(text.step_s)
        plan = plan_runs(
            step_s=step_s,
            left_s=budget.left_s,
            most_tokens=text.token_ids.shape[1],
            most_candidates=len(candidates),
        )
        stage.tokens, run_s = plan.tokens, plan.tokens * step_s

        def decode(choice: Choice) -> float:
            return run.run(choice, text, stage.tokens)

        if not plan.candidates:
            stage.verdict = "the defaults: no time for rounds of runs"
            return
        decode(defaults)  # counts nothing: whoever goes first would read what all others find
        rival: Choice | None = candidates[1]
        if plan.screen_rounds:
            tried = candidates[: plan.candidates]
            self.say(f"verifying {len(tried)} candidates {stage.name}", 0.0)
            share, first_s = budget.share(SCREEN_SHARE), run_s * len(tried)
            times = take_turns(decode, tried, plan.screen_rounds, share, self.clock, first_s)
            self._note(stage, "screen", times, facts, run)
            _best_of(stage, times)
            rival = worth_a_duel(times, defaults)
        if rival is None:
            stage.verdict = f"the defaults: none of {plan.candidates - 1} others was faster"
            return
        self.say(f"a duel of the defaults and {rival.describe()}", 0.5)
        duel = take_turns(decode, [defaults, rival], DUEL_ROUNDS, budget, self.clock, 2 * run_s)
        self._note(stage, "duel", duel, facts, run)
        if duel[defaults]:
            _best_of(stage, duel)
        if len(duel[defaults]) < LEAST_DUEL_ROUNDS:
            stage.verdict = f"the defaults: no time for {LEAST_DUEL_ROUNDS} rounds against {rival.describe()}"
            return
        assert stage.gain is not None, "there were rounds"
        if stage.gain.is_clear:
            stage.choice = rival
            stage.verdict = f"{rival.describe()}: faster than the defaults beyond noise"
        else:
            stage.verdict = f"the defaults: {rival.describe()} is not faster beyond noise"

    def _note(self, stage: Stage, name: str, times: Rounds, facts: TuningFacts, run: TuningRun) -> None:
        """Keep what each candidate did as evidence."""
        base = times[stage.defaults]
        tokens = run.counted_tokens(stage.tokens)
        if base and not stage.runs:
            layer_s = self._layer_overhead(run, base, facts, stage.tokens)
            stalled = 1.0 - facts.hit_rate[self.defaults.policy] ** self.checkpoint.spec.top_k
            stage.layer_overhead_s, stage.stall_overhead_s = split_overhead(layer_s, stalled)
        for choice, seconds in times.items():
            if not seconds:
                continue
            entry: dict[str, Any] = {
                "settings": "defaults" if choice == stage.defaults else choice.describe(),
                "stage": f"{name} {stage.name}",
                "tokens_per_s": tokens / statistics.median(seconds),
            }
            if choice.policy in facts.hit_rate and (
                choice.predictor in facts.predictors or choice.predictor == NO_PREDICTOR
            ):
                entry["modelled_tokens_per_s"] = 1 / token_s(choice, facts)
            if choice != stage.defaults:
                gain = paired_gain(base, seconds)
                stage.slower += [choice] if gain.speedup < 1.0 else []
                entry["against_defaults"] = gain.speedup
                if len(seconds) > 1:
                    entry |= {"low": gain.low, "high": gain.high}
            entry["pairs"] = len(seconds)
            stage.runs.append(entry)

    def _layer_overhead(
        self, run: TuningRun, seconds: list[float], facts: TuningFacts, num_tokens: int
    ) -> float:
        """Return what a layer costs beside bytes and waiting for them, in the defaults' runs."""
        bytes_s = facts.token.total_bytes / facts.ram_bytes_per_s[self.defaults.num_threads]
        step_s = statistics.median(seconds) / run.counted_tokens(num_tokens)
        return max(0.0, step_s - run.stall_s - bytes_s) / max(1, facts.num_layers)


def _best_of(stage: Stage, times: Rounds) -> None:
    """Keep who came closest to the defaults in these turns, or beat them."""
    base = times[stage.defaults]
    gains = {choice: paired_gain(base, seconds) for choice, seconds in times.items() if seconds}
    gains.pop(stage.defaults, None)
    if gains:
        stage.rival = max(gains, key=lambda choice: gains[choice].speedup)
        stage.gain, stage.pairs = gains[stage.rival], len(base)


@dataclass(frozen=True)
class _Result:
    stage: Stage
    slots_hold_all: bool


def combined(stages: list[Stage]) -> tuple[Choice, Stage]:
    """Return the settings that hold in every stage, and the stage that gained most.

    The first stage decides the threads and the scheduler, the last one what is kept and read ahead; what
    was slower than the defaults in any turns of the last stage is not taken: in doubt the defaults stay.
    """
    choice = stages[0].choice
    if len(stages) > 1 and stages[-1].choice != stages[-1].defaults:
        choice = stages[-1].choice
    elif len(stages) > 1 and choice in stages[-1].slower:
        choice = stages[-1].defaults
    best = max(
        stages, key=lambda stage: stage.gain.speedup if stage.gain and stage.choice != stage.defaults else 0.0
    )
    return choice, best
