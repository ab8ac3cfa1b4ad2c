"""transformers' ways to generate work on an offloaded model as on a plain one."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_models import plain_model, save_toy_model
from transformers import DynamicCache, PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

import moe_offload
from moe_offload import BudgetError, ConfigError

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7]])
GREEDY = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_toy_model("qwen3_moe", tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def models_pair(folder):
    offloaded = moe_offload.from_pretrained(folder, experts="50%", ram="8GiB", context=512)
    yield plain_model(folder), offloaded
    offloaded.offload.close()


@pytest.fixture
def tokenizer():
    vocab = {f"w{i}": i for i in range(97)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w2")


def test_sampling_with_a_seed_equals_plain_transformers(models_pair):
    sampled = []
    for model in models_pair:
        torch.manual_seed(11)
        sampled.append(
            model.generate(PROMPT, max_new_tokens=24, do_sample=True, temperature=0.9, top_p=0.9, top_k=20)
        )
    assert torch.equal(*sampled)


@pytest.mark.parametrize("sequences", [1, 3])
def test_beam_search_equals_plain_transformers(models_pair, sequences):
    kwargs = {**GREEDY, "num_beams": 4, "num_return_sequences": sequences}
    expected, actual = (model.generate(PROMPT, **kwargs) for model in models_pair)
    assert torch.equal(actual, expected)


def test_several_samples_per_prompt(models_pair):
    _, offloaded = models_pair
    out = offloaded.generate(PROMPT, max_new_tokens=5, do_sample=True, num_return_sequences=3)
    assert out.shape == (3, PROMPT.shape[1] + 5)


def test_a_streamer_in_a_thread_gets_the_whole_text(models_pair, tokenizer):
    plain, offloaded = models_pair
    expected = tokenizer.decode(plain.generate(PROMPT, **GREEDY)[0, PROMPT.shape[1] :])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=offloaded.generate, args=(PROMPT,), kwargs={**GREEDY, "streamer": streamer}
    )
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_assisted_generation_gives_the_greedy_tokens(models_pair, folder):
    _, offloaded = models_pair
    expected = offloaded.generate(PROMPT, **GREEDY)
    with_plain = offloaded.generate(PROMPT, assistant_model=plain_model(folder), **GREEDY)
    helper = moe_offload.from_pretrained(folder, experts=4, ram="8GiB", context=256)
    with_offloaded = offloaded.generate(PROMPT, assistant_model=helper, **GREEDY)
    helper.offload.close()
    assert torch.equal(with_plain, expected) and torch.equal(with_offloaded, expected)


def test_prompt_lookup_gives_the_greedy_tokens(models_pair):
    _, offloaded = models_pair
    expected = offloaded.generate(PROMPT, **GREEDY)
    assert torch.equal(offloaded.generate(PROMPT, prompt_lookup_num_tokens=3, **GREEDY), expected)


def test_prompt_lookup_fills_a_context_to_its_end(folder):
    """Its guesses go beyond what may still come; there is no room for them in the cache."""
    model = moe_offload.from_pretrained(folder, experts="50%", ram="8GiB", context=64)
    prompt = PROMPT.repeat(1, 6)
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=10, **GREEDY), expected)
    model.offload.close()


def test_ids_of_32_bits_are_the_same_text(models_pair):
    """Native code was given their address as if they had 64, and read beyond their end."""
    _, offloaded = models_pair
    expected = offloaded.generate(PROMPT, **GREEDY)
    assert torch.equal(offloaded.generate(PROMPT.int(), **GREEDY), expected)
    cache = offloaded.offload.new_cache(16)
    offloaded(PROMPT.int(), past_key_values=cache)
    actual = offloaded(torch.tensor([[3]], dtype=torch.int32), past_key_values=cache).logits
    whole = offloaded(torch.cat([PROMPT, torch.tensor([[3]])], 1)).logits[:, -1:]
    torch.testing.assert_close(actual, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"must be of torch\.int64 or torch\.int32, got torch\.float32"):
        offloaded(PROMPT.float())


def test_past_key_values_go_on_where_they_stopped(models_pair):
    _, offloaded = models_pair
    expected = offloaded.generate(PROMPT, **GREEDY)
    first = offloaded.generate(PROMPT, **{**GREEDY, "max_new_tokens": 6}, return_dict_in_generate=True)
    second = offloaded.generate(
        first.sequences, past_key_values=first.past_key_values, **{**GREEDY, "max_new_tokens": 10}
    )
    assert torch.equal(second, expected)


def test_the_cache_can_be_cropped_and_used_again(models_pair):
    _, offloaded = models_pair
    cache = offloaded.offload.new_cache(64)
    offloaded(PROMPT, past_key_values=cache)
    cache.crop_to(4)
    again = offloaded(PROMPT[:, 4:], past_key_values=cache).logits
    fresh = offloaded(PROMPT).logits[:, 4:]
    torch.testing.assert_close(again, fresh, rtol=0, atol=1e-4)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_cache_has_memory_of_its_own_and_counts(models_pair, make_copy):
    """transformers' recipe for a prefix that many prompts share: one cache, copied for each of them."""
    _, offloaded = models_pair
    prefix = offloaded(PROMPT).past_key_values
    copies = {token: make_copy(prefix) for token in (3, 4)}
    del prefix
    for token, cache in copies.items():  # one begins, then the other
        offloaded(torch.tensor([[token]]), past_key_values=cache)
    for token, cache in copies.items():
        expected = offloaded(torch.cat([PROMPT, torch.tensor([[token, 9]])], 1)).logits[:, -1:]
        actual = offloaded(torch.tensor([[9]]), past_key_values=cache).logits
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert set(copies.values()) <= set(offloaded.offload.room.caches)


