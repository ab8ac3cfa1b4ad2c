"""Which settings to try, what they should cost, and which of them real runs showed to be faster.

Pure arithmetic on what tune measured. A model of a token ranks the candidates; it decides nothing: what
is chosen has to beat the plain defaults in runs that take turns with theirs, by more than the noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from moe_offload.config import STAGING_PER_TOP_K
from moe_offload.planning.cost_model import TokenBytes
from moe_offload.planning.tuning_device import DeviceFacts

NO_PREDICTOR = "none"
MARGIN = 0.02  # a gain below this is none
SCREEN_ROUNDS, DUEL_ROUNDS, LEAST_DUEL_ROUNDS = 3, 12, 3
LEAST_RUN_TOKENS = 8
# Student's t, two-sided 99%, by degrees of freedom; the normal's value beyond. Not 95%: a setting stays for
# long, and a host that others share has hours in which neighbouring rounds are slow together.
STUDENT_T = (63.7, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25, 3.17, 3.11, 3.05, 3.01, 2.98, 2.95)
NORMAL_T = 2.58


@dataclass(frozen=True)
class Division:
    """How slots are divided among residents and reads in flight, and between the tiers; see ``Choice``."""

    ram_staging: float = STAGING_PER_TOP_K
    vram_staging: float = STAGING_PER_TOP_K
    exclusive: bool = True

    def describe(self) -> str:
        """Return what is not as by default."""
        words = [
            f", {name} {value:g}"
            for name, value in (("ram_staging", self.ram_staging), ("vram_staging", self.vram_staging))
            if value != STAGING_PER_TOP_K
        ]
        return "".join(words) + ("" if self.exclusive else ", inclusive")


@dataclass(frozen=True)
class Choice:
    """Settings that change the time of a token and never the token.

    Attributes:
        predictor: "none": nothing is read ahead.
        prefetch_depth: layers ahead; 1 where nothing is.
        scheduler: of device and CPU; None: there is no device.
        ram_staging, vram_staging: slots of a tier that are kept for reads in flight, times top_k.
        exclusive: what the device has leaves RAM first.
    """

    num_threads: int
    policy: str
    predictor: str
    prefetch_depth: int = 1
    scheduler: str | None = None
    ram_staging: float = STAGING_PER_TOP_K
    vram_staging: float = STAGING_PER_TOP_K
    exclusive: bool = True

    @property
    def division(self) -> Division:
        """How the slots of the tiers are divided."""
        return Division(self.ram_staging, self.vram_staging, self.exclusive)

    @property
    def prefetch(self) -> bool:
        return self.predictor != NO_PREDICTOR

    def describe(self) -> str:
        """Return it in a few words."""
        ahead = f"{self.predictor} {self.prefetch_depth} ahead" if self.prefetch else "no prefetch"
        threads = f"{self.num_threads} thread{'s' if self.num_threads > 1 else ''}"
        shared = f", {self.scheduler}" if self.scheduler is not None else ""
        return f"{threads}, {self.policy}, {ahead}{shared}{self.division.describe()}"


@dataclass(frozen=True)
class Predictability:
    """What a predictor does on the recorded text.

    Attributes:
        recall: by depth (1 ...), the share of a layer's experts among as many guesses.
        predict_s: of one prediction.
        missed_recall: the same share of those that were not in memory, which are harder to guess and alone
            save a wait; without a depth where too few missed to tell.
    """

    recall: Mapping[int, float]
    predict_s: float
    missed_recall: Mapping[int, float] = field(default_factory=dict)

    def of_misses(self, depth: int) -> float:
        """Return the share of misses that are guessed; of all experts where that is all that is known."""
        return self.missed_recall.get(depth, self.recall.get(depth, 0.0))


@dataclass(frozen=True)
class DividedHits:
    """Shares of the experts that are found in RAM, or above, and on the device."""

    ram: float
    device: float


@dataclass(frozen=True)
class TuningFacts:
    """What was measured of machine, model and text; the candidates are judged by it.

    Attributes:
        ram_bytes_per_s: by number of threads, the kernels' own.
        disk_bytes_per_s: while the kernels run.
        hit_rate: by policy, of the recorded trace replayed in this budget's slots.
        divided: the same by policy and another division of the slots, for the policies that it was asked of.
        predictors: by name.
        layer_overhead_s: what a layer costs beside bytes.
        device: None without one.
    """

    token: TokenBytes
    num_layers: int
    ram_bytes_per_s: Mapping[int, float]
    disk_bytes_per_s: float
    hit_rate: Mapping[str, float]
    predictors: Mapping[str, Predictability]
    layer_overhead_s: float = 0.0
    device: DeviceFacts | None = None
    divided: Mapping[tuple[str, Division], DividedHits] = field(default_factory=dict)

    def hits(self, policy: str, division: Division) -> DividedHits:
        """Return what a policy finds in slots that are divided so."""
        plain = DividedHits(self.hit_rate[policy], self.device.hit_rate[policy] if self.device else 0.0)
        return self.divided.get((policy, division), plain)


def token_s(choice: Choice, facts: TuningFacts) -> float:
    """Return the modelled seconds of a decoded token.

    A layer reads its weights from RAM; the reads of its misses run beside the experts at hand, those that
    were predicted beside the layers before, too, and wrong guesses take their share of the disk. On a device
    the experts take what the choice's scheduler makes of them.
    """
    layers = max(1, facts.num_layers)
    ram_bytes_per_s = facts.ram_bytes_per_s[choice.num_threads]
    hits = facts.hits(choice.policy, choice.division)
    hit_rate = hits.ram
    expert_bytes = facts.token.expert_bytes / layers
    experts_s = expert_bytes / ram_bytes_per_s
    other_s = facts.token.total_bytes / layers / ram_bytes_per_s - experts_s
    if facts.device is not None and choice.scheduler is not None:
        experts_s = facts.device.layer_s(choice.scheduler, hits.device, experts_s / facts.device.top_k)
    compute_s = other_s + experts_s + facts.layer_overhead_s
    miss_s = (1 - hit_rate) * expert_bytes / facts.disk_bytes_per_s
    at_hand_s = hit_rate * experts_s
    known = facts.predictors.get(choice.predictor)
    if known is None or not choice.prefetch:
        return layers * (compute_s + max(0.0, miss_s - at_hand_s))
    room = (choice.ram_staging - (1 - hit_rate)) / max(1e-9, (1 - hit_rate) * choice.prefetch_depth)
    recall = known.of_misses(choice.prefetch_depth) * min(1.0, room)  # of guesses that have a slot
    wrong_s = (1 - recall) * miss_s  # as many guesses as needs: what they miss, they waste
    surprise_s = max(0.0, (1 - recall) * miss_s + wrong_s / 2 - at_hand_s)
    late_s = max(0.0, recall * miss_s - choice.prefetch_depth * compute_s)
    layer_s = compute_s + known.predict_s + surprise_s + late_s
    return layers * max(layer_s, miss_s + wrong_s)


def ranked(
    facts: TuningFacts,
    threads: Sequence[int],
    depths: Sequence[int],
    schedulers: Sequence[str | None] = (None,),
) -> list[Choice]:
    """Return every candidate, the fastest by the model first; of equals the one named first."""
    choices = [
        Choice(num_threads, policy, predictor, depth, scheduler)
        for num_threads in threads
        for policy in facts.hit_rate
        for predictor in (NO_PREDICTOR, *facts.predictors)
        for depth in (depths if predictor != NO_PREDICTOR else (1,))
        if predictor == NO_PREDICTOR or depth in facts.predictors[predictor].recall
        for scheduler in schedulers
    ]
    other = [
        replace(choice, ram_staging=to.ram_staging, vram_staging=to.vram_staging, exclusive=to.exclusive)
        for choice in choices
        for policy, to in facts.divided
        if policy == choice.policy
    ]
    choices += other
    return sorted(choices, key=lambda choice: token_s(choice, facts))


def to_verify(defaults: Choice, ranking: Sequence[Choice], most: int) -> list[Choice]:
    """Return at most ``most`` candidates for real runs: defaults first, the model's best, its neighbours.

    A neighbour differs from the model's best in one setting; the fastest by the model come first, one of
    every setting before a second of any.
    """
    best = ranking[0] if ranking else defaults
    by_setting: dict[str, list[Choice]] = {}
    for choice in ranking:
        changed = _changed(best, choice)
        if len(changed) == 1:
            by_setting.setdefault(changed[0], []).append(choice)
    rounds = [
        group[number]
        for number in range(max(map(len, by_setting.values()), default=0))
        for group in by_setting.values()
        if number < len(group)
    ]
    return list(dict.fromkeys([defaults, best, *rounds]))[:most]


def _changed(one: Choice, other: Choice) -> list[str]:
    """Return the settings in which two choices differ; prefetch on against off is one."""
    plain = ("num_threads", "policy", "scheduler", "ram_staging", "vram_staging", "exclusive")
    changed = [name for name in plain if getattr(one, name) != getattr(other, name)]
    if one.predictor != other.predictor:
        changed.append("predictor" if one.prefetch and other.prefetch else "prefetch")
        if not (one.prefetch and other.prefetch):
            return changed
    if one.prefetch_depth != other.prefetch_depth:
        changed.append("prefetch_depth")
    return changed


@dataclass(frozen=True)
class Gain:
    """How many times as fast as the defaults, and the 99% interval of paired runs."""

    speedup: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Faster beyond noise by enough to be worth a setting: all of the interval is."""
        return self.low > 1.0 + MARGIN


