"""`tune`: measure the machine, let the cost model rank settings, and let real runs decide.

What is written was faster than the plain defaults in runs that took turns with them, beyond the noise of
those runs, or it is the defaults.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_offload import ops
from moe_offload.planning.paired_runs import DUEL_ROUNDS, LEAST_DUEL_ROUNDS, plan_runs, worth_a_duel
from moe_offload.planning.scheduler import SCHEDULERS
from moe_offload.planning.time_budget import Clock, TimeBudget
from moe_offload.planning.tuning import Choice, TuningFacts, ranked, thread_counts, to_verify, token_s
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
from moe_offload.tune_stage import Stage
from moe_offload.tune_tiers import Tiers

TIGHT = "25%"  # where every expert fits, what is kept and read ahead is judged with a quarter of them
MOST_CANDIDATES = 8
SCREEN_SHARE, WRITE_SHARE, RECORD_SHARE = 0.45, 0.12, 0.12  # of a stage's time
FIRST_SHARE = 0.4  # of the time, for threads alone where every expert fits
DEFAULT_SCHEDULER = "hybrid"


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
        stage.plain = defaults.without_prefetch() if plan.cache else defaults
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
        candidates = to_verify(defaults, ranking, MOST_CANDIDATES, stage.plain)
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

        def turns(name: str, choices: list[Choice], rounds: int, within: TimeBudget) -> Rounds:
            first_s = run_s * len(choices)
            times = take_turns(decode, choices, rounds, within, self.clock, first_s)
            stage.note(name, times, facts, run)
            return times

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
            times = turns("screen", tried, plan.screen_rounds, budget.share(SCREEN_SHARE))
            stage.take_best(times)
            rival = worth_a_duel(times, defaults)
        if rival is None:
            stage.verdict = f"the defaults: none of {plan.candidates - 1} others was faster"
            if stage.plain is not None and stage.plain != defaults:
                self.say("prefetching or not", 0.5)
                turns("prefetching or not", [defaults, stage.plain], DUEL_ROUNDS, budget)
            return
        self.say(f"a duel of the defaults and {rival.describe()}", 0.5)
        duel = turns("duel", [defaults, rival], DUEL_ROUNDS, budget)
        if duel[defaults]:
            stage.take_best(duel)
        if len(duel[defaults]) < LEAST_DUEL_ROUNDS:
            stage.verdict = f"the defaults: no time for {LEAST_DUEL_ROUNDS} rounds against {rival.describe()}"
            return
        assert stage.gain is not None, "there were rounds"
        if stage.gain.is_clear:
            stage.choice = rival
            stage.verdict = f"{rival.describe()}: faster than the defaults beyond noise"
        else:
            stage.verdict = f"the defaults: {rival.describe()} is not faster beyond noise"


@dataclass(frozen=True)
class _Result:
    stage: Stage
    slots_hold_all: bool
