"""Every family gives what plain transformers gives: logits, greedy tokens, padded batches."""

from __future__ import annotations

import pytest
import torch
from toy_models import FAMILIES, OTHER_FAMILIES, plain_model, save_toy_model

import moe_offload

PROMPTS = torch.tensor([[0, 0, 0, 11, 12, 13, 14], [21, 22, 23, 24, 25, 26, 27]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


@pytest.fixture(scope="module", params=[*FAMILIES, *OTHER_FAMILIES])
def folder(request, tmp_path_factory):
    return save_toy_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def pair(folder):
    """(plain transformers model, offloaded model with few experts in memory)."""
    offloaded = moe_offload.from_pretrained(folder, experts="50%", ram="8GiB", context=1024)
    yield plain_model(folder), offloaded
    offloaded.offload.close()


def test_logits_equal_plain_transformers(pair):
    plain, offloaded = pair
    with torch.no_grad():
        expected = plain(PROMPTS, attention_mask=MASK).logits
        actual = offloaded(PROMPTS, attention_mask=MASK).logits
    scale = expected.abs().max()
    torch.testing.assert_close(actual[MASK.bool()], expected[MASK.bool()], rtol=0, atol=1e-5 * max(1, scale))


def test_greedy_tokens_equal_plain_transformers_in_a_left_padded_batch(pair):
    plain, offloaded = pair
    kwargs = {"attention_mask": MASK, "max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    assert torch.equal(offloaded.generate(PROMPTS, **kwargs), plain.generate(PROMPTS, **kwargs))


def test_a_long_prompt_in_chunks_equals_plain_transformers(pair):
    plain, offloaded = pair
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(3, 97, (1, 400), generator=generator)
    prompts = torch.cat([prompt, prompt.flip(1)])  # 800 tokens: two chunks
    with torch.no_grad():
        expected = plain(prompts).logits
        actual = offloaded(prompts, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5 * max(1, expected.abs().max()))


def test_every_budget_gives_the_same_bits(folder, pair):
    """Half of the experts against the fewest that work, nothing read ahead, and against all of them."""
    _, half = pair
    tokens = [PROMPTS[1:], PROMPTS[1:, :1], PROMPTS[:1, -1:]]
    with torch.no_grad():
        cache = half.offload.new_cache()
        expected = [half(ids, past_key_values=cache).logits for ids in tokens]
    for options in ({"experts": 2, "prefetch": False}, {"experts": "all"}):
        other = moe_offload.from_pretrained(folder, ram="8GiB", context=256, **options)
        with torch.no_grad():
            cache = other.offload.new_cache()
            for ids, logits in zip(tokens, expected, strict=True):
                assert torch.equal(other(ids, past_key_values=cache).logits, logits)
        other.offload.close()
