"""One loaded model, the same tokens again and again, under one choice of settings after the other.

The text is the model's own: it begins with its first token and samples with a fixed seed, so that no
tokenizer and no file is needed. Whatever the settings, the tokens are forced to be the same, which makes
the runs comparable token by token.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_offload import ops
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.gain_switch import GainSwitch
from moe_offload.planning.prediction import Predictor
from moe_offload.planning.prefetch_plan import Threshold
from moe_offload.planning.prefetch_switch import PrefetchSwitch
from moe_offload.planning.time_budget import Clock, TimeBudget
from moe_offload.planning.tuning import Choice, Predictability
from moe_offload.predictors.evaluate import evaluate
from moe_offload.predictors.fit import Recording
from moe_offload.residency.policy_fit import automatic_policy
from moe_offload.runtime import skeleton
from moe_offload.runtime.predictor_choice import choose_predictor
from moe_offload.runtime.predictor_making import make_predictor
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.expert_format import ExpertKey
from moe_offload.trace import RoutingTrace

SEED = 0
MOST_TOKENS, LEAST_TOKENS = 256, 16
MOST_RECORDED = 128  # tokens whose routing is kept
WARM_SHARE = 0.25  # of a run's tokens, the first ones: they find what the run before left behind
LEAST_MISSES = 30  # fewer say nothing of how many are guessed
DEPTHS = (1, 2)  # layers ahead
HISTORIES = ("previous_token", "frequency")  # predictors of every model, beside "auto"


@dataclass(frozen=True, eq=False)
class Text:
    """What the model wrote, (1, T) int64, and the seconds of its T - 1 steps."""

    token_ids: torch.Tensor
    step_s: Sequence[float]


@dataclass(frozen=True)
class Counts:
    """What the runtime counted of a run's tokens that count.

    Attributes:
        stall_s: of a token, waiting for reads.
        hit_rate: share of its experts that were in memory, or guessed in time.
    """

    stall_s: float
    hit_rate: float


@dataclass
class _State:
    """What a candidate keeps between its runs."""

    predictor: Predictor | None
    switch: GainSwitch
    threshold: Threshold
    policy_states: Sequence[Mapping[str, NDArray[Any]]] = field(default=())
    sharing: GainSwitch = field(default_factory=GainSwitch)  # of device and CPU
    device_states: Sequence[Mapping[str, NDArray[Any]]] = field(default=())  # of the device's policies
    on_device: Sequence[ExpertKey] = field(default=())


class TuningRun:
    """Runs of ``model`` under choices; ``model.offload.close()`` stays the caller's."""

    def __init__(self, model: Any, checkpoint: Checkpoint, clock: Clock) -> None:
        self.model, self.checkpoint, self.clock = model, checkpoint, clock
        self._link = model.offload.prefetcher.link
        self._states: dict[Choice, _State] = {}
        self.counts: defaultdict[Choice, list[Counts]] = defaultdict(list)  # of each choice's runs, in turn

    def write(self, num_tokens: int, budget: TimeBudget) -> Text:
        """Let the model write; fewer tokens than asked for where the budget ends, LEAST_TOKENS at least."""
        chooser = torch.Generator().manual_seed(SEED)
        ids, seconds = [_first_token(self.checkpoint)], []
        cache = self.model.offload.new_cache(num_tokens)
        with torch.no_grad():
            while len(ids) < num_tokens and (len(ids) < LEAST_TOKENS or not budget.is_over):
                started = self.clock()
                token = torch.tensor([ids[-1:]])
                out = self.model(input_ids=token, past_key_values=cache, use_cache=True)
                seconds.append(self.clock() - started)
                chances = out.logits[0, -1].float().softmax(-1)
                ids.append(int(torch.multinomial(chances, 1, generator=chooser)))
        return Text(torch.tensor([ids]), seconds)

    def record(self, text: Text, budget: TimeBudget) -> RoutingTrace:
        """Return the routing of the text's first tokens, with router inputs."""
        ids = text.token_ids[:, :MOST_RECORDED]
        cache, done = self.model.offload.new_cache(ids.shape[1]), 0
        with torch.no_grad(), self.model.offload.trace(router_inputs=True) as recorder:
            while done < ids.shape[1] and (done < LEAST_TOKENS or not budget.is_over):
                token = ids[:, done : done + 1]
                self.model(input_ids=token, past_key_values=cache, use_cache=True)
                done += 1
            trace: RoutingTrace = recorder.trace()
        return trace

    def run(self, choice: Choice, text: Text, num_tokens: int) -> float:
        """Decode the text's first tokens under ``choice``; return the seconds of those that count."""
        self.apply(choice)
        offload, ids = self.model.offload, text.token_ids[:, :num_tokens]
        cache, warm = offload.new_cache(ids.shape[1]), max(1, int(WARM_SHARE * ids.shape[1]))
        started, before = self.clock(), (0.0, 0, 0)
        with torch.no_grad():
            for position in range(ids.shape[1]):
                if position == warm:
                    started, before = self.clock(), self._counters()
                token = ids[:, position : position + 1]
                self.model(input_ids=token, past_key_values=cache, use_cache=True)
        seconds = self.clock() - started
        stall_s, hits, needs = (now - then for now, then in zip(self._counters(), before, strict=True))
        rate = hits / needs if needs else 1.0
        self.counts[choice].append(Counts(stall_s / max(1, ids.shape[1] - warm), rate))
        self._remember(choice)
        return seconds

    def _counters(self) -> tuple[float, int, int]:
        """Return the seconds waited, the experts found in time and those needed, since load."""
        stats = self.model.offload.stats()
        found = stats.hits + stats.prefetch_hits
        return stats.stall_s, found, found + stats.misses

    def _remember(self, choice: Choice) -> None:
        """Keep what a choice learned for its next run, and what it had on the device."""
        offload, state = self.model.offload, self._states[choice]
        state.policy_states = offload.cache.policy_states()
        if offload.hybrid is not None:
            device = offload.hybrid.tier.cache
            state.device_states, state.on_device = device.policy_states(), device.residents()

    def counted_tokens(self, num_tokens: int) -> int:
        """Return how many tokens of a run's ``num_tokens`` are in its seconds."""
        return num_tokens - max(1, int(WARM_SHARE * num_tokens))

    def apply(self, choice: Choice) -> None:
        """Make the model run as ``choice`` says, with what the choice had learned in its last run."""
        state = self._states.get(choice)
        if state is None:
            predictor = self.predictor(choice.predictor, choice.prefetch_depth) if choice.prefetch else None
            state = self._states[choice] = _State(predictor, PrefetchSwitch(), Threshold())
        offload = self.model.offload
        ops.set_num_threads(choice.num_threads)
        offload.cache.use_policy(partial(make_policy, self._policy(choice)), state.policy_states)
        offload.cache.use_division(choice.ram_staging, choice.exclusive)
        if state.predictor is None:
            offload.prefetcher.use(None, switch=None)
        else:
            state.predictor.new_sequence()
            offload.prefetcher.use(
                state.predictor, switch=state.switch, threshold=state.threshold, link=self._link
            )

        self._apply_device(choice, state)

    def _policy(self, choice: Choice) -> str:
        return automatic_policy(choice.policy, self.checkpoint)

    def _apply_device(self, choice: Choice, state: _State) -> None:
        """Let the choice's scheduler find what its own last run left on the device: nothing, at first.

        A static split would else live on what another scheduler had copied.
        """
        hybrid = self.model.offload.hybrid
        if hybrid is None or choice.scheduler is None or not hybrid.tier.is_on:
            return
        hybrid.tier.cache.use_policy(partial(make_policy, self._policy(choice)), state.device_states)
        hybrid.tier.cache.use_division(choice.vram_staging)
        hybrid.tier.hold_only(state.on_device)
        hybrid.use(choice.scheduler, state.sharing)

    def predictor(self, name: str, depth: int) -> Predictor | None:
        """Return a predictor of this model by name, as from_pretrained would make it."""
        choice = choose_predictor(name, self.checkpoint)
        return make_predictor(choice, self.model, sorted(skeleton.experts_modules(self.model)), depth=depth)

    def predictability(
        self, names: Iterable[str], text: Text, trace: RoutingTrace, missed: NDArray[np.bool_]
    ) -> dict[str, Predictability]:
        """Return what predictors find of the recorded choices, and what asking them takes.

        Args:
            missed: (T, layers, E), what was not in memory; the first tokens, that find an empty one, aside.
        """
        recording = _recording(text, trace)
        counted = missed.copy()
        counted[: int(WARM_SHARE * len(missed))] = False
        result = {}
        for name in names:
            recall: dict[int, float] = {}
            of_missed: dict[int, float] = {}
            predict_s = 0.0
            for depth in DEPTHS:
                predictor = self.predictor(name, depth)
                if predictor is None:
                    break
                evaluation = evaluate(predictor, recording, trace.num_experts)
                found = evaluation.recall(depth, trace.top_k)
                if found is None:
                    break
                recall[depth] = found
                found = evaluation.recall(depth, trace.top_k, among=counted)
                if found is not None and counted.sum() >= LEAST_MISSES:
                    of_missed[depth] = found
                if depth == DEPTHS[0]:
                    predict_s = statistics.median(evaluation.predict_s)
            if recall:
                result[name] = Predictability(recall, predict_s, of_missed)
        return result


