"""Routing traces: which experts every token chose in every layer, and how a run was cut into steps.

The npz schema (arrays marked * may be absent; T tokens, L MoE layers, K top_k, E experts)::

    experts        uint8 or uint16 (T, L, K)  expert ids, in descending weight
    weights*       float (T, L, K)            the router's weights; a run's own trace has float32, as the
                                              policies saw them, the shipped ones float16
    seq_len*       int32 (S,)                 tokens of each sequence, in order; their sum is T
    step_tokens*   int32 (N,)                 tokens of each forward pass, in order; their sum is T
    phase*         uint8 (T,)                 PREFILL or DECODE
    layers*        int32 (L,)                 decoder layer indices
    num_experts*   int                        E
    model*         str                        name of the checkpoint
    metadata*      str                        a JSON object: what else the writer knew (plan, counters)
    router_logits* float16 (T, L, E)          what the router returns first: logits, or their softmax
    router_inputs* float16 (T, L, H)          hidden states that the router saw

``probs`` is read as ``weights`` where a file has it. Without ``seq_len`` a trace is one sequence, without
``step_tokens`` every token is a step of its own, without ``phase`` all is decode.

Also read, ids in descending weight: ``.npy`` (T, L, K); ``.jsonl`` of objects {"token", "layer", "experts",
"weights"*, "sequence"*}; ``.csv`` as llama.cpp's moe-trace and its forks write it: rows
``token,layer,id,id,...`` with an optional header (tokens below 0 are a prompt's and left out); or one id a
row under a header that has ``token,layer,expert`` and maybe ``rank`` and ``phase`` (only "decode" is kept);
or pairs ``layer,expert`` in the order of the run (passes of one token are kept).
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.trace_formats import READERS, expect
from moe_offload.whole_file import whole_file

PREFILL, DECODE = 0, 1
MAX_EXPERTS = 1 << 16


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Routing of T tokens in L MoE layers; the arrays are those of the module's schema."""

    experts: NDArray[Any]  # (T, L, K)
    num_experts: int
    layers: tuple[int, ...]
    seq_len: NDArray[np.int32]
    step_tokens: NDArray[np.int32]
    phase: NDArray[np.uint8]
    weights: NDArray[Any] | None = None
    model: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    router_logits: NDArray[np.float16] | None = None
    router_inputs: NDArray[np.float16] | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.experts.shape[0])

    @property
    def top_k(self) -> int:
        return int(self.experts.shape[2])

    def head(self, num_tokens: int, *, single_steps: bool = False) -> RoutingTrace:
        """Return the first tokens; with ``single_steps`` as if each had been decoded by itself.

        Steps and sequences that the cut goes through are shortened.
        """
        count = min(num_tokens, self.num_tokens)
        step_tokens = np.ones(count, np.int32) if single_steps else _cut(self.step_tokens, count)
        phase = np.full(count, DECODE, np.uint8) if single_steps else self.phase[:count]
        rest: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[:count]
            for name in ("weights", "router_logits", "router_inputs")
        }
        return replace(
            self,
            experts=self.experts[:count],
            seq_len=_cut(self.seq_len, count),
            step_tokens=step_tokens,
            phase=phase,
            **rest,
        )

    def decode_only(self) -> RoutingTrace:
        """Return the decode tokens, each a step of its own; the trace itself when it has no others."""
        chosen = self.phase == DECODE
        if chosen.all() and (self.step_tokens == 1).all():
            return self
        ends = np.cumsum(self.seq_len)
        kept = [int(chosen[end - length : end].sum()) for end, length in zip(ends, self.seq_len, strict=True)]
        count = int(chosen.sum())
        return replace(
            self,
            experts=self.experts[chosen],
            weights=None if self.weights is None else self.weights[chosen],
            seq_len=np.array([length for length in kept if length], np.int32),
            step_tokens=np.ones(count, np.int32),
            phase=np.full(count, DECODE, np.uint8),
            router_logits=None if self.router_logits is None else self.router_logits[chosen],
            router_inputs=None if self.router_inputs is None else self.router_inputs[chosen],
        )

    def check(self) -> None:
        """Raise CheckpointError where the arrays contradict one another."""
        num_tokens, num_layers, top_k = self.experts.shape
        expect(num_layers > 0 and top_k > 0, f"experts has shape {self.experts.shape}: no layer or no expert")
        expect(len(self.layers) == num_layers, f"{len(self.layers)} layers, experts has {num_layers}")
        expect(list(self.layers) == sorted(set(self.layers)), f"layers {self.layers} do not ascend")
        expect(0 < self.num_experts <= MAX_EXPERTS, f"num_experts is {self.num_experts}")
        if num_tokens:
            largest, smallest = int(self.experts.max()), int(self.experts.min())
            expect(smallest >= 0, f"expert {smallest} is negative")
            expect(largest < self.num_experts, f"expert {largest} of num_experts={self.num_experts}")
            in_order = np.sort(self.experts, axis=2)
            expect(bool((np.diff(in_order, axis=2) != 0).all()), "a token chooses an expert twice")
        for name in ("seq_len", "step_tokens"):
            lengths = getattr(self, name)
            expect(lengths.ndim == 1 and bool((lengths > 0).all()), f"{name} has a length below 1")
            expect(int(lengths.sum()) == num_tokens, f"{name} sums to {lengths.sum()}, tokens {num_tokens}")
        expect(self.phase.shape == (num_tokens,), f"phase has shape {self.phase.shape}")
        if self.weights is not None:
            shape = self.weights.shape
            expect(shape == self.experts.shape, f"weights has shape {shape}, experts {self.experts.shape}")
            expect(bool(np.isfinite(self.weights).all()), "weights has a number that is not finite")
        for name, width in (("router_logits", self.num_experts), ("router_inputs", None)):
            array = getattr(self, name)
            if array is not None:
                fits = array.shape[:2] == (num_tokens, num_layers) and width in (None, array.shape[-1])
                expect(fits and array.ndim == 3, f"{name} has shape {array.shape}")


