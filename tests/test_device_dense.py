"""Dense layers, keys and values on a device: the CPU's bits, whatever fits, whatever fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_hybrid import loaded
from toy_models import decode, save_toy_model

from moe_offload.header_sizes import dense_sizes
from moe_offload.planning.dense_placement import DenseCosts, DenseSizes, place_dense
from moe_offload.planning.placement import plan_device
from moe_offload.runtime import device_dense
from moe_offload.storage.checkpoint import open_checkpoint

DENSE = "dense=on"


def on_device(model: Any) -> Any:
    dense = model.offload.native_step.dense
    assert dense is not None and dense.is_on, model.offload.hybrid.tier.plan.describe()
    return dense


def ids_of(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (1, count), generator=torch.Generator().manual_seed(seed))


FAMILIES = {
    "qwen3_moe": ("qwen3_moe", torch.bfloat16, {}),
    "dense layers between": ("qwen3_moe_with_dense_layers", torch.float16, {}),
    "a window": ("mixtral", torch.float32, {"sliding_window": 7}),
    "clipped": ("olmoe", torch.float32, {"clip_qkv": 0.3, "norm_topk_prob": True}),
    "sinks": ("gpt_oss", torch.float32, {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_cpus_bits(name: str, tmp_path: Path) -> None:
    family, dtype, overrides = FAMILIES[name]
    path, ids = save_toy_model(family, tmp_path, dtype, **overrides), ids_of(24)
    with loaded(None, path=path) as model:
        expected = decode(model, ids, 18)
    with loaded(f"8MiB,{DENSE}", path=path, scheduler="on_demand") as model:
        dense, plan = on_device(model), model.offload.hybrid.tier.plan
        assert dense.plan.first_layer == 0 and dense.plan.has_head and not dense.plan.reason
        assert torch.equal(decode(model, ids, 18), expected)
        assert dense.copied_tokens == 0 and dense.prompt_tokens == 18, "the prompt was computed there"
        assert model.offload.hybrid.counters.device_experts > 0
        used = plan.expert_bytes + plan.dense_bytes + plan.workspace_bytes
        assert used <= plan.vram_bytes and plan.dense_bytes > 0
        assert "3 dense layers" in plan.describe() or "4 dense layers" in plan.describe()


def waits_of(model: Any) -> int:
    """How often the host has waited for the device: for dense layers, and for rows that come home."""
    hybrid = model.offload.hybrid
    return int(on_device(model).native.num_waits + hybrid.tier.device.counters()["waits"])


@pytest.mark.parametrize("recorded", [False, True], ids=["in one native call", "layer by layer"])
@pytest.mark.parametrize("scheduler", ["static_split", "on_demand"])
def test_the_host_waits_for_the_device_once_a_layer(
    scheduler: str, recorded: bool, toy: Path, alone: torch.Tensor
) -> None:
    """Also where device and CPU share a layer's experts, and where some are copied for it."""
    ids, least = ids_of(40), plan_device_bytes(toy)
    with loaded(f"{least},{DENSE}", path=toy, scheduler=scheduler, prefetch=False) as model:
        hybrid, cache = model.offload.hybrid, model.offload.new_cache()
        if recorded:
            for executor in model.offload.native_step._moe_executors:
                executor.on_route = lambda *_: None
        assert torch.equal(decode(model, ids[:, :20], 5, cache), alone[:16])
        before, tokens = waits_of(model), dataclasses.replace(hybrid.counters)
        assert torch.equal(decode(model, ids[:, 20:], 1, cache), alone[16:])
        shared = hybrid.counters.device_experts - tokens.device_experts
        assert shared > 0 and hybrid.counters.stayed_s > 0
        on_cpu = hybrid.counters.cpu_experts - tokens.cpu_experts
        copied = hybrid.counters.copied_experts - tokens.copied_experts
        assert (copied if scheduler == "on_demand" else on_cpu) > 0
        assert waits_of(model) - before == 20 * (1 + 3 + 1), "a token's begin, three layers, the head"


