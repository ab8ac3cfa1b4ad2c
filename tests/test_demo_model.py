"""The bundled model: small, complete, and the same tokens here, in llama.cpp and in float64."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "moe_offload" / "demo" / "tiny-moe.gguf"
sys.path.insert(0, str(ROOT / "bench"))

import against_llama_cpp as bench  # noqa: E402
from demo_model.dequantize_gguf import dequantize_gguf  # noqa: E402
from greedy_programs import Program, open_llama, open_ours, open_reference  # noqa: E402

PROMPTS = bench.read_prompts(bench.BENCH / "data" / "greedy_prompts.txt")

MULTILINGUAL = (
    "It's 3,141 o'clock; we'll see.\n\n  def f(x):\n\treturn x**2  # naïve\r\nDas Gesetz über Öl "
    "— «voilà» ¿qué? 白日依山盡 🎈 \u00a0 x² ≤ ½"
)
PROSE = (
    "When the train came into the station the old man was already waiting on the platform with his hat in "
    "his hand. He did not see us at first, and my brother called out to him twice before he turned his head. "
    "The rain had stopped, but the roofs of the houses were still wet, and there was nobody in the street. "
    "We walked to the inn without a word, and it was only after supper that he began to tell us what had "
    "happened to the farm during the winter.\n"
)


def test_the_file_fits_into_32_mib_and_has_no_chat_template():
    import gguf

    assert DEMO.stat().st_size <= 32 * 2**20
    reader = gguf.GGUFReader(DEMO)
    assert "tokenizer.chat_template" not in reader.fields
    assert reader.fields["general.architecture"].contents() == "qwen3moe"
    assert reader.fields["qwen3moe.expert_count"].contents() == 32


def test_it_has_learned_english():
    """Guessing evenly gives 8192."""
    import torch

    import moe_offload

    model = moe_offload.from_pretrained(str(DEMO), experts="25%")
    token_ids = torch.tensor([moe_offload.load_tokenizer(str(DEMO))(PROSE)["input_ids"]])
    with torch.no_grad():
        loss = model(input_ids=token_ids, labels=token_ids).loss
    assert float(loss.exp()) < 150


# Against llama.cpp


def open_programs(path):
    """(ours with half of the experts, llama.cpp, float64 logits)"""
    args = argparse.Namespace(model=path, ram="auto", experts="50%")
    return open_ours(args), open_llama(path, 512), open_reference(path)


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="the reference is llama-cpp-python (the llama extra)")


@pytest.fixture(scope="module")
def tokenizer():
    import moe_offload

    return moe_offload.load_tokenizer(str(DEMO))


@pytest.fixture(scope="module")
def as_shipped(llama_cpp):
    return open_programs(DEMO)


@pytest.fixture(scope="module")
def as_float32(llama_cpp, tmp_path_factory):
    """The shipped weights, dequantized: no program rounds activations to 8 bits on these."""
    return open_programs(dequantize_gguf(DEMO, tmp_path_factory.mktemp("demo") / "f32.gguf"))


def compare_greedy(programs, tokenizer, prompts, num_tokens):
    return bench.compare_greedy(*programs, bench.encode_prompts(tokenizer, prompts), num_tokens)


def code_windows(tokenizer):
    """2,048 tokens of program text, in 8 windows."""
    args = argparse.Namespace(text=ROOT / "bench" / "against_llama_cpp.py", positions=2048, window=256)
    return bench.text_windows(tokenizer, args)


def test_both_cut_multilingual_text_into_the_same_tokens(llama_cpp, tokenizer):
    vocabulary = llama_cpp.Llama(str(DEMO), vocab_only=True, verbose=False)
    theirs = vocabulary.tokenize(MULTILINGUAL.encode(), add_bos=False)
    assert tokenizer(MULTILINGUAL)["input_ids"] == theirs
    assert tokenizer.decode(theirs) == MULTILINGUAL


def test_greedy_tokens_equal_llama_cpps_on_float32_weights(as_float32, tokenizer):
    assert compare_greedy(as_float32, tokenizer, PROMPTS[::12], 12).partings == []


@pytest.mark.slow
def test_greedy_tokens_equal_llama_cpps_on_float32_weights_for_every_prompt(as_float32, tokenizer):
    assert compare_greedy(as_float32, tokenizer, PROMPTS, 64).partings == []


@pytest.mark.slow
def test_the_best_token_equals_llama_cpps_at_2048_positions_on_float32_weights(as_float32, tokenizer):
    ours, llama, reference = as_float32
    forced = bench.compare_forced(ours.logits, llama.logits, reference, code_windows(tokenizer))
    assert (forced["positions"], forced["ours_top1"], forced["llama_top1"]) == (2048, 1.0, 1.0)
    assert forced["passed"], forced


def test_greedy_tokens_equal_llama_cpps_but_for_near_ties(as_shipped, tokenizer):
    greedy = compare_greedy(as_shipped, tokenizer, PROMPTS[::12], 12)
    assert greedy.passed, greedy


@pytest.mark.slow
def test_greedy_tokens_equal_llama_cpps_but_for_near_ties_for_every_prompt(as_shipped, tokenizer):
    greedy = compare_greedy(as_shipped, tokenizer, PROMPTS, 64)
    assert greedy.passed, greedy


def test_logits_are_as_close_to_float64_as_llama_cpps(as_shipped, tokenizer):
    ours, llama, reference = as_shipped
    forced = bench.compare_forced(ours.logits, llama.logits, reference, [tokenizer(PROSE)["input_ids"]])
    assert forced["passed"], forced


@pytest.mark.slow
def test_logits_are_as_close_to_float64_as_llama_cpps_at_2048_positions(as_shipped, tokenizer):
    ours, llama, reference = as_shipped
    forced = bench.compare_forced(ours.logits, llama.logits, reference, code_windows(tokenizer))
    assert forced["positions"] == 2048
    assert forced["passed"], forced


# The judge itself


EXACT = np.array([3.0, 2.9, 0.0])


def constant_logits(logits):
    return lambda token_ids: np.tile(logits, (len(token_ids), 1))


def fixed_program(logits, continuation):
    """A program that chose ``continuation`` from the same ``logits`` at every step."""
    chosen_from = np.tile(logits, (len(continuation), 1))
    return Program(constant_logits(logits), lambda token_ids, num_tokens: (continuation, chosen_from))


def judge(ours, llama):
    return bench.compare_greedy(ours, llama, constant_logits(EXACT), {"a prompt": [7]}, 3)


def test_parting_at_a_near_tie_is_allowed():
    above, below = EXACT + np.array([0.0, 0.2, 0.0]), EXACT - np.array([0.0, 0.2, 0.0])
    greedy = judge(fixed_program(below, [0, 0, 1]), fixed_program(above, [0, 1, 1]))
    (parting,) = greedy.partings
    assert parting.position == 1
    assert parting.margin == pytest.approx(0.1)
    assert (parting.allowed, greedy.passed, greedy.num_tokens) == (True, True, 2)


def test_a_token_that_its_own_logits_do_not_support_is_not_allowed():
    greedy = judge(fixed_program(EXACT + 0.01, [2]), fixed_program(EXACT, [0]))
    assert not greedy.partings[0].allowed
    assert not greedy.passed


def test_decoding_that_is_less_accurate_than_llama_cpps_does_not_pass_though_its_tokens_are_equal():
    close, far = EXACT + np.array([0.0, 0.0, 0.01]), EXACT + np.array([0.0, 0.0, 0.03])
    greedy = judge(fixed_program(far, [0, 0]), fixed_program(close, [0, 0]))
    assert greedy.partings == []
    assert not greedy.passed


def test_an_end_of_text_in_one_program_only_is_a_parting():
    greedy = judge(fixed_program(EXACT, [0]), fixed_program(EXACT, [0, 1]))
    assert [(parting.position, parting.allowed) for parting in greedy.partings] == [(1, False)]


def test_logits_much_less_accurate_than_llama_cpps_do_not_pass():
    close, far = (constant_logits(EXACT + np.array([0.0, 0.0, error])) for error in (0.01, 0.03))
    assert bench.compare_forced(close, close, constant_logits(EXACT), [[1, 2, 3]])["passed"]
    figures = bench.compare_forced(far, close, constant_logits(EXACT), [[1, 2, 3]])
    assert (figures["broken"], figures["passed"]) == (0, False)


def test_prompts_are_many_and_varied():
    assert len(PROMPTS) == len(set(PROMPTS)) >= 24
    assert any("\n" in prompt for prompt in PROMPTS)
    assert any(not prompt.isascii() for prompt in PROMPTS)
