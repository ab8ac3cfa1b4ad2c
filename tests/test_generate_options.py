"""What transformers documents for generate(): the plain model's tokens, or a refusal with the reason."""

from __future__ import annotations

import pytest
import torch
from toy_models import plain_model, save_toy_model
from transformers import LogitsProcessorList, WatermarkingConfig

import moe_offload
from moe_offload import BudgetError, ConfigError

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7]])
PADDED = torch.tensor([[0, 0, 0, 5, 6, 7], [9, 8, 7, 6, 5, 4]])
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The plain transformers model, and ours with half of its experts in memory."""
    folder = save_toy_model("qwen3_moe", tmp_path_factory.mktemp("toy"))
    offloaded = moe_offload.from_pretrained(folder, experts="50%", ram="8GiB", context=512)
    yield plain_model(folder), offloaded
    offloaded.offload.close()


def lower_the_last(input_ids, scores):
    return scores.index_fill(1, input_ids[0, -1:], -3.0)


def own_loop(model, input_ids, **kwargs):
    """What ``custom_generate`` takes: the decoding loop of somebody else."""
    for _ in range(4):
        input_ids = torch.cat([input_ids, model(input_ids).logits[:, -1:].argmax(-1)], -1)
    return input_ids


SAME_TOKENS = {
    "prompt lookup": {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2},
    "beams with sampling": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "beams that stop early": {
        "num_beams": 4,
        "early_stopping": True,
        "length_penalty": 0.5,
        "eos_token_id": 11,
    },
    "several samples": {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5},
    "a batch, padded on the left": {
        "inputs": PADDED,
        "attention_mask": (PADDED > 0).long(),
        "pad_token_id": 0,
    },
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [6, 7]]},
    "other samplers": {
        "do_sample": True,
        "min_p": 0.05,
        "typical_p": 0.9,
        "top_k": 0,
        "epsilon_cutoff": 3e-4,
    },
    "suppressed and forced": {"suppress_tokens": [3, 4], "forced_eos_token_id": 11, "min_new_tokens": 4},
    "a length in all": {"max_new_tokens": None, "max_length": 13},
    "guidance": {"guidance_scale": 1.5},
    "a negative prompt": {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[3, 4]])},
    "a watermark": {"watermarking_config": WatermarkingConfig(bias=2.5)},
    "a processor": {"logits_processor": LogitsProcessorList([lower_the_last])},
    "allowed tokens": {"prefix_allowed_tokens_fn": lambda batch, ids: [5, 6, 7, 8, 20 + len(ids)]},
    "no cache": {"use_cache": False},
    "a dynamic cache": {"cache_implementation": "dynamic"},
    "a static cache": {"cache_implementation": "static"},
    "a static cache with beams": {"cache_implementation": "static", "num_beams": 2},
    "a prompt in chunks": {"prefill_chunk_size": 3},
    "somebody else's loop": {"custom_generate": own_loop},
}


@pytest.mark.parametrize("name", SAME_TOKENS)
@pytest.mark.filterwarnings("ignore")
def test_an_option_gives_the_plain_models_tokens(pair, name):
    answers = []
    for model in pair:
        torch.manual_seed(3)
        options = {"inputs": PROMPT, **GREEDY, **SAME_TOKENS[name]}
        answers.append(model.generate(**options))
    assert torch.equal(*answers)


def test_scores_logits_and_hidden_states_are_those_of_the_plain_model(pair):
    wanted = ("scores", "logits", "hidden_states", "attentions")
    expected, actual = (
        model.generate(
            PROMPT, return_dict_in_generate=True, **{f"output_{name}": True for name in wanted}, **GREEDY
        )
        for model in pair
    )
    assert torch.equal(actual.sequences, expected.sequences)
    for name in wanted:
        assert len(actual[name]) == len(expected[name]) == GREEDY["max_new_tokens"]
        for ours, plain in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


def test_beam_scores_are_those_of_the_plain_model(pair):
    expected, actual = (
        model.generate(PROMPT, num_beams=3, output_scores=True, return_dict_in_generate=True, **GREEDY)
        for model in pair
    )
    assert torch.equal(actual.beam_indices, expected.beam_indices)
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)


def test_embeddings_as_prompt_give_the_plain_models_tokens(pair):
    expected, actual = (
        model.generate(inputs_embeds=model.get_input_embeddings()(PROMPT).detach(), **GREEDY)
        for model in pair
    )
    assert torch.equal(actual, expected)


BEYOND = {"cache_implementation": "static", "max_new_tokens": 600}
REFUSED = {
    "more beams than the context holds": ({"num_beams": 40}, BudgetError, "context="),
    "a static cache beyond the context": (BEYOND, BudgetError, "context="),
    "a cache that is moved to a card": ({"cache_implementation": "offloaded"}, ConfigError, "no card"),
    "a hybrid one": ({"cache_implementation": "offloaded_hybrid"}, ConfigError, "no card"),
    "a static one": ({"cache_implementation": "offloaded_static"}, ConfigError, "no card"),
    "a quantized cache": ({"cache_implementation": "quantized"}, ConfigError, 'kv="q8_0"'),
    "groups of beams": ({"num_beams": 4, "num_beam_groups": 2}, ValueError, "trust_remote_code"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, ValueError, "trust_remote_code"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(pair, name):
    options, error, reason = REFUSED[name]
    steps = pair[1].offload.stats().decode_steps
    with pytest.raises(error, match=reason):
        pair[1].generate(PROMPT, **{**GREEDY, **options})
    assert pair[1].offload.stats().decode_steps == steps, "refused before it runs"
