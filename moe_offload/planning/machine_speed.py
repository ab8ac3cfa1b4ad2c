"""What a machine gives to this program, and what of a model decides a step's costs: the roofline's terms."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
Curve = tuple[tuple[float, float], ...]  # (tokens, value), ascending
SUBMIT_S = 2e-5  # where it was not measured


@dataclass(frozen=True, slots=True)
class Overheads:
    """What the program costs beside bytes, in seconds; measured by runtime/yardstick.py.

    Attributes:
        native_layer_s: of a layer in the native decode step, all that it needs at hand.
        python_layer_s: the same where Python looks at it between router and experts, to prefetch.
        modules_layer_s: of a layer on transformers' modules.
        forward_s: of a forward on the native decode step, before its first layer and after its last.
        stalled_layer_s: of a layer that waits for misses, beside their reading and more than its like: back
            to Python, threads that have fallen asleep.
        token_s: of generate()'s loop, for a token.
        chunk_layer_s: of a layer for a chunk of a prompt, however many tokens it has.
        chunk_element_s: of an element of a token's hidden state, for a layer of a chunk.
        attention_score_s: of one head and one cached token in decoding, the cache's bytes at hand.
    """

    native_layer_s: float = 0.0
    python_layer_s: float = 0.0
    modules_layer_s: float = 0.0
    forward_s: float = 0.0
    stalled_layer_s: float = 0.0
    token_s: float = 0.0
    chunk_layer_s: float = 0.0
    chunk_element_s: float = 0.0
    attention_score_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """What an accelerator above RAM gives; every figure of a profile's [gpu] and [link].

    Attributes:
        bytes_per_s: experts in its memory.
        link_bytes_per_s: copies to it; they take from the CPU what it would compute later than the device.
        step_s: launch of a layer's experts and waiting for them.
    """

    bytes_per_s: float
    link_bytes_per_s: float
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SeenGain:
    """What reading ahead was worth in real runs that took turns with runs without it.

    Attributes:
        speedup: how many times as fast as those without.
        hit_rate: share of a token's experts that those without found in memory.
    """

    speedup: float
    hit_rate: float


@dataclass(frozen=True, slots=True)
class ReadAhead:
    """What a predictor does for a model, as `tune` measured it on the model's own text.

    Attributes:
        recall: share of a layer's misses that it names one layer ahead, with as many guesses as experts.
        layer_s: of asking it.
        of_misses: False: older profiles tell that share of all experts only, which is higher.
        seen: None: no runs were paired, and nothing but arithmetic tells what it gains.
    """

    recall: float
    layer_s: float
    of_misses: bool = True
    seen: SeenGain | None = None

    def describe(self) -> str:
        """Return in words how much it guesses."""
        of_what = "misses" if self.of_misses else "experts, not of the misses alone, which tune measures now,"
        seen = f"; runs with it were {self.seen.speedup:.2f}x as fast as without" if self.seen else ""
        return f"{self.recall:.0%} of the {of_what} guessed a layer ahead{seen}"


@dataclass(frozen=True, slots=True)
class PromptSpeed:
    """What the machine gives to a prompt's chunk of this model.

    Attributes:
        dense_macs_per_s: of a dense product, by tokens.
        expert_s: of an expert in memory, by the tokens that chose it.
        read_s: from one expert to the next where all come from disk and computing does not hold them up.
        handling_s: what an expert that is read takes more than the longer of reading and computing it, by the
            tokens that chose it: its read's submission and arrival take from those that compute.
        fresh_s: what it takes more where its slot's pages have yet to be made, by tokens.
        score_s: of attention, for one head, one token and one that it looks at.
        own_share: of its own chunk's tokens, how many a token's attention computes: half where it skips those
            that come later, all where it computes and masks them.
    """

    dense_macs_per_s: Curve
    expert_s: Curve
    read_s: float
    handling_s: Curve = ((1.0, 0.0),)
    fresh_s: Curve = ((1.0, 0.0),)
    score_s: float = 0.0
    own_share: float = 1.0


@dataclass(frozen=True, slots=True)
class MachineSpeed:
    """What the machine gives to this program.

    Attributes:
        ram_bytes_per_s: a token's dense matrices with all threads.
        disk_bytes_per_s: a decode step's misses, one more among those that are read together.
        macs_per_s: multiply-adds of the prefill kernels with all threads; None: not known.
        expert_bytes_per_s: one token's experts, computed in one call; None: as ``ram_bytes_per_s``.
        disk_latency_s: of a decode step's first miss, beyond its share of ``disk_bytes_per_s``.
        submit_s: of asking for an expert's read, which takes from computing.
        ahead: None: nothing is known of prefetching, and it is not counted.
        prompt: as measured with the model; None: by ``macs_per_s`` and ``disk_bytes_per_s``.
    """

    ram_bytes_per_s: float
    disk_bytes_per_s: float
    macs_per_s: float | None = None
    expert_bytes_per_s: float | None = None
    disk_latency_s: float = 0.0
    submit_s: float = SUBMIT_S
    ahead: ReadAhead | None = None
    prompt: PromptSpeed | None = None
    overheads: Overheads = field(default_factory=Overheads)
    device: DeviceSpeed | None = None


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What of a model and its placement decides a step's costs beside bytes.

    Attributes:
        attention_heads: of all layers that attend.
        attention_scores: of a token: heads x cached tokens, all layers.
        is_native: the native decode step computes it.
    """

    num_layers: int
    moe_layers: int
    top_k: int
    num_experts: int = 0  # of a layer
    hidden_size: int = 0
    attention_heads: int = 0
    attention_scores: int = 0
    is_native: bool = True


def medians(measured: Sequence[T]) -> T:
    """Return figure by figure the median of the same things measured several times.

    A machine that others share is now fast and now slow, for seconds: no single look tells which is usual.
    """
    found: T = _medians(measured)
    return found


def _medians(values: Sequence[Any]) -> Any:
    first = values[0]
    if is_dataclass(first) and not isinstance(first, type):
        names = [figure.name for figure in fields(first)]
        return replace(first, **{name: _medians([getattr(one, name) for one in values]) for name in names})
    if isinstance(first, tuple):  # a curve, of the same tokens
        return tuple(_medians(same) for same in zip(*values, strict=True))
    return first if first is None or isinstance(first, bool) else statistics.median(values)