def plan_device_bytes(path: Path) -> int:
    """Memory for all dense parts, and slots for some of the experts."""
    checkpoint = open_checkpoint(path)
    sizes = dense_sizes(checkpoint, 4, 256)
    dense = place_dense(sizes, context_tokens=256, room_bytes=1 << 40)
    plan = plan_device(checkpoint.spec, checkpoint.experts.layouts, vram_bytes=1 << 40, context_bytes=0)
    slots = sum(pool.slot_bytes * 9 for pool in plan.pools)
    return plan.workspace_bytes + dense.held_bytes + dense.workspace_bytes + slots


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_model("qwen3_moe", tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def alone(toy: Path) -> torch.Tensor:
    """The CPU's logits of ``ids_of(40)`` after 5 tokens."""
    with loaded(None, path=toy) as model:
        return decode(model, ids_of(40), 5)


def sized(path: Path, room: Callable[[DenseSizes], int]) -> str:
    """Return the memory that leaves ``room`` bytes for dense parts."""
    checkpoint = open_checkpoint(path)
    sizes = dense_sizes(checkpoint, 4, 256)
    least = plan_device(checkpoint.spec, checkpoint.experts.layouts, vram_bytes=1 << 40, context_bytes=0)
    slots = 2 * sum(pool.slot_bytes for pool in least.pools)  # a token's experts
    return str(least.workspace_bytes + slots + sizes.workspace_bytes + room(sizes))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("head", [True, False])
def test_what_fits_of_it_runs_there(layers: int, head: bool, toy: Path, alone: torch.Tensor) -> None:
    def room(sizes: DenseSizes) -> int:
        layer = sizes.layer_bytes[0] + 256 * sizes.kv_bytes_per_token[0]
        return layers * layer + sizes.head_bytes if head else sizes.head_bytes - 1

    with loaded(f"{sized(toy, room)},{DENSE}", path=toy) as model:
        if not head:  # smaller than a layer with its keys and values: nothing fits
            assert model.offload.native_step.dense is None
            assert "no layer fits" in model.offload.hybrid.tier.plan.describe()
        else:
            plan = on_device(model).plan
            assert (plan.first_layer, plan.has_head) == (3 - layers, True)
            assert (
                f"{layers} of 3 dense layers and the head on the device"
                in model.offload.stats().device.device_state
            )
        assert torch.equal(decode(model, ids_of(40), 5), alone)


def test_a_cache_may_go_on_anywhere(toy: Path, alone: torch.Tensor) -> None:
    """Turns of a chat, tokens taken back, two conversations by turns, steps of many tokens."""
    ids = ids_of(40)
    with loaded(None, path=toy) as model:
        other = decode(model, ids_of(30, seed=2), 4)
    with loaded(f"8MiB,{DENSE}", path=toy) as model, torch.no_grad():
        dense, cache, second = on_device(model), model.offload.new_cache(), model.offload.new_cache()
        assert torch.equal(decode(model, ids[:, :20], 5, cache), alone[:16])
        assert torch.equal(decode(model, ids_of(30, seed=2)[:, :12], 4, second), other[:9])
        cache.crop_to(9)
        model(ids[:, 9:17], past_key_values=cache, use_cache=True)  # a prompt that goes on
        assert cache.layers[0].mirrored_tokens == 17
        for i in range(17, 30):
            out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[0, -1], alone[25], rtol=0, atol=1e-4)
        copied = dense.copied_tokens
        rest = decode(model, ids_of(30, seed=2)[:, 12:], 1, second)
        assert torch.equal(rest, other[9:]) and dense.copied_tokens == copied + 12 * 3


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_packed_keys_and_values_lie_on_the_device_as_here(family: str, tmp_path: Path) -> None:
    """Fewer bytes of the budget, the CPU's bits; also of tokens that were computed here and copied."""
    path, ids = save_toy_model(family, tmp_path, head_dim=64), ids_of(40)
    with loaded(None, path=path, kv="q8_0") as model:
        expected = decode(model, ids, 9)
        plain = open_checkpoint(path)
    with loaded(f"8MiB,{DENSE}", path=path, kv="q8_0") as model:
        dense, cache = on_device(model), model.offload.new_cache()
        assert dense.plan.first_layer == 0 and dense.plan.has_head
        floats = sum(dense_sizes(plain, 4, 256).kv_bytes_per_token) * dense.plan.context_tokens
        assert dense.plan.kv_bytes * 4 * 32 == floats * 34, "34 bytes for 32 numbers"
        assert torch.equal(decode(model, ids[:, :20], 9, cache), expected[:12])
        assert dense.prompt_tokens == 9 and dense.copied_tokens == 0
        native, model.offload.native_step = model.offload.native_step, None
        decode(model, ids_of(5, seed=2), 1, model.offload.new_cache())
        model.offload.native_step = native
        dense._owner = None  # as if another conversation had been there
        assert torch.equal(decode(model, ids[:, 20:], 1, cache), expected[12:])
        assert dense.copied_tokens == 20 * 3


def test_logits_of_all_tokens_come_from_the_device(toy: Path) -> None:
    """A prompt's, as for its perplexity, and several tokens that a guess is checked with."""
    ids = ids_of(60)
    logits = []
    for vram in (None, f"8MiB,{DENSE}"):
        with loaded(vram, path=toy) as model, torch.no_grad():
            of_all = model(ids, use_cache=True)
            checked = model(ids[:, :7], past_key_values=of_all.past_key_values, logits_to_keep=5)
            logits.append(torch.cat([of_all.logits[0], checked.logits[0]]))
            if vram:
                waits = on_device(model).native.num_waits
                model(ids_of(7), past_key_values=of_all.past_key_values)
                assert on_device(model).native.num_waits - waits >= 3 + 1, "three layers and the head"
                assert on_device(model).prompt_tokens == 60 + 7 + 7
    assert logits[0].shape == (65, 97) and torch.equal(*logits)