def _first_token(checkpoint: Checkpoint) -> int:
    """Return a token that texts of the model begin with, or one of its vocabulary."""
    sources = (checkpoint.generation_config or {}, checkpoint.config)
    for name in ("bos_token_id", "eos_token_id"):
        for source in sources:
            ids = source.get(name)
            first = ids[0] if isinstance(ids, list) and ids else ids
            if isinstance(first, int) and 0 <= first < checkpoint.spec.vocab_size:
                return first
    return 0


def _recording(text: Text, trace: RoutingTrace) -> Recording:
    assert trace.router_inputs is not None and trace.weights is not None, "recorded with inputs"
    return Recording(
        layers=trace.layers,
        router_inputs=trace.router_inputs,
        experts=trace.experts.astype(np.int64),
        weights=trace.weights.astype(np.float32),
        seq_len=np.array([trace.num_tokens], np.int64),
        token_ids=text.token_ids[0, : trace.num_tokens].numpy(),
        embeddings=None,
        residual_rms={},
    )


Rounds = dict[Choice, list[float]]


def take_turns(
    run: Callable[[Choice], float],
    choices: Sequence[Choice],
    rounds: int,
    budget: TimeBudget,
    clock: Clock,
    round_s: float,
) -> Rounds:
    """Run every choice once a round, each round in another order; only whole rounds count.

    A round that would end after the budget is not begun, as far as the slowest so far tells.

    Args:
        round_s: what the first one should take.
    """
    times: Rounds = {choice: [] for choice in choices}
    for number in range(rounds):
        if round_s > budget.left_s:
            break
        started, order = clock(), list(choices)
        order = order[number % len(order) :] + order[: number % len(order)]
        done = {choice: run(choice) for choice in order}
        for choice, seconds in done.items():
            times[choice].append(seconds)
        round_s = max(round_s, clock() - started)
    return times
