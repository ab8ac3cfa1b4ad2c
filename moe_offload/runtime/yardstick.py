"""What the program costs beside bytes, on this machine: measured on the bundled demo model, within seconds.

Its tokens are so small that little else is in their time. What is measured is the code that runs every
model: a token on the native step, the same with Python between router and experts, the same on
transformers' modules, misses, generate()'s loop, and a prompt's chunk. Bytes are subtracted at the
rates that ``measure_steps`` found for the demo; what remains is divided by its layers, misses or tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moe_offload.config import DEMO_MODEL, MIB, PREFILL_CHUNK_TOKENS
from moe_offload.header_costs import attention_scores, bytes_per_token, dense_weights
from moe_offload.measure_steps import measure_steps
from moe_offload.planning.roofline import MachineSpeed, Overheads, active_expert_macs
from moe_offload.residency.memory import process_bytes
from moe_offload.runtime.model import from_pretrained
from moe_offload.storage.checkpoint import Checkpoint, open_checkpoint

STEPS = 24  # tokens of each measurement
PROMPT_TOKENS, FAR_TOKENS = 32, 900
SHORT_TOKENS = 64  # of a chunk in which calls cost more than tokens
FIRST_TOKEN = 300
FEW_EXPERTS = "8%"  # so that tokens miss
ROOM_BYTES = 512 * MIB  # more than the demo takes


def measure_overheads() -> Overheads:
    """Return the seconds beside bytes; takes about two seconds once the libraries are loaded."""
    checkpoint = open_checkpoint(DEMO_MODEL)
    demo, machine = _Demo(checkpoint), measure_steps(checkpoint)
    layers, num_experts = checkpoint.spec.num_hidden_layers, checkpoint.spec.num_experts
    whole = _load("all")
    try:
        whole.step_s()  # every expert is in memory, every page touched
        native_s, _ = whole.step_s()
        loop_s = whole.loop_s()
        with _replaced(whole.model.offload.native_step, "_tables", lambda: None):
            python_s, _ = whole.step_s()
        with _replaced(whole.model.offload, "native_step", None):
            modules_s, _ = whole.step_s()
        far_s, _ = whole.step_s(FAR_TOKENS)
        short_s, chunk_s = whole.chunk_s(SHORT_TOKENS), whole.chunk_s(PREFILL_CHUNK_TOKENS)
    finally:
        whole.model.offload.close()
    few = _load(FEW_EXPERTS)
    try:
        few_s, misses = few.step_s()
    finally:
        few.model.offload.close()
    weights_s, read_s = demo.weights_s(machine), demo.read_s(machine, misses)
    modules_layer_s = max(0.0, modules_s - weights_s) / layers
    short_rest_s = max(0.0, short_s - demo.chunk_s(machine, SHORT_TOKENS) - layers * modules_layer_s)
    chunk_rest_s = chunk_s - demo.chunk_s(machine, PREFILL_CHUNK_TOKENS) - layers * modules_layer_s
    more_elements = layers * (PREFILL_CHUNK_TOKENS - SHORT_TOKENS) * checkpoint.spec.hidden_size
    more_scores = demo.attention_scores(FAR_TOKENS) - demo.attention_scores(PROMPT_TOKENS)
    return Overheads(
        native_layer_s=max(0.0, native_s - weights_s) / layers,
        python_layer_s=max(0.0, python_s - weights_s) / layers,
        modules_layer_s=modules_layer_s,
        miss_s=max(0.0, few_s - python_s - read_s) / max(1.0, misses),
        token_s=loop_s,
        chunk_layer_s=modules_layer_s,
        chunk_expert_s=short_rest_s / layers / num_experts,
        chunk_element_s=max(0.0, chunk_rest_s - short_rest_s) / more_elements,
        attention_score_s=max(0.0, far_s - native_s) / more_scores,
    )


@dataclass(frozen=True)
class _Demo:
    """What the demo's own bytes and products take, at measured rates."""

    checkpoint: Checkpoint

    def weights_s(self, machine: MachineSpeed) -> float:
        token = bytes_per_token(self.checkpoint, PROMPT_TOKENS)
        assert machine.expert_bytes_per_s
        dense_s = (token.dense_bytes + token.kv_bytes) / machine.ram_bytes_per_s
        return dense_s + token.expert_bytes / machine.expert_bytes_per_s

    def read_s(self, machine: MachineSpeed, misses: float) -> float:
        """Return the seconds of a token's reads: each layer's together."""
        layout = next(iter(self.checkpoint.experts.layouts.values()))
        layers = min(misses, len(self.checkpoint.spec.moe_layers))
        return layers * machine.disk_latency_s + misses * layout.expert_bytes / machine.disk_bytes_per_s

    def attention_scores(self, cached_tokens: int) -> int:
        return attention_scores(self.checkpoint, cached_tokens)

    def chunk_s(self, machine: MachineSpeed, num_tokens: int) -> float:
        spec, layouts = self.checkpoint.spec, self.checkpoint.experts.layouts
        assert machine.macs_per_s and machine.expert_macs_per_s
        dense_s = dense_weights(self.checkpoint) / machine.macs_per_s
        experts_s = active_expert_macs(spec, layouts) / machine.expert_macs_per_s
        read_s = self.checkpoint.experts.total_bytes / (machine.expert_bytes_per_s or machine.ram_bytes_per_s)
        return num_tokens * dense_s + max(num_tokens * experts_s, read_s)


@dataclass(frozen=True)
class _Loaded:
    """A demo model to be asked for tokens."""

    model: Any

    @torch.no_grad()
    def step_s(self, prompt_tokens: int = PROMPT_TOKENS) -> tuple[float, float]:
        """Return seconds of a decode step after a prompt, and misses per step."""
        stats = self.model.offload.stats
        cache = self.model(_tokens(prompt_tokens)).past_key_values
        times, misses = [], stats().misses
        for number in range(STEPS):
            token = torch.tensor([[FIRST_TOKEN + number]])
            times.append(_seconds(partial(self.model, token, past_key_values=cache)))
        missed = stats().misses - misses
        return statistics.fmean(times) if missed else statistics.median(times), missed / STEPS

    def loop_s(self) -> float:
        """Return what generate() adds to a step."""
        stats = self.model.offload.stats
        decode_s, steps = stats().decode_s, stats().decode_steps
        generate = partial(
            self.model.generate, _tokens(PROMPT_TOKENS), do_sample=False, eos_token_id=None, pad_token_id=0
        )
        short_s = _seconds(partial(generate, max_new_tokens=2))
        long_s = _seconds(partial(generate, max_new_tokens=2 + STEPS))
        step_s = float((stats().decode_s - decode_s) / (stats().decode_steps - steps))
        return max(0.0, (long_s - short_s) / STEPS - step_s)

    @torch.no_grad()
    def chunk_s(self, num_tokens: int) -> float:
        """Return seconds of a prompt of one chunk."""
        return min(_seconds(partial(self.model, _tokens(num_tokens))) for _ in range(2))


def _load(experts: str) -> _Loaded:
    ram_bytes = process_bytes() + ROOM_BYTES
    model = from_pretrained(
        DEMO_MODEL,
        ram=ram_bytes,
        context=1024,
        experts=experts,
        prefetch=False,
        warm_start=False,
        profile="none",
    )
    return _Loaded(model)


def _tokens(count: int) -> torch.Tensor:
    return torch.arange(FIRST_TOKEN, FIRST_TOKEN + count)[None]


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