@pytest.mark.parametrize("text", ["w5 w6 w7", ["w5 w6 w7", "w8 w9"]])
def test_text_generation_pipeline(models_pair, tokenizer, text):
    expected, actual = (
        pipeline("text-generation", model=model, tokenizer=tokenizer)(text, max_new_tokens=8, do_sample=False)
        for model in models_pair
    )
    assert actual == expected


def test_two_threads_take_turns(models_pair):
    _, offloaded = models_pair
    expected = offloaded.generate(PROMPT, **GREEDY)
    results = [None, None]

    def run(i):
        results[i] = offloaded.generate(PROMPT, **GREEDY)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)


def test_more_tokens_than_the_context_are_refused_before_running(models_pair):
    _, offloaded = models_pair
    steps = offloaded.offload.stats().decode_steps
    with pytest.raises(BudgetError, match=r"512 were budgeted.*context="):
        offloaded.generate(PROMPT, max_new_tokens=600)
    with pytest.raises(BudgetError, match="2 sequence"):
        offloaded.generate(PROMPT.repeat(2, 1), max_new_tokens=300)
    assert offloaded.offload.stats().decode_steps == steps


def test_a_cache_in_use_counts_against_the_context(models_pair):
    _, offloaded = models_pair
    cache = offloaded.offload.new_cache(400)
    offloaded(PROMPT.repeat(1, 40), past_key_values=cache)
    with pytest.raises(BudgetError, match="320 are held by caches still alive"):
        offloaded.generate(PROMPT, max_new_tokens=200)
    del cache
    offloaded.generate(PROMPT, max_new_tokens=8)


@pytest.mark.parametrize("options", [{"past_key_values": DynamicCache}, {"use_cache": False}])
def test_no_other_cache_goes_past_the_context(models_pair, options):
    _, offloaded = models_pair
    options = {name: value() if callable(value) else value for name, value in options.items()}
    with pytest.raises(BudgetError, match=r"513 tokens, but 512 were budgeted.*context=513"):
        offloaded.generate(PROMPT.repeat(1, 63), **{**GREEDY, "max_new_tokens": 10}, **options)


def test_caches_made_together_share_the_context(models_pair):
    _, offloaded = models_pair
    first, second = offloaded.offload.new_cache(), offloaded.offload.new_cache()
    offloaded(PROMPT.repeat(1, 40), past_key_values=first)
    with pytest.raises(BudgetError, match="320 are held by caches still alive"):
        offloaded(PROMPT.repeat(1, 40), past_key_values=second)
