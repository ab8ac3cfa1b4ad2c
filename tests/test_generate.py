"""generate(): one call from a path and a prompt to an answer."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_offload
from moe_offload import BudgetError, ConfigError
from moe_offload.config import gib
from moe_offload.runtime.generate import Sampling, encode_prompt, run
from moe_offload.storage.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def loaded(tiny_moe):
    """A loaded model and its tokenizer."""
    model = moe_offload.from_pretrained(tiny_moe, ram="2GiB")
    yield model, moe_offload.load_tokenizer(tiny_moe)
    model.offload.close()


def ignore(piece: str) -> None:
    """Take text that the test does not look at."""


def test_one_call_prints_what_transformers_would_generate(tiny_moe, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_moe, dtype=torch.float32, experts_implementation="eager"
    )
    inputs = tokenizer("<|user|>hello<|end|><|assistant|>", return_tensors="pt", add_special_tokens=False)
    wanted = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    result = moe_offload.generate(tiny_moe, "hello", ram="2GiB", max_new_tokens=12, temperature=0)
    assert result.token_ids == wanted.tolist()
    assert str(result) == result.text == capsys.readouterr().out.removesuffix("\n")
    assert result.stats["ram_bytes"] == 2 << 30


def test_a_loaded_model_is_taken_as_it_is(loaded):
    model, tokenizer = loaded
    pieces = []
    result = moe_offload.generate(
        model, "hello", tokenizer=tokenizer, max_new_tokens=9, temperature=0, stream=pieces.append
    )
    assert "".join(pieces) == result.text
    with pytest.raises(ConfigError, match="pass tokenizer="):
        moe_offload.generate(model, "hello")
    with pytest.raises(ConfigError, match=r"ram: for loading, but the model is loaded already"):
        moe_offload.generate(model, "hello", tokenizer=tokenizer, ram="1GiB")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([{"role": "user", "content": "hi"}], {}, r"one text, got list; .*apply_chat_template"),
        ("ab", {"max_new_tokens": 2.5}, "max_new_tokens must be at least 1, got 2.5"),
        ("ab", {"max_new_tokens": "5"}, "max_new_tokens must be at least 1, got '5'"),
        ("ab", {"top_k": 1.5}, "top_k must be a whole number, got 1.5"),
        ("ab", {"seed": "x"}, "seed must be a whole number, got 'x'"),
        ("ab", {"temperature": "hot"}, "temperature must be a number, got 'hot'"),
    ],
)
def test_arguments_of_another_type_are_named(loaded, prompt, options, message):
    model, tokenizer = loaded
    with pytest.raises(ConfigError, match=message):
        moe_offload.generate(model, prompt, tokenizer=tokenizer, stream=False, **options)


def test_no_stop_strings_may_be_none(loaded):
    model, tokenizer = loaded
    asked = {"tokenizer": tokenizer, "stream": False, "max_new_tokens": 2}
    expected = moe_offload.generate(model, "ab", **asked)
    assert moe_offload.generate(model, "ab", stop=None, **asked).token_ids == expected.token_ids


def test_ctrl_c_is_passed_on_to_the_caller(loaded):
    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    model, tokenizer = loaded
    with pytest.raises(KeyboardInterrupt):
        moe_offload.generate(model, "hello", tokenizer=tokenizer, max_new_tokens=50, stream=interrupt)


def test_the_answer_ends_where_the_model_says(loaded):
    """Whatever token comes third greedily is declared the end; it is counted, but not printed."""
    model, tokenizer = loaded
    input_ids = encode_prompt(tokenizer, "hello", raw=True)
    free = run(model, tokenizer, input_ids, Sampling(temperature=0), ignore, max_new_tokens=10)
    assert free.finish_reason == "length"
    end = next(i for i in range(1, 10) if free.token_ids[i] not in free.token_ids[:i])
    old = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [old, free.token_ids[end]]
        ended = run(model, tokenizer, input_ids, Sampling(temperature=0), ignore, max_new_tokens=10)
    finally:
        model.generation_config.eos_token_id = old
    assert ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[: end + 1]
    assert free.text.startswith(ended.text) and len(ended.text) < len(free.text)


def test_sampling_follows_the_checkpoint_unless_told_otherwise(loaded):
    config = loaded[0].generation_config.__class__(do_sample=True, temperature=0.7, top_k=20)
    Sampling().apply(config)
    assert (config.do_sample, config.temperature, config.top_k) == (True, 0.7, 20)
    Sampling(temperature=1.1).apply(config)
    assert (config.do_sample, config.temperature, config.top_k) == (True, 1.1, 20)
    Sampling(temperature=0, top_k=5).apply(config)
    assert (config.do_sample, config.temperature, config.top_k) == (False, None, None)
    greedy = loaded[0].generation_config.__class__(do_sample=False)
    Sampling(top_p=0.9).apply(greedy)
    assert (greedy.do_sample, greedy.top_p) == (True, 0.9)


def test_a_seed_leaves_the_callers_random_numbers_alone(loaded):
    model, tokenizer = loaded
    input_ids = encode_prompt(tokenizer, "hello")
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    run(model, tokenizer, input_ids, Sampling(temperature=1.0, seed=11), ignore, max_new_tokens=4)
    assert torch.equal(torch.rand(4), wanted)
    torch.manual_seed(5)
    first = run(model, tokenizer, input_ids, Sampling(temperature=1.5), ignore, max_new_tokens=8)
    torch.manual_seed(5)
    again = run(model, tokenizer, input_ids, Sampling(temperature=1.5), ignore, max_new_tokens=8)
    assert first.token_ids == again.token_ids and first.seed == again.seed


def test_more_than_the_context_is_refused_with_the_numbers(loaded):
    model, tokenizer = loaded
    ids = encode_prompt(tokenizer, "x" * 2040, raw=True)
    with pytest.raises(
        BudgetError, match=r"2040 tokens of prompt and max_new_tokens=9 .* 2048; ask for at most 8"
    ):
        run(model, tokenizer, ids, Sampling(), ignore, max_new_tokens=9)
    with pytest.raises(BudgetError, match=r"the prompt has 2048 tokens and leaves no room"):
        run(model, tokenizer, [5] * 2048, Sampling(), ignore)
    result = run(model, tokenizer, ids, Sampling(temperature=0), ignore)  # what there is room for
    assert result.new_tokens == 8 and result.finish_reason == "length"


def test_the_prompt_progress_counts_up_to_all_tokens(loaded):
    model, tokenizer = loaded
    seen = []
    model.offload.on_prefill = lambda done, total: seen.append((done, total))
    try:
        run(model, tokenizer, [5] * 1200, Sampling(temperature=0), ignore, max_new_tokens=1)
    finally:
        model.offload.on_prefill = None
    assert seen[-1] == (1200, 1200)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    layers = model.config.num_hidden_layers
    assert len(seen) >= layers > 1, "layer by layer, also where the prompt is one chunk"


def test_a_prompt_beyond_the_model_is_not_sent_to_a_larger_context(tiny_moe):
    positions = open_checkpoint(tiny_moe).spec.max_position_embeddings
    text = "a" * (positions + 5)
    with pytest.raises(BudgetError, match=rf"shorten it \(the model was made for {positions} positions\)"):
        moe_offload.generate(tiny_moe, text, raw=True, ram="8GiB", context=positions, stream=False)
    with pytest.raises(BudgetError, match=rf"shorten it, or ask for context={positions}$"):
        moe_offload.generate(tiny_moe, text, raw=True, ram="8GiB", context=64, stream=False)


def test_ram_auto_says_what_it_took(tiny_moe, capfd):
    model = moe_offload.from_pretrained(tiny_moe)
    plan = model.offload.plan
    model.offload.close()
    said = capfd.readouterr().err
    assert said.startswith(f"ram auto: {gib(plan.ram_bytes)} at most; planned {gib(plan.total_bytes)}")
    moe_offload.from_pretrained(tiny_moe, ram="8GiB").offload.close()
    assert "ram auto" not in capfd.readouterr().err
