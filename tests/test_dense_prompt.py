"""A prompt's dense layers on a device: the CPU's bits, by emulation, on stand-ins for CUDA and on a card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_cuda_dense import MEMORY, PACKED_CACHES, ROUTERS, Layer, card, dense_on, random_cache
from test_native_step import LAYERS, VOCAB, address

from moe_offload import _native
from moe_offload.errors import DeviceError
from moe_offload.planning.dense_prompts import PromptCosts, PromptWork, prompt_pays
from moe_offload.planning.expert_costs import MeasuredCosts, RunningCosts
from moe_offload.storage.expert_format import GgmlType


@pytest.fixture(params=["emulated", "stand-in", pytest.param("card", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[_native.Device]:
    if request.param == "emulated":
        device: _native.Device = _native.EmulatedDevice(MEMORY, 1e12, 0.0)
    else:
        library = card() if request.param == "card" else request.getfixturevalue("stand_in")
        device = _native.CudaDevice(library, 0, MEMORY)
    yield device
    device.close()


@dataclass
class Prompt:
    """Tokens behind ``num_past`` others, through all layers of ``layer`` but their experts.

    Attributes:
        wanted: in the last layer, and of logits, the tokens from this one on.
        tile_tokens: that go through a layer at once.
    """

    layer: Layer
    num_past: int
    num_tokens: int
    wanted: int = 0
    tile_tokens: int = 1000

    def __post_init__(self) -> None:
        torch.manual_seed(self.num_tokens)
        layer, capacity = self.layer, self.num_past + self.num_tokens + 1
        count = 4 if layer.routed else 2
        self.caches = [random_cache(layer, capacity) for _ in range(count)]
        self.tokens = torch.randint(VOCAB, (self.num_tokens,))
        self.cos, self.sin = torch.randn(2, self.num_tokens, layer.half)

    def run(self, dense: Any = None) -> list[torch.Tensor]:
        """Return residual, router's input, ids and weights, logits, and what the caches have then."""
        caches, layer, described = [c.clone() for c in self.caches], self.layer, self.layer.described()
        decoder = _native.DecodeStep(
            described.shape, layer.linear("embedding"), described.final_norm, described.head
        )
        if layer.routed:
            decoder.add_moe_layer(described.attention, *layer.router(), layer.experts_kernel)
        decoder.add_dense_layer(described.attention, described.kernel, described.addresses)
        step, top_k = _native.PromptStep(decoder), layer.routed[0] if layer.routed else 0
        step.use_device(dense, 0, True)
        residual, normed = torch.zeros(2, self.num_tokens, layer.hidden)
        ids, weights = (
            torch.zeros(self.num_tokens, top_k, dtype=torch.int32),
            torch.zeros(self.num_tokens, top_k),
        )
        states = [address(x) for x in (residual, normed, ids, weights, self.cos, self.sin)]
        step.begin(address(self.tokens), self.num_tokens, tuple(states))
        num_layers = len(caches) // 2
        for i in range(num_layers):
            keys, values = map(address, caches[2 * i : 2 * i + 2])
            wanted = self.wanted if i + 1 == num_layers else 0
            for first in range(0, self.num_tokens, self.tile_tokens):
                tile = first, min(self.tile_tokens, self.num_tokens - first), wanted
                step.attend(i, keys, values, caches[0].shape[1], self.num_past, *tile)
        logits = torch.empty(self.num_tokens - self.wanted, VOCAB)
        out = [residual[self.wanted :].clone(), normed[self.wanted :].clone(), ids, weights]
        step.logits(self.wanted, address(logits))
        return [*out, logits, *caches]


def assert_same_bits(device: _native.Device, prompt: Prompt) -> None:
    expected = prompt.run()
    dense = dense_on(device, prompt.layer, prompt.caches)
    for name, ours, theirs in zip(
        ("residual", "normed", "ids", "weights", "logits", "keys", "values", "keys", "values"),
        prompt.run(dense),
        expected,
        strict=False,
    ):
        assert torch.equal(ours, theirs), name
    tiles = -(-prompt.num_tokens // prompt.tile_tokens) * (len(prompt.caches) // 2)
    assert dense.num_waits >= tiles, "the device has computed it"


@pytest.mark.parametrize("name", [*LAYERS, *PACKED_CACHES])
def test_a_prompt_has_the_cpus_bits(device: _native.Device, name: str) -> None:
    assert_same_bits(device, Prompt(Layer(**(LAYERS | PACKED_CACHES)[name]), 3, 5))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("num_tokens", "wanted"), [(5, 0), (70, 3), (33, 0), (9, 8)])
