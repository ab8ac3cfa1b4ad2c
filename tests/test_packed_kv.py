"""Keys and values in fewer bits: the blocks, what keeps its bits, what works, what is refused."""

from __future__ import annotations

import gguf
import pytest
import torch
from test_native_step import OneLayer
from toy_models import model_on_meta, save_toy_model
from transformers import CONFIG_MAPPING
from walk_families import tiny_config

import moe_offload
from moe_offload import BudgetError, ConfigError, ops
from moe_offload.config import GIB, RuntimeConfig
from moe_offload.header_costs import place
from moe_offload.planning.cost_model import kv_bytes, state_tokens
from moe_offload.planning.kv_format import (
    HYBRID_CACHE_FAMILIES,
    KV_BLOCK_BYTES,
    KV_BLOCK_ELEMENTS,
    cached_widths,
    check_kv,
)
from moe_offload.runtime.packed_kv import PackedKVCacheLayer, pack, unpack
from moe_offload.runtime.skeleton import cache_layer_types
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.families import DENSE_FAMILIES, MOE_FAMILIES, MOE_FAMILIES_BY_TRIAL

# Each way of caching, with rows that can be cut into blocks of 32.
FAMILIES = {
    "qwen3_moe": {"head_dim": 32},
    "gpt_oss": {"head_dim": 64},  # sliding windows and sinks
    "deepseek_v2": {"kv_lora_rank": 64, "qk_rope_head_dim": 32},  # one latent for all heads
}


def special_numbers() -> torch.Tensor:
    powers = torch.randint(-9, 6, (40, 64), generator=torch.Generator().manual_seed(5))
    numbers = torch.linspace(-1.0, 1.0, 40 * 64).view(40, 64) * 10.0**powers
    numbers[0], numbers[1, 3], numbers[2, 40] = 0.0, 1e30, -1e-30
    return numbers