def make_trace(
    experts: NDArray[Any],
    *,
    num_experts: int | None = None,
    weights: NDArray[Any] | None = None,
    layers: Sequence[int] | None = None,
    seq_len: Sequence[int] | NDArray[Any] | None = None,
    step_tokens: Sequence[int] | NDArray[Any] | None = None,
    phase: NDArray[Any] | None = None,
    model: str = "",
    metadata: Mapping[str, Any] | None = None,
    router_logits: NDArray[Any] | None = None,
    router_inputs: NDArray[Any] | None = None,
) -> RoutingTrace:
    """Return a checked trace, what is not given filled in as the module's schema says.

    ``num_experts`` None is the largest id + 1.

    Raises:
        CheckpointError: the arrays contradict one another.
    """
    integers = np.issubdtype(experts.dtype, np.integer)
    expect(experts.ndim == 3 and integers, f"experts has shape {experts.shape} of {experts.dtype}")
    num_tokens = len(experts)
    if num_experts is None:
        num_experts = int(experts.max()) + 1 if experts.size else 1
    expect(0 < num_experts <= MAX_EXPERTS, f"num_experts is {num_experts}")
    trace = RoutingTrace(
        experts=_narrow(experts),
        num_experts=num_experts,
        layers=tuple(int(i) for i in layers) if layers is not None else tuple(range(experts.shape[1])),
        seq_len=_lengths(seq_len, [num_tokens] if num_tokens else []),
        step_tokens=_lengths(step_tokens, np.ones(num_tokens)),
        phase=np.full(num_tokens, DECODE, np.uint8) if phase is None else np.asarray(phase, np.uint8),
        weights=weights,
        model=model,
        metadata=dict(metadata or {}),
        router_logits=None if router_logits is None else router_logits.astype(np.float16, copy=False),
        router_inputs=None if router_inputs is None else router_inputs.astype(np.float16, copy=False),
    )
    trace.check()
    return trace


def write_trace(path: str | Path, trace: RoutingTrace) -> None:
    """Write a trace as npz, compressed.

    Raises:
        ConfigError: the path cannot be written.
    """
    arrays: dict[str, Any] = {
        "experts": trace.experts,
        "seq_len": trace.seq_len,
        "step_tokens": trace.step_tokens,
        "phase": trace.phase,
        "layers": np.array(trace.layers, np.int32),
        "num_experts": np.int32(trace.num_experts),
        "model": np.str_(trace.model),
        "metadata": np.str_(json.dumps(dict(trace.metadata), sort_keys=True)),
    }
    for name in ("weights", "router_logits", "router_inputs"):
        if getattr(trace, name) is not None:
            arrays[name] = getattr(trace, name)
    try:
        with whole_file(path) as file:
            np.savez_compressed(file, **arrays)
    except OSError as error:
        raise ConfigError(f"the trace cannot be written to {path}: {error.strerror or error}") from error


def read_trace(path: str | Path, num_experts: int | None = None) -> RoutingTrace:
    """Read a trace in any of the module's formats, by the ending of its name.

    Args:
        num_experts: for files that do not say it; None is the largest id + 1.

    Raises:
        ConfigError: no such file, or an ending that no format has.
        CheckpointError: the file is damaged or contradicts itself.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise ConfigError(f"trace {path} ends in none of {', '.join(READERS)}")
    if not path.is_file():
        raise ConfigError(f"trace {path} is not a file")
    try:
        fields = READERS[path.suffix](path)
        if fields.get("num_experts") is None:
            fields["num_experts"] = num_experts
        return make_trace(**fields)
    except CheckpointError as error:
        raise CheckpointError(f"trace {path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, OverflowError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"trace {path} cannot be read: {error!r}") from error


def sequence_digests(trace: RoutingTrace) -> list[str]:
    """Return a digest of each sequence's choices: a fitted file names its training data by them."""
    parts = np.split(np.sort(trace.experts, axis=2).astype("<u2"), np.cumsum(trace.seq_len)[:-1])
    return [hashlib.sha256(repr(part.shape).encode() + part.tobytes()).hexdigest()[:16] for part in parts]


def _cut(lengths: NDArray[np.int32], total: int) -> NDArray[np.int32]:
    """Return the lengths up to a sum of ``total``."""
    ends = np.minimum(np.cumsum(lengths), total)
    parts = np.diff(ends, prepend=0)
    shortened: NDArray[np.int32] = parts[parts > 0].astype(np.int32)
    return shortened


def _lengths(given: Any, default: Any) -> NDArray[np.int32]:
    lengths: NDArray[np.int32] = np.asarray(default if given is None else given).astype(np.int32)
    return lengths


def _narrow(experts: NDArray[Any]) -> NDArray[Any]:
    """Return ids in the narrowest type that holds them; negative ones stay, for ``check`` to name."""
    if not experts.size or experts.min() < 0 or experts.max() >= MAX_EXPERTS:
        return experts
    return experts.astype(np.uint8 if experts.max() < 256 else np.uint16, copy=False)
