"""What the checkpoint is, what the user chose, what the plan answered: frozen and validated."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from moe_offload.errors import ConfigError

DEMO_MODEL = Path(__file__).parent / "demo" / "tiny-moe.gguf"  # what runs where no model is named

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

PREFILL_CHUNK_TOKENS = 512  # a constant, never derived from the budget: it decides rounding
DECODE_STEP_MAX_TOKENS = 16  # steps of more tokens stream past the decode cache
DEFAULT_CONTEXT_TOKENS = 4096

# Binary for KiB and for the bare letter (as llama.cpp and docker read "2G"), decimal for KB, MB, GB.
_UNIT_BYTES = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNIT_BYTES |= {_letter: 1024**_power, f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power}


def gib(num_bytes: float) -> str:
    """Return ``num_bytes`` as "3.96 GiB"; sizes below a GiB in smaller units."""
    for unit_bytes, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if num_bytes >= unit_bytes:
            return f"{num_bytes / unit_bytes:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def parse_bytes(text: str | int) -> int:
    """Return the bytes that ``text`` names: "2GiB", "1.5G" (binary), "500MB" (decimal) or a number.

    Raises:
        ConfigError: nothing of the kind, or less than one byte.
    """
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]{0,3})\s*", str(text))
    unit_bytes = _UNIT_BYTES.get(match[2].upper()) if match and not isinstance(text, bool) else None
    num_bytes = math.floor(Fraction(match[1]) * unit_bytes) if match and unit_bytes else 0
    if num_bytes < 1:
        raise ConfigError(
            f"{text!r} is not an amount of memory; accepted are 2GiB or 2G (binary), 2GB (decimal), "
            "512MiB, 1.5GiB, or a positive number of bytes"
        )
    return num_bytes


def resolve_expert_cap(experts: str | int | None, total_experts: int) -> int | None:
    """Return how many of the model's ``total_experts`` may be in memory; None when bytes alone decide.

    Args:
        experts: "25%" (rounded down, at least one), a count, "all", or None. A count above the
            model's own is all of them.

    Raises:
        ConfigError: zero, negative, above 100%, or nothing of the kind.
    """
    if experts is None:
        return None
    text = str(experts).strip()
    percent = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)\s*%", text)
    if text.lower() == "all":
        return total_experts
    if percent and 0 < float(percent[1]) <= 100:
        return max(1, math.floor(total_experts * Fraction(percent[1]) / 100))
    if re.fullmatch(r"[0-9]{1,9}", text) and int(text) > 0:
        return min(int(text), total_experts)
    raise ConfigError(
        f"experts={experts!r} is not a share of the model's {total_experts} experts; accepted are "
        'a percentage above 0% and up to 100% ("25%"), a positive count (96), or "all"'
    )


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a checkpoint in Hugging Face's terms; aliases are resolved when it is made."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    max_position_embeddings: int
    num_experts: int  # 0 for a dense model
    top_k: int
    moe_intermediate_size: int
    moe_layers: tuple[int, ...]  # indices of the decoder layers that have experts
    kv_elements_per_token: tuple[int, ...]  # by layer: cached key and value elements of one token
    # by layer: elements of recurrent or convolution state, of one sequence however long
    state_elements_per_sequence: tuple[int, ...] = ()


MAX_THREADS = 1024  # more than any machine has use for; a process may not even start them


@dataclass(frozen=True)
class RuntimeConfig:
    """What the user chose. ``None`` means "decide for me" and is resolved by placement."""

    ram_bytes: int | None = None  # everything that the process holds; None = auto
    experts: str | int | None = None  # "25%", 96, "all": cap on experts in memory; None = bytes decide
    context_tokens: int | None = None
    policy: str = "horizon"
    predictor: str = "auto"
    prefetch: bool = True
    prefetch_depth: int | None = None  # layers ahead; None: the predictor's own
    num_threads: int | None = None
    allow_dense: bool = False
    warm_start: bool = True
    kv: str | None = None  # None: keys and values in the model's dtype; "q8_0": packed, lossy

    def __post_init__(self) -> None:
        if self.ram_bytes is not None and self.ram_bytes <= 0:
            raise ConfigError(f"ram must be positive, got {self.ram_bytes} bytes")
        if self.context_tokens is not None and not _is_count(self.context_tokens):
            raise ConfigError(f"context must be a positive number of tokens, got {self.context_tokens!r}")
        if self.num_threads is not None and not _is_count(self.num_threads, MAX_THREADS):
            raise ConfigError(f"num_threads must be from 1 to {MAX_THREADS}, got {self.num_threads!r}")


def _is_count(value: object, high: int | None = None) -> bool:
    """Whether a user's number is a whole one from 1 to ``high``; True is an int in Python, and no number."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= (high or value)


@dataclass(frozen=True)
class PoolPlan:
    """Slots of one byte size, shared by the layers whose experts have that size.

    Of ``num_slots`` slots, ``num_staging`` are kept for reads in flight: a step's misses and
    prefetched experts land there, and a slot becomes staging when its expert is evicted. Zero
    staging means that every expert of the layers has a slot of its own.
    """

    slot_bytes: int
    layers: tuple[int, ...]
    num_experts: int  # over all the layers
    num_slots: int
    num_staging: int

    @property
    def num_bytes(self) -> int:
        return self.slot_bytes * self.num_slots


@dataclass(frozen=True)
class PlacementPlan:
    """Where the budget goes, in bytes. The parts add up to ``total_bytes`` <= ``ram_bytes``."""

    ram_bytes: int
    base_bytes: int  # interpreter and libraries, measured
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int  # activations of one prefill chunk, logits, reader buffers
    context_tokens: int
    pools: tuple[PoolPlan, ...]

    @property
    def expert_bytes(self) -> int:
        return sum(pool.num_bytes for pool in self.pools)

    @property
    def total_bytes(self) -> int:
        return self.base_bytes + self.dense_bytes + self.kv_bytes + self.workspace_bytes + self.expert_bytes

    def describe(self) -> str:
        """Return where the budget goes, in one line."""
        slots = sum(pool.num_slots for pool in self.pools)
        experts = sum(pool.num_experts for pool in self.pools)
        parts = [
            f"libraries {gib(self.base_bytes)}",
            f"dense weights {gib(self.dense_bytes)}",
            f"key/value cache {gib(self.kv_bytes)} for {self.context_tokens} tokens",
            f"workspace {gib(self.workspace_bytes)}",
            f"experts {gib(self.expert_bytes)} ({slots} of {experts})",
        ]
        return f"{gib(self.ram_bytes)} at most; planned {gib(self.total_bytes)}: {', '.join(parts)}"
