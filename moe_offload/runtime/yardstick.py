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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from moe_offload.config import DEMO_MODEL, MIB, PREFILL_CHUNK_TOKENS
from moe_offload.header_sizes import attention_heads, bytes_per_token, head_bytes
from moe_offload.measure_steps import measure_steps
from moe_offload.planning.machine_speed import DecoderShape, MachineSpeed, Overheads, medians
from moe_offload.planning.prompt_roofline import prefill_speed
from moe_offload.planning.roofline import decode_speed
from moe_offload.planning.stalls import independent_misses
from moe_offload.prompt_outlook import expected_chunks, prompt_work
from moe_offload.residency.memory import process_bytes
from moe_offload.runtime.model import from_pretrained
from moe_offload.storage.checkpoint import Checkpoint, open_checkpoint

STEPS, PASSES = 24, 3  # tokens of each measurement, and how often all of it is made
PROMPT_TOKENS, FAR_TOKENS = 32, 900
SHORT_TOKENS = 64  # of a chunk in which calls cost more than tokens
FIRST_TOKEN = 300
FEW_EXPERTS = "8%"  # so that tokens miss
ROOM_BYTES = 512 * MIB  # more than the demo takes


def measure_overheads() -> Overheads:
    """Return the seconds beside bytes: medians of several looks, in about four seconds."""
    checkpoint = open_checkpoint(DEMO_MODEL)
    demo = _Demo(checkpoint, measure_steps(checkpoint, is_native=True))
    with _load("all") as whole, _load(FEW_EXPERTS) as few:
        whole.step_s()  # every expert is in memory, every page touched
        return medians([_look(demo, whole, few) for _ in range(PASSES)])


def _look(demo: _Demo, whole: _Loaded, few: _Loaded) -> Overheads:
    """Return what one look at everything says, the parts in the same second."""
    num_layers = demo.checkpoint.spec.num_hidden_layers
    with _timed(whole.model.offload.native_step, "_run_residents") as layers:
        native_s, _ = whole.step_s()
    forward_s = max(0.0, native_s - statistics.fmean(layers[-STEPS:]) - demo.head_s)
    few_s, misses = few.step_s()
    with _replaced(whole.model.offload.native_step, "_tables", lambda: None):
        python_s, _ = whole.step_s()
    with _replaced(whole.model.offload, "native_step", None):
        modules_s, _ = whole.step_s()
    far_s, _ = whole.step_s(FAR_TOKENS)
    short_s, chunk_s = whole.chunk_s(SHORT_TOKENS), whole.chunk_s(PREFILL_CHUNK_TOKENS)
    weights_s, stalled_s = demo.token_s(misses=0.0), demo.token_s(misses)
    layer_s, element_s = demo.beside_products(short_s, chunk_s)
    return Overheads(
        native_layer_s=max(0.0, native_s - forward_s - weights_s) / num_layers,
        python_layer_s=max(0.0, python_s - forward_s - weights_s) / num_layers,
        modules_layer_s=max(0.0, modules_s - weights_s) / num_layers,
        forward_s=forward_s,
        stalled_layer_s=max(0.0, few_s - native_s - (stalled_s - weights_s)) / demo.stalled(misses),
        token_s=whole.loop_s(),
        chunk_layer_s=layer_s,
        chunk_element_s=element_s,
        attention_score_s=max(0.0, far_s - native_s) / demo.more_scores,
    )


@dataclass(frozen=True)
class _Demo:
    """What the demo's own bytes and products take, at measured rates."""

    checkpoint: Checkpoint
    machine: MachineSpeed

    @property
    def shape(self) -> DecoderShape:
        spec = self.checkpoint.spec
        return DecoderShape(
            spec.num_hidden_layers,
            len(spec.moe_layers),
            spec.top_k,
            attention_heads=attention_heads(self.checkpoint),
        )

    @property
    def more_scores(self) -> int:
        return self.shape.attention_heads * (FAR_TOKENS - PROMPT_TOKENS)

    @property
    def head_s(self) -> float:
        """The seconds of the head's weights for one token."""
        return head_bytes(self.checkpoint) / self.machine.ram_bytes_per_s

    def token_s(self, misses: float) -> float:
        """Return the seconds of a token with so many misses, over all layers."""
        token, hit_rate = bytes_per_token(self.checkpoint, PROMPT_TOKENS), self._hit_rate(misses)
        return 1 / decode_speed(token, self.machine, self.shape, hit_rate=hit_rate).tokens_per_s

    def stalled(self, misses: float) -> float:
        """Return how many of its layers wait for one of them."""
        none = independent_misses(self.shape.top_k, self._hit_rate(misses))[0]
        return max(1.0, self.shape.moe_layers * (1 - none))

    def _hit_rate(self, misses: float) -> float:
        return 1 - misses / (self.shape.moe_layers * self.shape.top_k)

    def beside_products(self, short_s: float, chunk_s: float) -> tuple[float, float]:
        """Return what a chunk costs beside products: for each layer, and for each element of its tokens."""
        spec = self.checkpoint.spec
        sizes = {SHORT_TOKENS: short_s, PREFILL_CHUNK_TOKENS: chunk_s}
        short_rest_s, chunk_rest_s = (seconds - self._products_s(size) for size, seconds in sizes.items())
        elements = spec.num_hidden_layers * spec.hidden_size
        more_elements = elements * (PREFILL_CHUNK_TOKENS - SHORT_TOKENS)
        element_s = max(0.0, chunk_rest_s - short_rest_s) / more_elements
        layers_s = short_rest_s - SHORT_TOKENS * elements * element_s
        return max(0.0, layers_s) / spec.num_hidden_layers, element_s

    def _products_s(self, num_tokens: int) -> float:
        """Return the seconds of a resident chunk's products and attention."""
        chunks = [
            replace(chunk, read=0.0) for chunk in expected_chunks(self.checkpoint.spec, 1.0, [num_tokens])
        ]
        found = prefill_speed(self.machine, self.shape, prompt_work(self.checkpoint), chunks)
        assert found is not None
        return num_tokens / found.tokens_per_s


@dataclass(frozen=True)
class _Loaded:
    """A demo model to be asked for tokens."""

    model: Any

    @torch.no_grad()
    def step_s(self, prompt_tokens: int = PROMPT_TOKENS) -> tuple[float, float]:
        """Return seconds of a decode step after a prompt, and misses per step."""
        stats = self.model.offload.stats
        cache = self.model(_tokens(prompt_tokens)).past_key_values
        misses = stats().misses
        tokens = [torch.tensor([[FIRST_TOKEN + number]]) for number in range(STEPS)]
        times = [_seconds(partial(self.model, token, past_key_values=cache)) for token in tokens]
        return statistics.fmean(times), (stats().misses - misses) / STEPS

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
        return _seconds(partial(self.model, _tokens(num_tokens), logits_to_keep=1))


@contextmanager
def _load(experts: str) -> Iterator[_Loaded]:
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
    try:
        yield _Loaded(model)
    finally:
        model.offload.close()


def _tokens(count: int) -> torch.Tensor:
    return torch.arange(FIRST_TOKEN, FIRST_TOKEN + count)[None]


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@contextmanager
def _timed(owner: Any, name: str) -> Iterator[list[float]]:
    """Yield the seconds of each call of a method, which grow meanwhile."""
    method, seconds = getattr(owner, name), []
    with _replaced(owner, name, lambda *args: seconds.append(_seconds(partial(method, *args)))):
        yield seconds


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
