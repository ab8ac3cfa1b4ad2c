"""Every family gives what plain transformers gives: logits, greedy tokens, padded batches."""

from __future__ import annotations

import pytest
import torch
from toy_models import FAMILIES, plain_model, save_toy_model

import moe_offload

PROMPTS = torch.tensor([[0, 0, 0, 11, 12, 13, 14], [21, 22, 23, 24, 25, 26, 27]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(plain transformers model, offloaded model with few experts in memory)."""
    folder = save_toy_model(request.param, tmp_path_factory.mktemp(request.param))
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
