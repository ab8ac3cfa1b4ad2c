"""Prompts in native code: to the bit what decoding them token by token gives, and near float64."""

from __future__ import annotations

import pytest
import torch
from test_native_step import LAYERS, VOCAB, OneLayer, address, decode, load
from torch.nn.functional import scaled_dot_product_attention
from toy_models import plain_model, save_toy_model

import moe_offload
from moe_offload import _native, measure_steps, ops
from moe_offload.config import DEMO_MODEL
from moe_offload.runtime.skeleton import TORCH_DTYPES
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.expert_format import GgmlType

HEADS = {
    **LAYERS,
    "packed cache": {"cache_dtype": None, "heads": 4, "kv_heads": 2, "head_dim": 32, "window": 33},
    "one head and a half of a vector": {"heads": 1, "kv_heads": 1, "head_dim": 24},
    "more heads than a block has rows": {"heads": 130, "kv_heads": 1, "head_dim": 8, "rotary_dim": 8},
    "narrow window": {"window": 3, "sinks": True, "heads": 9, "kv_heads": 3},
}
CHUNKS = [(0, 2), (0, 7), (5, 70), (253, 4), (300, 230)]  # tokens before, tokens of the chunk


class Prompt:
    """A chunk of random tokens behind random keys and values, through one layer."""

    def __init__(self, traits, num_past, num_tokens):
        self.layer = OneLayer(**traits)
        self.num_past, self.num_tokens = num_past, num_tokens
        self.tokens = torch.randint(VOCAB, (num_tokens,))
        self.cos, self.sin = torch.randn(2, num_tokens, self.layer.half)
        shape = (2, self.layer.kv_heads, num_past + num_tokens, self.layer.head_dim)
        if self.layer.cache_dtype is None:
            from moe_offload.runtime.packed_kv import pack

            self.cached = pack(torch.randn(shape))
        else:
            self.cached = torch.randn(shape).to(self.layer.cache_dtype)

    def in_chunks(self, sizes, tile_tokens=10**6, kept=10**6):
        """Logits (num_tokens, VOCAB) of chunks one after the other, and what the cache has then.

        Args:
            kept: of each chunk, the last tokens whose logits are computed.
        """
        keys, values = self.cached.clone()
        decoder = self.layer.step()
        step, logits, start = _native.PromptStep(decoder), [], 0
        for size in sizes:
            part = slice(start, start + size)
            states = torch.empty(2, size, self.layer.hidden)
            tokens, cos, sin = (x[part].contiguous() for x in (self.tokens, self.cos, self.sin))
            addresses = (address(states[0]), address(states[1]), 0, 0, address(cos), address(sin))
            step.begin(address(tokens), size, addresses)
            for first in range(0, size, tile_tokens):
                tile = first, min(tile_tokens, size - first), max(0, size - kept)
                step.attend(0, address(keys), address(values), keys.shape[1], self.num_past + start, *tile)
            logits.append(torch.empty(min(kept, size), VOCAB))
            step.logits(max(0, size - kept), address(logits[-1]))
            start += size
        return torch.cat(logits), keys, values

    def one_by_one(self):
        """The same by DecodeStep."""
        keys, values = self.cached.clone()
        step, logits = self.layer.step(), torch.empty(self.num_tokens, VOCAB)
        for i in range(self.num_tokens):
            step.begin(int(self.tokens[i]), address(self.cos[i]), address(self.sin[i]))
            step.attend(0, address(keys), address(values), keys.shape[1], self.num_past + i)
            step.logits(address(logits[i]))
        return logits, keys, values


@pytest.mark.parametrize(("num_past", "num_tokens"), CHUNKS)
@pytest.mark.parametrize("name", HEADS)
def test_a_prompt_has_the_bits_of_its_tokens_decoded(name, num_past, num_tokens):
    prompt = Prompt(HEADS[name], num_past, num_tokens)
    for one, other in zip(prompt.in_chunks([num_tokens]), prompt.one_by_one(), strict=True):
        assert torch.equal(one, other)


