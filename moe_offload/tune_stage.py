"""What real runs under one budget showed, kept as evidence, and what holds under several."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_offload.planning.paired_runs import Gain, paired_gain
from moe_offload.planning.tuning import NO_PREDICTOR, Choice, Predictability, TuningFacts, token_s
from moe_offload.runtime.tuning_run import Rounds, TuningRun

LEAST_PAIRS = 2  # of runs with prefetching and without; one says nothing


@dataclass(frozen=True)
class PrefetchGain:
    """How many times as fast the defaults were as the same without prefetching.

    Attributes:
        hit_rate: of the runs without.
    """

    gain: Gain
    pairs: int
    hit_rate: float


@dataclass
class Stage:
    """What real runs under one budget showed.

    Attributes:
        name: which experts fit, in words.
        choice: what is to be used.
        plain: whose runs say what a layer costs: the defaults, nothing read ahead.
        rival: what came closest to the defaults, or beat them; None: nothing else ran.
        gain: of the rival against the defaults, and ``pairs``: in how many rounds of both.
        layer_s: of a mean layer of ``plain``, beside bytes and waiting; None: it did not run.
        stalled_share: of its layers, those with a miss.
        predictors: by name, as they were measured.
        plain_s, beside_plain_s: of ``plain`` and of the defaults, in the rounds that had both.
        slower: than the defaults in any turns, beyond noise or not.
    """

    name: str
    defaults: Choice
    choice: Choice
    plain: Choice | None = None
    rival: Choice | None = None
    gain: Gain | None = None
    verdict: str = ""
    pairs: int = 0
    tokens: int = 0
    layer_s: float | None = None
    stalled_share: float = 0.0
    prefetch: PrefetchGain | None = None
    predictors: Mapping[str, Predictability] = field(default_factory=dict)
    ram_bytes: int = 0
    slots: int = 0
    device_slots: int = 0
    plain_s: list[float] = field(default_factory=list)
    beside_plain_s: list[float] = field(default_factory=list)
    slower: list[Choice] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def note(self, name: str, times: Rounds, facts: TuningFacts, run: TuningRun) -> None:
        """Keep what each candidate did in these turns as evidence."""
        self._note_plain(times, facts, run)
        base, tokens = times[self.defaults], run.counted_tokens(self.tokens)
        for choice, seconds in times.items():
            if not seconds:
                continue
            entry: dict[str, Any] = {
                "settings": "defaults" if choice == self.defaults else choice.describe(),
                "stage": f"{name} {self.name}",
                "tokens_per_s": tokens / statistics.median(seconds),
            }
            if choice.policy in facts.hit_rate and choice.predictor in (*facts.predictors, NO_PREDICTOR):
                entry["modelled_tokens_per_s"] = 1 / token_s(choice, facts)
            if choice != self.defaults:
                gain = paired_gain(base, seconds)
                self.slower += [choice] if gain.speedup < 1.0 else []
                entry["against_defaults"] = gain.speedup
                if len(seconds) > 1:
                    entry |= {"low": gain.low, "high": gain.high}
            entry["pairs"] = len(seconds)
            self.runs.append(entry)

    def _note_plain(self, times: Rounds, facts: TuningFacts, run: TuningRun) -> None:
        """Keep what runs that read nothing ahead say of a layer, and what reading ahead gains on them."""
        if self.plain is None or self.plain not in times:
            return
        self.plain_s += times[self.plain]
        self.beside_plain_s += times[self.defaults]
        seconds, counts = self.plain_s, run.counts[self.plain][-len(self.plain_s) :]
        if not seconds or not counts:
            return
        hit_rate = statistics.median(count.hit_rate for count in counts)
        bytes_s = facts.token.total_bytes / facts.ram_bytes_per_s[self.plain.num_threads]
        tokens = run.counted_tokens(self.tokens)
        busy_s = statistics.median(
            each / tokens - count.stall_s for each, count in zip(seconds, counts, strict=True)
        )
        self.layer_s = max(0.0, busy_s - bytes_s) / max(1, facts.num_layers)
        self.stalled_share = 1.0 - hit_rate**run.checkpoint.spec.top_k
        if self.plain != self.defaults and len(seconds) >= LEAST_PAIRS:
            gain = paired_gain(seconds, self.beside_plain_s)
            self.prefetch = PrefetchGain(gain, len(seconds), hit_rate)

    def take_best(self, times: Rounds) -> None:
        """Keep who came closest to the defaults in these turns, or beat them."""
        base = times[self.defaults]
        gains = {choice: paired_gain(base, seconds) for choice, seconds in times.items() if seconds}
        gains.pop(self.defaults, None)
        if gains:
            self.rival = max(gains, key=lambda choice: gains[choice].speedup)
            self.gain, self.pairs = gains[self.rival], len(base)


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