def test_logits_of_several_tokens_have_the_cpus_bits(
    device: _native.Device, packed: bool, num_tokens: int, wanted: int
) -> None:
    """As many at once as a tile of the tensor cores has; the device computes them all."""
    layer = Layer(hidden=96)
    if packed:
        layer.pack("head", GgmlType.Q8_0)
    prompt = Prompt(layer, 0, num_tokens, wanted)
    expected, dense = prompt.run(), dense_on(device, layer, prompt.caches)
    layer.w["head"].zero_()  # the CPU's: who computes with it gives other logits
    assert torch.equal(prompt.run(dense)[4], expected[4])


@pytest.mark.parametrize(
    ("num_past", "num_tokens", "wanted", "tile_tokens"),
    [(0, 2, 1, 99), (250, 9, 6, 99), (0, 11, 10, 4), (255, 3, 0, 1), (20, 12, 5, 5)],
)
@pytest.mark.parametrize("window", [0, 9])
def test_where_ranges_tiles_and_windows_end(
    device: _native.Device, num_past: int, num_tokens: int, wanted: int, tile_tokens: int, window: int
) -> None:
    """Tokens that nobody wants give their keys and values; a tile may have none that is wanted."""
    layer = Layer(window=window, sinks=bool(window), heads=6, kv_heads=1, head_dim=16)
    assert_same_bits(device, Prompt(layer, num_past, num_tokens, wanted, tile_tokens))


@pytest.mark.parametrize("name", ROUTERS)
def test_routing_and_packed_matrices_have_the_cpus_bits(device: _native.Device, name: str) -> None:
    """More tokens than a tile of the tensor cores, in a layer with experts and one without."""
    layer = Layer(hidden=96, cache_dtype=torch.bfloat16, qk_norm=True, bias=True, routed=ROUTERS[name])
    for packed in ("query", "out", "head", "gate", "router"):
        layer.pack(packed, GgmlType.Q8_0)
    assert_same_bits(device, Prompt(layer, 2, 35, 34))


def test_a_token_goes_on_behind_a_prompt_on_the_device(device: _native.Device) -> None:
    """Keys and values of the prompt have stayed there; a graph that was captured before stays right."""
    layer = Layer(cache_dtype=torch.float16)
    prompt = Prompt(layer, 0, 6)
    logits = []
    for dense in (None, dense_on(device, layer, prompt.caches)):
        of_both = []
        for _ in range(3):
            caches = prompt.run(dense)[-2:]
            of_both.append(layer.run(5, caches, 6, dense)[-1])
        logits.append(torch.stack(of_both))
    assert torch.equal(*logits)


def test_a_prompt_beyond_the_devices_cache_is_refused(device: _native.Device) -> None:
    prompt = Prompt(Layer(), 0, 6)
    dense = dense_on(device, prompt.layer, [cache[:, :5].contiguous() for cache in prompt.caches])
    with pytest.raises((DeviceError, ValueError), match="key/value cache"):
        prompt.run(dense)


@pytest.mark.parametrize(
    ("copy_s", "gpu_s", "pays"), [(1e-3, 1e-4, True), (1e-3, 2e-3, False), (1.0, 1e-4, False)]
)
def test_a_prompt_goes_where_it_ends_earlier(copy_s: float, gpu_s: float, pays: bool) -> None:
    """512 tokens by 4 experts' worth of weights: 4 ms here; there 0.4 ms and 1 ms of 1 MB on the link."""
    measured = MeasuredCosts(((1, 1e-3), (512, 1e-3)), ((1, gpu_s), (512, gpu_s)), copy_s)
    costs = PromptCosts(RunningCosts(measured), expert_weights=1000, expert_bytes=1 << 20)
    assert prompt_pays(PromptWork(4000, 2048), costs, 512) is pays