def paired_gain(defaults_s: Sequence[float], candidate_s: Sequence[float]) -> Gain:
    """Return the gain of a candidate whose runs took turns with the defaults'.

    Args:
        defaults_s, candidate_s: seconds of the same tokens, one pair a round; one round says nothing of the
            noise, so its interval is everything.
    """
    logs = [math.log(base / mine) for base, mine in zip(defaults_s, candidate_s, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return Gain(math.exp(mean), 0.0, math.inf)
    freedom = len(logs) - 1
    factor = STUDENT_T[freedom - 1] if freedom <= len(STUDENT_T) else NORMAL_T
    half = factor * statistics.stdev(logs) / math.sqrt(len(logs))
    return Gain(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


@dataclass(frozen=True)
class RunPlan:
    """How real runs spend a time.

    Attributes:
        tokens: of a run.
        candidates: that take turns, defaults among them; 2: the duel comes at once; 0: there is no time.
        screen_rounds: of their turns.
    """

    tokens: int
    candidates: int
    screen_rounds: int


def plan_runs(*, step_s: float, left_s: float, most_tokens: int, most_candidates: int) -> RunPlan:
    """Return what fits into ``left_s``: a screen of candidates and a duel, the duel alone, or nothing.

    Args:
        step_s: of a token, as the model was just seen to write.
    """
    least_tokens = min(LEAST_RUN_TOKENS, most_tokens)
    runs = left_s / (least_tokens * step_s)
    if runs < 2 * LEAST_DUEL_ROUNDS or most_candidates < 2:
        return RunPlan(least_tokens, 0, 0)
    for rounds in range(SCREEN_ROUNDS, 1, -1):
        candidates = min(most_candidates, int((runs - 2 * LEAST_DUEL_ROUNDS) // rounds))
        if candidates > 2:
            turns = rounds * candidates + 2 * DUEL_ROUNDS
            tokens = int(left_s / turns / step_s)
            return RunPlan(max(least_tokens, min(most_tokens, tokens)), candidates, rounds)
    tokens = int(left_s / (2 * DUEL_ROUNDS) / step_s)
    return RunPlan(max(least_tokens, min(most_tokens, tokens)), 2, 0)


def worth_a_duel(times_s: Mapping[Choice, Sequence[float]], defaults: Choice) -> Choice | None:
    """Return the candidate that was fastest in the first rounds; None where the defaults were.

    Args:
        times_s: seconds of each candidate's runs, round by round.
    """
    gains = {
        choice: paired_gain(times_s[defaults], times).speedup
        for choice, times in times_s.items()
        if choice != defaults and times
    }
    best = max(gains, key=lambda choice: gains[choice], default=None)
    return best if best is not None and gains[best] > 1.0 else None


def thread_counts(most: int) -> list[int]:
    """Return the numbers of threads worth measuring: all of them, one less for the readers, half, one."""
    return sorted({most, max(1, most - 1), max(1, most // 2), 1}, reverse=True)