def test_chunks_may_have_any_size():
    prompt = Prompt({"window": 40, "qk_norm": True}, 3, 100)
    expected = prompt.in_chunks([100])
    for sizes in ([1] * 100, [31, 69], [64, 32, 4]):
        for one, other in zip(prompt.in_chunks(sizes), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("tile_tokens", [1, 9, 64])
def test_the_tiles_of_a_chunk_change_no_bit(tile_tokens):
    prompt = Prompt({"window": 40, "qk_norm": True, "heads": 6, "kv_heads": 2}, 30, 70)
    expected = prompt.in_chunks([70])
    for one, other in zip(prompt.in_chunks([70], tile_tokens), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["packed cache", "narrow window"])
@pytest.mark.parametrize(("tile_tokens", "kept"), [(10**6, 1), (9, 12), (9, 1), (35, 35)])
def test_tokens_that_nobody_asks_for_change_no_bit_of_the_last_ones(name, tile_tokens, kept):
    prompt = Prompt(HEADS[name], 30, 70)
    logits, *cached = prompt.in_chunks([70])
    last, *cached_too = prompt.in_chunks([70], tile_tokens, kept)
    assert torch.equal(last, logits[-kept:])
    assert all(map(torch.equal, cached_too, cached))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_last_token_of_a_prompt_is_the_same_whether_the_others_are_asked_for_or_not(family, tmp_path):
    model = load(save_toy_model(family, tmp_path))
    executor = model.offload.native_step._moe_executors[-1]
    ids, tokens = torch.arange(3, 43)[None], []
    expected = model(ids).logits
    assert executor.cache.num_newcomers(executor.layer_idx) <= 2, "else all tokens are computed"
    add_experts = executor.add_experts

    def count_tokens(hidden, *args, **kwargs):
        tokens.append(len(hidden))
        add_experts(hidden, *args, **kwargs)

    executor.add_experts = count_tokens
    for kept in (1, 3, 30):
        assert torch.equal(model(ids, logits_to_keep=kept).logits, expected[:, -kept:])
    with model.offload.trace():
        assert torch.equal(model(ids, logits_to_keep=1).logits, expected[:, -1:])
    assert tokens == [1, 3, 30, 40]  # a recorder is told of all
    model.offload.close()


def test_a_tile_beyond_its_chunk_is_refused():
    prompt = Prompt({}, 0, 4)
    states, decoder = torch.empty(2, 4, prompt.layer.hidden), prompt.layer.step()
    step, keys = _native.PromptStep(decoder), prompt.cached[0]
    angles = address(prompt.cos), address(prompt.sin)
    step.begin(address(prompt.tokens), 4, (address(states[0]), address(states[1]), 0, 0, *angles))
    with pytest.raises(moe_offload.ConfigError, match="tokens 2 to 5 are not in a chunk of 4"):
        step.attend(0, address(keys), address(prompt.cached[1]), 4, 0, 2, 3)


@pytest.mark.parametrize("name", ["seven heads per key", "window", "bias and sinks", "norms of all heads"])
def test_the_last_token_of_a_prompt_equals_float64(name):
    prompt = Prompt(LAYERS[name], 20, 50)
    logits, keys, values = prompt.in_chunks([50])
    layer = prompt.layer
    layer.cos, layer.sin = prompt.cos[-1], prompt.sin[-1]
    expected = layer.reference(int(prompt.tokens[-1]), keys, values, 69)
    tolerance = 2e-6 * expected.abs().max()
    torch.testing.assert_close(logits[-1].double(), expected, rtol=2e-6, atol=tolerance)


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_and_instruction_sets_give_a_prompt_the_same_bits(num_threads, isa):
    prompt = Prompt({"heads": 6, "kv_heads": 2, "head_dim": 40, "sinks": True, "window": 90}, 200, 130)
    before = ops.num_threads()
    try:
        ops.set_num_threads(1)
        _native.force_isa("baseline")
        expected = prompt.in_chunks([130])
        ops.set_num_threads(num_threads)
        _native.force_isa(isa)
        actual = prompt.in_chunks([130])
    finally:
        ops.set_num_threads(before)
        _native.force_isa("")
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("ggml_type", [GgmlType.F32, GgmlType.BF16])
def test_attention_alone_equals_float64(ggml_type):
    heads, kv_heads, dim, tokens = 6, 2, 24, 70
    query, context = torch.randn(2, tokens, heads, dim)
    keys, values = torch.randn(2, kv_heads, tokens, dim).to(TORCH_DTYPES[ggml_type])
    shape = heads, kv_heads, dim, int(ggml_type)
    _native.attend_prompt(*shape, address(keys), address(values), tokens, address(query), address(context))
    repeated = (x.double().repeat_interleave(heads // kv_heads, 0) for x in (keys, values))
    expected = scaled_dot_product_attention(
        query.double().transpose(0, 1), *repeated, is_causal=True, scale=1
    )
    torch.testing.assert_close(context.double(), expected.transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_plan_times_the_attention_that_prompts_run(monkeypatch):
    checkpoint, calls = open_checkpoint(DEMO_MODEL), []
    monkeypatch.setattr(measure_steps, "attend_prompt", lambda *args: calls.append(args))
    measure_steps._score_s(checkpoint, is_native=False)
    assert not calls
    measure_steps._score_s(checkpoint, is_native=True)
    assert len(calls) > measure_steps.LEAST_RUNS


@pytest.mark.parametrize("token_id", [-1, VOCAB])
def test_a_token_that_the_model_does_not_have_is_refused(token_id):
    """Not by the thread that would have embedded it: an exception there ended the process."""
    prompt = Prompt({}, 0, 40)
    prompt.tokens[20] = token_id
    with pytest.raises(moe_offload.ConfigError, match=rf"token_id must be in \[0, {VOCAB}\), got {token_id}"):
        prompt.in_chunks([40])


def test_no_room_for_a_chunk_is_refused():
    prompt = Prompt({}, 0, 4)
    prompt.num_past = 1
    with pytest.raises(moe_offload.ConfigError, match="no room for 4 tokens behind 1"):
        prompt.in_chunks([4])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_long_prompt_equals_transformers_and_its_tokens_decoded(family, tmp_path):
    """More than a chunk and more than a range of keys; gpt-oss with sinks, every other layer in a window."""
    folder = save_toy_model(family, tmp_path)
    model = load(folder, context=600)
    ids = torch.randint(3, 97, (1, 530), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = plain_model(folder)(ids).logits
    actual = model(ids).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(decode(model, ids, 500), actual[0, 500:])
    model.offload.close()


def test_an_interrupted_prompt_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    model = load(save_toy_model("qwen3_moe", tmp_path))
    ids, cache = torch.arange(3, 40)[None], model.offload.new_cache(40)
    expected = model(ids).logits
    executor = model.offload.native_step._moe_executors[-1]

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(executor, "add_experts", interrupt)
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=cache).logits, expected)
    model.offload.close()
