"""Dense layers on a device: their weights, and a copy of a conversation's keys and values.

The host's key/value cache stays whole: every token's key and value come back with the router's choice, and
what the CPU or another conversation left there is copied to the device before the next token. So a device
that is lost costs the token or chunk under way, which the CPU computes anew, and nothing of the conversation.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_offload._native import DecodeStep, DenseStep, PromptStep
from moe_offload.errors import DeviceError
from moe_offload.planning.cost_model import aligned
from moe_offload.planning.dense_prompts import PromptCosts, PromptWork, prompt_pays
from moe_offload.planning.plans import DensePlan
from moe_offload.residency.accelerator import Device, DeviceFault, wait_copy
from moe_offload.runtime.kv_cache import KVCache
from moe_offload.runtime.native_decoder import DescribedLayer, LinearTuple, NativeDecoder
from moe_offload.storage.expert_format import GgmlType, row_bytes

MOST_FAILURES = 8  # in a row, then the CPU goes on alone
VECTORS = ("norm", "q_norm", "k_norm", "sinks", "feed_forward_norm")
LINEARS = ("query", "key", "value", "out")

Span = tuple[int, int, int]  # address here, address there, bytes
Step = DecodeStep | PromptStep


class DeviceDense:
    """The layers of ``plan`` on ``device``, in its memory from ``address`` on.

    Args:
        prompt_costs: by which a prompt goes there, too, or not; None: it does.

    Attributes:
        off_reason: why they are not used any more; empty while they are.
        copied_tokens: times layers, that were brought to the device for a cache that it did not hold.
        prompt_tokens: of prompts, whose layers it has computed.

    Raises:
        DeviceError: the weights did not arrive.
    """

    def __init__(
        self,
        device: Device,
        plan: DensePlan,
        decoder: NativeDecoder,
        address: int,
        prompt_costs: PromptCosts | None = None,
    ) -> None:
        self._device, self.plan, self._prompt_costs = device, plan, prompt_costs
        self.off_reason, self.copied_tokens, self.prompt_tokens = "", 0, 0
        self._failures = 0
        self._owner: weakref.ref[KVCache] | None = None  # whose tokens are there
        shape = decoder.native_shape
        self._heads = int(shape["num_kv_heads"])
        self._row_bytes = row_bytes(GgmlType(int(shape["cache_type"])), int(shape["head_dim"]))
        weights = _Weights(decoder, address)
        layers = decoder.described[plan.first_layer :]
        self.prompt_work = _prompt_work(layers, shape, 2 * self._heads * self._row_bytes)
        placed = [weights.layer(layer) for layer in layers]
        head = weights.linear(decoder.head) if plan.has_head else None
        final_norm = weights.place(decoder.final_norm) if plan.has_head else 0
        self._copy(weights.spans)
        part_bytes = self._heads * plan.context_tokens * self._row_bytes
        assert weights.end - address <= plan.weight_bytes, "planned from the headers"
        self._places = [
            (first, first + part_bytes)
            for first in range(weights.end, weights.end + 2 * part_bytes * len(layers), 2 * part_bytes)
        ]
        self.native = DenseStep(
            device,
            shape,
            plan.first_layer,
            plan.context_tokens,
            [(*layer, *place) for layer, place in zip(placed, self._places, strict=True)],
            final_norm,
            head,
        )

    @property
    def is_on(self) -> bool:
        return not self.off_reason

    def describe(self) -> str:
        """Return which layers run there."""
        return self.plan.describe() if self.is_on else f"dense layers off: {self.off_reason}"

    def takes(self, num_tokens: int) -> bool:
        """Whether the next forward, of so many tokens, runs there."""
        if num_tokens == 1 or self._prompt_costs is None or not self.is_on:
            return self.is_on
        return prompt_pays(self.prompt_work, self._prompt_costs, num_tokens)

    def begin(self, step: Step, cache: KVCache) -> None:
        """Make ``step`` use the device for the cache's next tokens.

        Raises:
            DeviceError: the tokens before them did not arrive.
        """
        self._catch_up(cache)
        step.use_device(self.native, self.plan.first_layer, self.plan.has_head)

    def done(self, cache: KVCache, num_tokens: int) -> None:
        """Take note that tokens were computed; the cache has counted them."""
        self._failures = 0
        self.prompt_tokens += num_tokens if num_tokens > 1 else 0
        for layer in cache.layers[self.plan.first_layer :]:
            layer.mirrored_tokens = layer.num_tokens

    def failed(self, error: DeviceError) -> None:
        """Take note of a failure: for good where the device is lost or fails again."""
        self._failures += 1
        if error.fault == DeviceFault.LOST or self._failures >= MOST_FAILURES:
            self.off_reason = str(error)
            print(f"moe-offload: note: {error}; dense layers go on on the CPU", file=sys.stderr)

    def _catch_up(self, cache: KVCache) -> None:
        """Copy what the device lacks of the tokens that the cache holds."""
        layers: list[Any] = cache.layers[self.plan.first_layer :]
        if self._owner is None or self._owner() is not cache:
            for layer in layers:
                layer.mirrored_tokens = 0
            self._owner = weakref.ref(cache)
        num_tokens, spans = int(cache.get_seq_length()), list[Span]()
        for layer, places in zip(layers, self._places, strict=True):
            if layer.mirrored_tokens < num_tokens:
                addresses = layer.storage_addresses()
                for here, there in zip(addresses, places, strict=True):
                    spans += self._rows(here, cache.capacity_tokens, there, layer.mirrored_tokens, num_tokens)
                self.copied_tokens += num_tokens - layer.mirrored_tokens
        if spans:
            self._copy(spans)
        for layer in layers:
            layer.mirrored_tokens = num_tokens

    def _rows(self, here: int, capacity: int, there: int, first: int, end: int) -> list[Span]:
        """Return the spans of tokens [first, end): every head's lie together."""
        row_bytes = self._row_bytes
        return [
            (
                here + (head * capacity + first) * row_bytes,
                there + (head * self.plan.context_tokens + first) * row_bytes,
                (end - first) * row_bytes,
            )
            for head in range(self._heads)
        ]

    def _copy(self, spans: list[Span]) -> None:
        ticket = self._device.submit(np.array(spans, np.int64), False)
        wait_copy(self._device, ticket)
        failure = self._device.error(ticket)
        self._device.forget(ticket)
        if failure is not None:
            raise DeviceError(failure[0], int(failure[1]))


