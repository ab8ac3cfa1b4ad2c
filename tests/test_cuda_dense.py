"""Dense layers in csrc/cuda: the CPU's bits. On a card, and without one over stand-ins (tests/native).

Whole layers, so that each kernel is met where it works: norms, rotary, attention of every kind over caches of
every type, routing, head. Three tokens: by launches, as the graphs are captured, and by them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from op_cases import packed_weight
from test_cuda_device import card
from test_device_dense import decode, ids_of
from test_native_step import LAYERS, VOCAB, OneLayer, address
from toy_models import save_toy_model

import moe_offload
from moe_offload import _native, cuda
from moe_offload.cuda_memory import CardMemory
from moe_offload.errors import DeviceError
from moe_offload.residency import accelerator
from moe_offload.runtime.packed_kv import pack
from moe_offload.storage.expert_format import GgmlType

MEMORY = 8 << 20


@pytest.fixture(params=["stand-in", pytest.param("card", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[_native.Device]:
    library = card() if request.param == "card" else request.getfixturevalue("stand_in")
    device = _native.CudaDevice(library, 0, MEMORY)
    yield device
    device.close()


class Placed:
    """Tensors copied to a device, and addresses there for those here."""

    def __init__(self, device: _native.Device) -> None:
        self.device, self.end, self.there = device, device.address, {0: 0}

    def room(self, num_bytes: int) -> int:
        begin, self.end = self.end, self.end + (num_bytes + 255) // 256 * 256
        return begin

    def put(self, here: int, num_bytes: int, there: int) -> None:
        ticket = self.device.submit(np.array([[here, there, num_bytes]], np.int64), False)
        assert self.device.wait(ticket, 30) and self.device.error(ticket) is None

    def tensor(self, tensor: torch.Tensor) -> None:
        self.there[tensor.data_ptr()] = self.room(tensor.nbytes)
        self.put(tensor.data_ptr(), tensor.nbytes, self.there[tensor.data_ptr()])

    def linear(self, linear: tuple[int, ...]) -> tuple[int, ...]:
        ggml_type, rows, cols, here, num_bytes, bias = linear
        return ggml_type, rows, cols, self.there[here], num_bytes, self.there[bias]

    def attention(self, attention: dict[str, Any]) -> dict[str, Any]:
        moved = dict(attention)
        for name in ("query", "key", "value", "out"):
            moved[name] = self.linear(attention[name])
        for name in ("norm", "q_norm", "k_norm", "sinks", "feed_forward_norm"):
            moved[name] = self.there[attention[name]]
        return moved


class Layer(OneLayer):
    """A layer of any matrix formats, alone or behind one with experts (top_k, of the chosen, normalized)."""

    NUM_EXPERTS = 19

    def __init__(self, *, routed: tuple[int, bool, bool] | None = None, **traits: Any) -> None:
        super().__init__(**traits)
        self.routed, self.packed = routed, dict[str, Any]()
        shapes = {"router": (19, self.hidden), "router_bias": (19,), "experts": (19, 3 * 8 * self.hidden)}
        self.w |= {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
        of_experts = [(0, 16, self.hidden, False), (0, self.hidden, 8, False)]
        self.experts_kernel = _native.ExpertKernel(of_experts, 0, 19, 0, 0.0, 0.0, 0, 0)

    def pack(self, name: str, ggml_type: GgmlType) -> None:
        rows, cols = self.w[name].shape
        self.packed[name] = int(ggml_type), rows, cols
        self.w[name] = torch.from_numpy(packed_weight(ggml_type, rows, cols, seed=len(name)))

    def linear(self, name: str, bias: torch.Tensor | None = None) -> tuple[int, ...]:
        if name not in self.packed:
            return super().linear(name, bias)
        weight = self.w[name]
        return *self.packed[name], address(weight), weight.nbytes, address(bias)

    def described(self) -> Any:
        described = super().described()
        described.shape["max_top_k"] = self.routed[0] if self.routed else 0
        return described

    def router(self) -> tuple[Any, ...]:
        assert self.routed is not None
        return self.linear("router", self.w["router_bias"]), *self.routed

    def run(
        self,
        token: int,
        caches: list[torch.Tensor],
        num_tokens: int,
        dense: Any = None,
        compute: Callable[[Any, int, list[int]], None] | None = None,
    ) -> list[Any]:
        """A token through the layers of ``caches``: what was chosen, what experts saw, the logits.

        compute: queues the rows of a step's experts (step, layer, ids); default: the CPU does.
        """
        layer, seen = self.described(), list[Any]()
        step = _native.DecodeStep(layer.shape, self.linear("embedding"), layer.final_norm, layer.head)
        if self.routed:
            step.add_moe_layer(layer.attention, *self.router(), self.experts_kernel)
        step.add_dense_layer(layer.attention, layer.kernel, layer.addresses)
        step.use_device(dense, 0, True)
        step.begin(token, address(self.cos), address(self.sin))
        for i in range(step_layers := len(caches) // 2):
            keys, values = map(address, caches[2 * i : 2 * i + 2])
            step.attend(i, keys, values, caches[0].shape[1], num_tokens)
            if self.routed and i + 1 < step_layers:
                ids, weights = step.choice()
                saw = (ctypes.c_float * self.hidden).from_address(step.router_input)
                seen += [ids, weights, list(saw)]
                if compute is not None:
                    compute(step, i, ids)
                    continue
                first, row = address(self.w["experts"]), self.w["experts"].stride(0) * 4
                down = 16 * self.hidden * 4
                step.experts(i, [a for id_ in ids for a in (first + id_ * row, first + id_ * row + down)])
        logits = torch.empty(VOCAB)
        step.logits(address(logits))
        return [*seen, logits]


def random_cache(layer: Layer, capacity: int) -> torch.Tensor:
    """Keys or values of every token, as the layer's cache keeps them; None: packed."""
    rows = torch.randn(layer.kv_heads, capacity, layer.head_dim)
    return pack(rows) if layer.cache_dtype is None else rows.to(layer.cache_dtype)


