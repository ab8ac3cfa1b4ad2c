"""Which settings to try, and what they should cost.

Pure arithmetic on what tune measured. A model of a token ranks the candidates; it decides nothing: what
is chosen has to beat the plain defaults in real runs (planning/paired_runs.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from moe_offload.config import STAGING_PER_TOP_K
from moe_offload.planning.cost_model import TokenBytes
from moe_offload.planning.tuning_device import DeviceFacts

NO_PREDICTOR = "none"


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

    def without_prefetch(self) -> Choice:
        """Return the same, nothing read ahead."""
        return replace(self, predictor=NO_PREDICTOR, prefetch_depth=1)

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


def to_verify(
    defaults: Choice, ranking: Sequence[Choice], most: int, plain: Choice | None = None
) -> list[Choice]:
    """Return at most ``most`` candidates for real runs: defaults first, the model's best, its neighbours.

    A neighbour differs from the model's best in one setting; the fastest by the model come first, one of
    every setting before a second of any.

    Args:
        plain: comes before the neighbours, whatever the model says of it; None: nothing does.
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
    return list(dict.fromkeys([defaults, best, *([plain] if plain else []), *rounds]))[:most]


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


def thread_counts(most: int) -> list[int]:
    """Return the numbers of threads worth measuring: all of them, one less for the readers, half, one."""
    return sorted({most, max(1, most - 1), max(1, most // 2), 1}, reverse=True)