def _prompt_work(layers: list[DescribedLayer], shape: dict[str, float], row_bytes: int) -> PromptWork:
    """Return what the average layer does for a token.

    Args:
        row_bytes: of a token's key and value.
    """
    linears: list[LinearTuple] = []
    for layer in layers:
        linears += [layer.attention[name] for name in LINEARS]
        linears += layer.matrices if layer.router is None else [layer.router[0]]
    # The residual there; it and what the router saw back; ids and weights back.
    floats = 3 * int(shape["hidden_size"]) + int(shape["rotary_dim"]) + 2 * int(shape["max_top_k"])
    num_weights = sum(rows * cols for _, rows, cols, *_ in linears)
    return PromptWork(num_weights // len(layers), 4 * floats + row_bytes)


class _Weights:
    """Where a decoder's tensors go in a device's memory, one behind the other, each aligned."""

    def __init__(self, decoder: NativeDecoder, address: int) -> None:
        self._bytes_at, self.end = decoder.bytes_at, address
        self._placed: dict[int, int] = {0: 0}
        self.spans: list[Span] = []

    def place(self, here: int) -> int:
        """Return where a tensor goes; a second time the same."""
        if here not in self._placed:
            num_bytes = self._bytes_at[here]
            self._placed[here] = self.end
            self.spans.append((here, self.end, num_bytes))
            self.end += aligned(num_bytes)
        return self._placed[here]

    def linear(self, linear: LinearTuple) -> LinearTuple:
        ggml_type, rows, cols, address, num_bytes, bias = linear
        return ggml_type, rows, cols, self.place(address), num_bytes, self.place(bias)

    def layer(self, layer: DescribedLayer) -> tuple[dict[str, Any], tuple[Any, ...], Any, list[int]]:
        place: dict[str, Callable[[Any], Any]] = dict.fromkeys(VECTORS, self.place)
        place |= dict.fromkeys(LINEARS, self.linear)
        attention = {
            name: place[name](value) if name in place else value for name, value in layer.attention.items()
        }
        router = () if layer.router is None else (self.linear(layer.router[0]), *layer.router[1:])
        return attention, router, layer.kernel, [self.linear(matrix)[3] for matrix in layer.matrices]