def dense_on(device: _native.Device, layer: Layer, caches: list[torch.Tensor]) -> Any:
    """The layer's dense part on a device, with what ``caches`` (keys, values of each layer) hold."""
    placed = Placed(device)
    for tensor in [*layer.w.values(), *caches]:
        placed.tensor(tensor)
    described, layers = layer.described(), []
    attention = placed.attention(described.attention)
    for i in range(0, len(caches), 2):
        router, kernel, networks = (), described.kernel, [placed.there[a] for a in described.addresses]
        if layer.routed and i == 0:
            gate, *options = layer.router()
            router, kernel, networks = (placed.linear(gate), *options), layer.experts_kernel, []
        places = [placed.there[address(cache)] for cache in caches[i : i + 2]]
        layers.append((attention, router, kernel, networks, *places))
    final_norm, head = placed.there[described.final_norm], placed.linear(described.head)
    return _native.DenseStep(device, described.shape, 0, caches[0].shape[1], layers, final_norm, head)


def test_a_copy_into_a_slot_waits_for_rows_that_stay_there(device: _native.Device) -> None:
    """Before the next choice nobody waits for them, but their experts' slots are given to others."""
    layer = Layer(routed=(6, False, True))
    caches = [torch.zeros(layer.kv_heads, 2, layer.head_dim).to(layer.cache_dtype) for _ in range(4)]
    theirs, experts = [cache.clone() for cache in caches], layer.w["experts"]
    expected = layer.run(3, caches, 0)
    dense, kernel = dense_on(device, layer, theirs), device.make_kernel(layer.experts_kernel)
    slots, row, down = device.address + MEMORY // 2, experts.stride(0) * 4, 16 * layer.hidden * 4
    others = torch.full_like(experts, torch.nan)

    def fill(tensor: torch.Tensor) -> None:
        ticket = device.submit(np.array([[tensor.data_ptr(), slots, tensor.nbytes]], np.int64), False)
        assert device.wait(ticket, 30) and device.error(ticket) is None

    def compute(step: Any, index: int, ids: list[int]) -> None:
        addresses = [slots + i * row + part for i in ids for part in (0, down)]
        pairs = list(range(len(ids) + 1)), [0] * len(ids), [0] * len(ids)
        there = dense, step.leave_rows(list(range(len(ids))))
        launch = device.launch(kernel, layer.experts_kernel, None, ids, addresses, *pairs, *there)
        assert device.wait_launch(launch, 30)
        fill(others)
        assert device.collect(launch, 0, [0] * len(ids)) is None
        step.add_expert_rows(index)

    fill(experts)
    actual = layer.run(3, theirs, 0, dense, compute)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def assert_same_tokens(device: _native.Device, layer: Layer, num_tokens: int) -> None:
    """Three tokens behind ``num_tokens`` others: logits, keys and values, choices."""
    torch.manual_seed(num_tokens)
    caches = [random_cache(layer, num_tokens + 3) for _ in range(4 if layer.routed else 2)]
    theirs = [cache.clone() for cache in caches]
    dense = dense_on(device, layer, theirs)
    for i in range(3):
        expected = layer.run(3 + i, caches, num_tokens + i)
        actual = layer.run(3 + i, theirs, num_tokens + i, dense)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
        for one, other in zip(theirs, caches, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


LENGTHS = {"plain": [0, 255, 700], "window beyond a range": [298, 513], "seven heads per key": [300]}
PACKED_CACHES: dict[str, dict[str, Any]] = {
    "packed cache": {"cache_dtype": None, "head_dim": 32, "rotary_dim": 32},
    "packed cache, wide rows": {"cache_dtype": None, "head_dim": 160, "heads": 6, "kv_heads": 1},
    "packed cache, window": {"cache_dtype": None, "head_dim": 64, "window": 9, "sinks": True},
}


@pytest.mark.parametrize("name", [*LAYERS, *PACKED_CACHES])
def test_a_layer_has_the_cpus_bits(device: _native.Device, name: str) -> None:
    for num_tokens in LENGTHS.get(name, [6, 300] if name in PACKED_CACHES else [6]):
        assert_same_tokens(device, Layer(**(LAYERS | PACKED_CACHES)[name]), num_tokens)


@pytest.mark.parametrize("special", [0.0, 1e-42, 1e38, torch.inf, torch.nan])
def test_rows_that_cannot_be_packed_become_what_the_cpu_makes_of_them(
    device: _native.Device, special: float
) -> None:
    """The bias is all that the projection yields; of a NaN the scale is one, too."""
    layer = Layer(cache_dtype=None, head_dim=64)
    layer.w["value"].zero_()
    layer.w["value_bias"] = torch.zeros(layer.kv_heads * 64)
    layer.w["value_bias"][[3, 70]] = special
    caches = [random_cache(layer, 1) for _ in range(2)]
    theirs = [cache.clone() for cache in caches]
    layer.run(2, caches, 0)
    layer.run(2, theirs, 0, dense_on(device, layer, theirs))
    assert torch.equal(theirs[1], caches[1])


ROUTERS = {
    "of all": (6, False, False),
    "of all, normalized": (5, False, True),
    "of the chosen": (4, True, False),
    "one": (1, False, True),
}


@pytest.mark.parametrize("graphs", ["on", "off"])
@pytest.mark.parametrize("name", ROUTERS)
def test_routing_and_packed_matrices_have_the_cpus_bits(
    device: _native.Device, name: str, graphs: str, monkeypatch: pytest.MonkeyPatch, stand_in: str
) -> None:
    """A layer with experts, then a dense one; some matrices packed, in blocks that fill no superblock."""
    monkeypatch.setenv("MOE_OFFLOAD_CUDA_GRAPHS", graphs)
    launched = ctypes.CDLL(stand_in).cuda_graphs_launched
    before = launched()
    layer = Layer(hidden=96, cache_dtype=torch.bfloat16, qk_norm=True, bias=True, routed=ROUTERS[name])
    for packed in ("query", "out", "head", "gate", "router"):
        layer.pack(packed, GgmlType.Q8_0)
    assert_same_tokens(device, layer, 9)
    if device.name == "stand-in":
        graphs_launched = 2 * 3 if graphs == "on" else 0  # two layers and a head, behind the first token
        assert launched() - before == graphs_launched


def test_equal_scores_go_to_the_smaller_id(device: _native.Device) -> None:
    layer = Layer(routed=(6, False, True))
    layer.w["router"][5:], layer.w["router_bias"][5:] = layer.w["router"][4], layer.w["router_bias"][4]
    assert_same_tokens(device, layer, 2)


@pytest.mark.parametrize("of_chosen", [True, False])
def test_scores_that_are_no_numbers_choose_as_on_the_cpu(device: _native.Device, of_chosen: bool) -> None:
    """Experts that there are: a number beyond them would be looked up by the host."""
    layer = Layer(routed=(4, of_chosen, True))
    layer.w["router_bias"][[2, 7]] = torch.nan
    caches = [torch.zeros(layer.kv_heads, 2, layer.head_dim).to(layer.cache_dtype) for _ in range(4)]
    theirs = [cache.clone() for cache in caches]
    expected = layer.run(3, caches, 0)
    actual = layer.run(3, theirs, 0, dense_on(device, layer, theirs))
    assert list(actual[0]) == list(expected[0])
    np.testing.assert_array_equal(np.asarray(actual[1]), np.asarray(expected[1]))


def test_what_no_kernel_does_is_refused(device: _native.Device) -> None:
    assert device.has_matrix(int(GgmlType.Q4_K)) and not device.has_matrix(int(GgmlType.IQ2_XXS))
    layer = Layer()
    caches = [torch.zeros(layer.kv_heads, 4, layer.head_dim) for _ in range(2)]
    dense = dense_on(device, layer, [cache[:, :1].contiguous() for cache in caches])
    with pytest.raises(DeviceError, match="cache is full"):
        layer.run(1, caches, 1, dense)


def test_a_whole_model_has_the_cpus_bits(
    stand_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As device="cuda" loads it: dense layers, experts on both sides, a prompt's keys and values."""
    monkeypatch.setattr(cuda, "LIBRARY", Path(stand_in))
    monkeypatch.setattr(cuda, "describe", lambda: {"reason": "", "devices": [{"unusable": ""}]})
    memory = CardMemory(1 << 30, 1 << 30, 0, is_measured=True, has_display=False)
    monkeypatch.setattr(accelerator, "card_memory", lambda index: memory)
    path, ids = save_toy_model("qwen3_moe", tmp_path, torch.bfloat16), ids_of(12)
    logits = []
    for options in ({}, {"device": "cuda:dense=on", "vram": "4MiB", "scheduler": "static_split"}):
        model = moe_offload.from_pretrained(path, ram="2GiB", context=64, warm_start=False, **options)
        cache = model.offload.new_cache()
        prompt = decode(model, ids[:, :9], 9, cache)
        dense = model.offload.native_step.dense
        before = model.offload.hybrid and (rows_waits(model), dense.native.num_waits)
        logits.append(torch.cat([prompt, decode(model, ids[:, 9:], 1, cache)]))
        if options:
            assert rows_waits(model) == before[0], "rows of experts stay behind dense layers"
            assert dense.native.num_waits - before[1] == 3 * (1 + 3 + 1)
            assert dense.prompt_tokens == 9
            assert model.offload.hybrid.counters.stayed_s > 0
            assert model.offload.hybrid.counters.cpu_experts > 0
            assert (
                "3 of 3 dense layers and the head on the device" in model.offload.stats().device.device_state
            )
        model.offload.close()
    assert torch.equal(*logits)


def rows_waits(model: Any) -> float:
    return float(model.offload.hybrid.tier.device.counters()["waits"])


@pytest.mark.cuda
@pytest.mark.parametrize("dense", ["on", "off"])
def test_the_demo_model_has_the_cpus_bits_on_a_card(dense: str) -> None:
    card()
    ids = torch.randint(5, 8000, (1, 60), generator=torch.Generator().manual_seed(1))
    logits = []
    for device in (None, f"cuda:0,dense={dense}"):
        model = moe_offload.from_pretrained(ram="4GiB", context=128, warm_start=False, device=device)
        logits.append(decode(model, ids, 20))
        assert device is None or (model.offload.native_step.dense is not None) is (dense == "on")
        model.offload.close()
    assert torch.equal(*logits)