def test_blocks_are_ggmls_and_miss_a_number_by_half_a_step() -> None:
    numbers = torch.randn(7, 5, 64, generator=torch.Generator().manual_seed(1))
    rows = pack(numbers)
    assert rows.shape == (7, 5, 64 // KV_BLOCK_ELEMENTS * KV_BLOCK_BYTES) and rows.dtype == torch.uint8
    unpacked = unpack(rows, torch.float32)
    ggml = gguf.dequantize(rows.numpy().reshape(35, -1), gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(unpacked, torch.from_numpy(ggml).view_as(unpacked))
    step = numbers.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    error = (unpacked - numbers).unflatten(-1, (-1, 32)).abs()
    assert (error <= step * (0.5 + 127 * 2**-11)).all()  # the scale is rounded to 11 bits


def test_what_is_no_number_stays_seen() -> None:
    numbers = torch.ones(1, 64)
    numbers[0, 5], numbers[0, 40] = torch.nan, torch.inf
    assert unpack(pack(numbers), torch.float32).isnan().all()


def halfway_numbers() -> torch.Tensor:
    """A code between -64 and -63 if 127 / 8.225171 is rounded once, and -63 if it is rounded twice."""
    numbers = torch.zeros(1, 64)
    numbers[0, 3], numbers[0, 20] = 8.225171089172363, -4.112585544586182
    return numbers


def random_numbers() -> torch.Tensor:
    return torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("numbers", [special_numbers(), random_numbers(), halfway_numbers()])
def test_native_code_writes_the_same_bytes(numbers: torch.Tensor) -> None:
    """The bias is all that the projections yield: what arrives in the cache is its packing."""
    layer = OneLayer(heads=1, kv_heads=1, head_dim=numbers.numel(), rotary_dim=0, bias=True)
    layer.cache_dtype = None
    layer.w["value"].zero_()
    layer.w["value_bias"] = numbers.flatten()
    keys, values = (torch.zeros(1, 1, numbers.numel() // 32 * 34, dtype=torch.uint8) for _ in range(2))
    layer.native(0, keys, values, 0)
    assert torch.equal(values[0, 0], pack(numbers.flatten()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    return {name: save_toy_model(name, root / name, **traits) for name, traits in FAMILIES.items()}


def run(folder, prompt, **choices):
    """Logits of a prompt and of four tokens after it, one by one."""
    model = moe_offload.from_pretrained(
        folder, ram="4GiB", context=1000, warm_start=False, kv="q8_0", **choices
    )
    with torch.no_grad():
        out = model(prompt)
        logits, cache = [out.logits[:, -1]], out.past_key_values
        for token in range(4):
            logits.append(model(torch.tensor([[token + 5]]), past_key_values=cache).logits[:, -1])
    assert isinstance(cache.layers[0], PackedKVCacheLayer)
    model.offload.close()
    return torch.stack(logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_neither_budget_nor_threads_change_a_bit(name, folders):
    prompt = torch.arange(600).remainder(97)[None]  # two chunks
    before = ops.num_threads()
    try:
        one = run(folders[name], prompt, experts=3, num_threads=1, prefetch=False, policy="lru")
        other = run(folders[name], prompt, experts="all", num_threads=2)
    finally:
        ops.set_num_threads(before)
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_eight_bits_are_close_to_the_plain_cache_and_not_it(name, folders):
    prompt = torch.arange(70).remainder(97)[None]
    packed = run(folders[name], prompt)
    model = moe_offload.from_pretrained(folders[name], ram="4GiB", context=100, experts="all")
    with torch.no_grad():
        out = model(prompt)
        plain = [out.logits[:, -1]]
        for token in range(4):
            step = model(torch.tensor([[token + 5]]), past_key_values=out.past_key_values)
            plain.append(step.logits[:, -1])
    model.offload.close()
    error = (packed - torch.stack(plain)).abs().max() / torch.stack(plain).std()
    assert 0 < error < 0.2


def test_native_step_and_transformers_layers_read_one_cache(folders):
    """A token computed natively from packed rows is what transformers' layers make of them."""
    model = moe_offload.from_pretrained(folders["qwen3_moe"], ram="4GiB", context=800, kv="q8_0")
    assert model.offload.native_step is not None
    prompt = torch.arange(300).remainder(97)[None]
    logits = []
    for native in (model.offload.native_step, None):
        model.offload.native_step = native
        with torch.no_grad():
            cache = model(prompt).past_key_values
            logits.append(model(torch.tensor([[7]]), past_key_values=cache).logits)
        assert cache.get_seq_length() == 301
    model.offload.close()
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_and_batches_have_the_tokens_that_rows_alone_have(name, folders):
    model = moe_offload.from_pretrained(folders[name], ram="4GiB", context=200, kv="q8_0")
    prompt = torch.tensor([[5, 9, 3, 8, 1]])
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(prompt, **kwargs)
    assert torch.equal(model.generate(prompt, **kwargs), greedy)
    beams = model.generate(prompt, num_beams=3, num_return_sequences=3, **kwargs)
    assert beams.shape == (3, 13) and len({tuple(row.tolist()) for row in beams}) == 3
    model.offload.close()


def test_reorder_crop_and_repeat_move_packed_rows():
    layer = PackedKVCacheLayer(60)
    states = torch.randn(2, 3, 10, 32)
    keys, _ = layer.update(states, states)
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.keys, keys[[1, 1]])
    layer.crop(-4)
    assert torch.equal(layer.keys, keys[[1, 1], :, :6])
    layer.batch_repeat_interleave(3)
    assert torch.equal(layer.values, keys[[1] * 6, :, :6]) and layer.num_sequences == 6
    layer.batch_select_indices(torch.tensor([0, 2]))
    assert torch.equal(layer.keys, keys[[1, 1], :, :6]) and layer.get_seq_length() == 6
    with pytest.raises(BudgetError, match="holds 30 tokens for each of 2 sequences, but 31"):
        layer.update(torch.randn(2, 3, 25, 32), torch.randn(2, 3, 25, 32))


def test_the_budget_counts_the_blocks(folders):
    checkpoint = open_checkpoint(folders["qwen3_moe"])
    spec = checkpoint.spec
    plans = {
        kv: place(checkpoint, RuntimeConfig(context_tokens=1000, kv=kv), ram_bytes=2 * GIB)
        for kv in (None, "q8_0")
    }
    assert plans["q8_0"].kv_bytes * 32 * 4 == plans[None].kv_bytes * 34
    sizes = {"context_tokens": 1000, "batch_size": 1, "kv": "q8_0"}
    assert plans["q8_0"].kv_bytes == kv_bytes(spec, bytes_per_element=2, **sizes)
    unpacked = max(spec.kv_elements_per_token) * 1000 * 4
    assert plans["q8_0"].workspace_bytes - plans[None].workspace_bytes == unpacked
    assert state_tokens(spec, bytes_per_element=4, kv="q8_0") == 0


@pytest.mark.parametrize("kv", [None, "q8_0"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_counts_the_bytes_that_the_runtime_allocates(name, kv, folders):
    """Grouped heads, sliding windows (which keep every token) and a latent, plain and packed."""
    planned = place(open_checkpoint(folders[name]), RuntimeConfig(context_tokens=96, kv=kv), ram_bytes=GIB)
    model = moe_offload.from_pretrained(folders[name], ram="4GiB", context=96, warm_start=False, kv=kv)
    try:
        cache = model.offload.new_cache(96)
        with torch.no_grad():
            model(torch.arange(5)[None], past_key_values=cache, use_cache=True)
        storage = [part for layer in cache.layers for part in (layer._key_storage, layer._value_storage)]
        assert sum(part.nbytes for part in storage) == model.offload.plan.kv_bytes == planned.kv_bytes > 0
        with pytest.raises(BudgetError, match="96 were budgeted"):
            model.generate(torch.arange(60)[None], max_new_tokens=37)
    finally:
        model.offload.close()


def test_a_context_that_is_too_large_is_refused_with_those_that_are_not(folders):
    checkpoint = open_checkpoint(folders["qwen3_moe"])
    plain, packed = RuntimeConfig(context_tokens=1000), RuntimeConfig(context_tokens=1000, kv="q8_0")
    short = RuntimeConfig(context_tokens=300)
    ram_bytes = place(checkpoint, short, ram_bytes=GIB).base_bytes + sum(
        getattr(place(checkpoint, short, ram_bytes=GIB), part) for part in ("dense_bytes", "kv_bytes")
    )
    with pytest.raises(BudgetError, match="KV cache") as error:
        place(checkpoint, plain, ram_bytes=ram_bytes)
    assert "longest context" not in str(error.value)  # there is no room for a prompt at all
    with pytest.raises(BudgetError, match="experts=1 is fewer") as error:
        place(checkpoint, RuntimeConfig(context_tokens=300, experts=1), ram_bytes=GIB)
    assert "longest context" not in str(error.value)  # another one would not help
    for tokens in (1, 999):
        least = least_bytes(checkpoint, tokens, None)
        with pytest.raises(BudgetError, match=f"would fit is {tokens} tokens, or .*with kv='q8_0'"):
            place(checkpoint, plain, ram_bytes=least)
        assert place(checkpoint, RuntimeConfig(context_tokens=tokens), ram_bytes=least)
    with pytest.raises(BudgetError, match=r"would fit is [0-9]+ tokens with kv='q8_0'"):
        place(checkpoint, packed, ram_bytes=least_bytes(checkpoint, 500, "q8_0"))


def least_bytes(checkpoint, tokens, kv):
    """The least budget that is named for a context."""
    with pytest.raises(BudgetError) as error:
        place(checkpoint, RuntimeConfig(context_tokens=tokens, kv=kv), ram_bytes=1)
    return int(str(error.value).split("GiB (")[-1].split(" bytes")[0])


def test_rows_that_cannot_be_cut_are_refused_by_name(tmp_path):
    folder = save_toy_model("mixtral", tmp_path)  # head_dim 16
    with pytest.raises(ConfigError, match=r"kv='q8_0' packs .* blocks of 32 .* head_dim=16"):
        moe_offload.from_pretrained(folder, ram="4GiB", kv="q8_0")
    with pytest.raises(ConfigError, match="kv='q4_0' is not known; known are q8_0"):
        moe_offload.from_pretrained(folder, ram="4GiB", kv="q4_0")
    with pytest.raises(ConfigError, match="qk_rope_head_dim=8"):
        check_kv({"kv_lora_rank": 32, "qk_rope_head_dim": 8}, "q8_0", "it")
    with pytest.raises(ConfigError, match="model_type 'zaya' keep a state"):
        check_kv({"model_type": "zaya"}, "q8_0", "it")
    with pytest.raises(ConfigError, match="this model has rows of 40"):
        PackedKVCacheLayer(8).update(torch.ones(1, 1, 1, 40), torch.ones(1, 1, 1, 40))


@pytest.mark.parametrize("model_type", [*MOE_FAMILIES, *MOE_FAMILIES_BY_TRIAL, *DENSE_FAMILIES])
def test_the_families_with_caches_of_their_own_are_known(model_type):
    model = model_on_meta(tiny_config(CONFIG_MAPPING[model_type]))
    kinds = {kind for kind, _ in cache_layer_types(model)}
    others = kinds - {
        "full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv",
    }  # fmt: skip
    assert bool(others) == (model_type in HYBRID_CACHE_FAMILIES)
    assert cached_widths(model.config.get_text_config().to_dict())