def test_guessed_tokens_are_checked_on_the_device(toy: Path) -> None:
    """Prompt lookup: several tokens a forward, those that were wrong taken back; the same text."""
    ids = torch.cat([ids_of(12), ids_of(12)], 1)
    texts = []
    for vram in (None, f"8MiB,{DENSE}"):
        with loaded(vram, path=toy) as model:
            out = model.generate(ids, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4)
            texts.append(out[0])
            if vram:
                assert on_device(model).prompt_tokens > 24, "more than the prompt"
    assert torch.equal(*texts)


def test_a_prompt_on_the_cpu_is_copied_once(
    toy: Path, alone: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between tokens on the device, which the prompt's own native code leaves alone then."""
    monkeypatch.setattr(device_dense, "prompt_pays", lambda work, costs, num_tokens: num_tokens < 7)
    ids = ids_of(40)
    with loaded(f"8MiB,{DENSE}", path=toy) as model, torch.no_grad():
        dense, cache = on_device(model), model.offload.new_cache()
        dense._prompt_costs = object()
        assert torch.equal(decode(model, ids[:, :6], 5, cache), alone[:2])
        assert dense.prompt_tokens == 5 and dense.copied_tokens == 0
        model(ids[:, 6:20], past_key_values=cache, use_cache=True)
        assert dense.prompt_tokens == 5
        assert torch.equal(decode(model, ids[:, 20:], 1, cache), alone[16:])
        assert dense.copied_tokens == 14 * 3


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize(("after", "to_host"), [(0, False), (40, False), (3, True), (71, True)])
def test_a_fault_costs_a_token_and_no_bit(
    lost: bool, after: int, to_host: bool, toy: Path, alone: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    """Anywhere: while a prompt's keys and values are copied, in attention, at the head."""
    with loaded(f"8MiB,{DENSE}", path=toy, scheduler="static_split") as model:
        dense, device = on_device(model), model.offload.hybrid.tier.device
        device.inject(after, lost=lost, to_host=to_host)
        assert torch.equal(decode(model, ids_of(40), 5), alone)
        assert dense.is_on is not lost
        state = model.offload.stats().device.device_state
        assert ("dense layers off: the emulated device" in state) is lost
    assert ("dense layers go on on the CPU" in capsys.readouterr().err) is lost


@pytest.mark.parametrize(
    ("vram", "options", "reason"),
    [
        ("8MiB", {}, "an emulated device is no faster"),
        ("8MiB,dense=off", {}, "dense=off"),
    ],
)
def test_why_dense_layers_stay_is_said(
    vram: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = save_toy_model("qwen3_moe", tmp_path, head_dim=32)
    with loaded(vram, path=path, **options) as model:
        assert model.offload.native_step.dense is None
        assert f"dense layers on the CPU ({reason}" in model.offload.hybrid.tier.plan.describe()


SIZES = DenseSizes((100, 200, 300), 50, (1, 1, 2), 10)


@given(st.integers(0, 900))
def test_dense_layers_are_placed_from_the_last_one_on(room_bytes: int) -> None:
    plan = place_dense(SIZES, context_tokens=10, room_bytes=room_bytes)
    assert plan.held_bytes + plan.workspace_bytes <= room_bytes
    placed = range(plan.first_layer, 3)
    assert plan.weight_bytes == sum(SIZES.layer_bytes[i] for i in placed) + (50 if plan.has_head else 0)
    assert plan.kv_bytes == sum(10 * SIZES.kv_bytes_per_token[i] for i in placed)
    assert bool(plan.reason) == (room_bytes < 10 + 50 + 600 + 40)
    if 0 < plan.first_layer < 3:
        more = SIZES.layer_bytes[plan.first_layer - 1] + 10 * SIZES.kv_bytes_per_token[plan.first_layer - 1]
        assert plan.held_bytes + 10 + more > room_bytes


def test_dense_layers_stay_where_it_does_not_pay() -> None:
    quick = DenseCosts(cpu_bytes_per_s=1e3, device_bytes_per_s=1e4, layer_s=0.1)  # 0.2 s against 0.02 + 0.1
    assert place_dense(SIZES, context_tokens=1, room_bytes=10**6, costs=quick).first_layer == 0
    slow = DenseCosts(cpu_bytes_per_s=1e3, device_bytes_per_s=1e4, layer_s=0.2)
    plan = place_dense(SIZES, context_tokens=1, room_bytes=10**6, costs=slow)
    assert plan.is_empty and plan.held_bytes == 0 and "as fast" in plan.describe()
