"""Thinking, commentary and answer are told apart, however the tokens cut them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_offload import ConfigError
from moe_offload.runtime.answer_parts import ANSWER, COMMENTARY, THINKING, Part, splitter_of
from moe_offload.runtime.prompts import encode_chat, encode_prompt
from moe_offload.runtime.text_stream import TextStream

HARMONY = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"]
THINK = ["<think>", "</think>"]
GEMMA = ["<|channel>", "<channel|>", "<|turn>", "<turn|>"]


def tokenizer_of(special: Sequence[str] = (), plain: Sequence[str] = (), template: str | None = None) -> Any:
    """A token for every byte, and the given ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in plain])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


def parts_of(tokenizer: Any, text: str, prompt: str = "hi") -> list[Part]:
    """The answer ``text`` (with its markup) as a stream of tokens, neighbours of a kind joined."""
    prompt_ids = tokenizer.encode(prompt)
    stream = TextStream(tokenizer, (), prompt_ids[-4:], splitter_of(tokenizer, prompt_ids))
    parts = [part for token_id in tokenizer.encode(text) for part in stream.push(token_id)]
    return joined([*parts, *stream.finish()])


def joined(parts: Sequence[Part]) -> list[Part]:
    merged: list[Part] = []
    for part in parts:
        if merged and merged[-1].kind == part.kind:
            merged[-1] = Part(part.kind, merged[-1].text + part.text)
        else:
            merged.append(part)
    return merged


TAGGED = {
    "special tokens": tokenizer_of(special=THINK),
    "plain tokens": tokenizer_of(plain=THINK),
    "letters": tokenizer_of(template="{{ '<think>' }}"),
}


@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize(
    ("prompt", "text", "wanted"),
    [
        ("hi", "<think>\nfirst\n</think>\n\nAnswer ä.", [(THINKING, "first\n"), (ANSWER, "Answer ä.")]),
        ("hi", "\n<think>x</think>y", [(THINKING, "x"), (ANSWER, "y")]),
        ("hi", "No thought.", [(ANSWER, "No thought.")]),
        ("hi", "<thin air>", [(ANSWER, "<thin air>")]),
        ("hi<think>\n", "so\n</think>\n\nyes", [(THINKING, "so\n"), (ANSWER, "yes")]),
        ("hi<think>\n\n</think>\n\n", "yes", [(ANSWER, "yes")]),
        ("hi<think>\n", "never closed </thin", [(THINKING, "never closed </thin")]),
        ("hi", "<think>a</think>b <b>c</b>", [(THINKING, "a"), (ANSWER, "b <b>c</b>")]),
    ],
)
def test_think_tags_are_told_apart(name: str, prompt: str, text: str, wanted: list[Any]) -> None:
    assert parts_of(TAGGED[name], text, prompt) == [Part(*part) for part in wanted]


@pytest.mark.parametrize("name", ["plain tokens", "letters"])
def test_an_answer_may_speak_of_the_tags(name: str) -> None:
    text = "Use <think> and </think> as tags."
    assert parts_of(TAGGED[name], text) == [Part(ANSWER, text)]


@pytest.mark.parametrize(
    ("prompt", "text", "wanted"),
    [
        (
            "<|start|>assistant",
            "<|channel|>analysis<|message|>Let me see.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>42 €<|return|>",
            [(THINKING, "Let me see."), (ANSWER, "42 €")],
        ),
        (
            "<|start|>assistant",
            "<|channel|>commentary to=functions.f <|message|>I will look.<|call|>",
            [(COMMENTARY, "I will look.")],
        ),
        ("<|start|>assistant<|channel|>final<|message|>", "At once.", [(ANSWER, "At once.")]),
        ("<|start|>assistant<|channel|>analysis<|message|>", "Hm", [(THINKING, "Hm")]),
        ("<|start|>assistant<|message|>", "Plain.", [(ANSWER, "Plain.")]),
    ],
)  # fmt: skip
def test_channels_of_gpt_oss_are_told_apart(prompt: str, text: str, wanted: list[Any]) -> None:
    assert parts_of(tokenizer_of(special=HARMONY), text, prompt) == [Part(*part) for part in wanted]


@pytest.mark.parametrize("special", [True, False])
def test_the_thought_channel_of_gemma_4_is_told_apart(special: bool) -> None:
    tokenizer = tokenizer_of(special=GEMMA) if special else tokenizer_of(plain=GEMMA)
    text = "<|channel>thought\nHm.<channel|>Yes."
    assert parts_of(tokenizer, text) == [Part(THINKING, "Hm."), Part(ANSWER, "Yes.")]
    assert parts_of(tokenizer, "Yes.") == [Part(ANSWER, "Yes.")]


def test_without_markup_everything_is_answer() -> None:
    assert parts_of(tokenizer_of(), "<think>a</think>b") == [Part(ANSWER, "<think>a</think>b")]


@given(st.text("ab\n<>/", max_size=12), st.text("ab \n<", max_size=12))
def test_nothing_is_lost_between_the_tags(thought: str, answer: str) -> None:
    parts = parts_of(TAGGED["plain tokens"], f"<think>{thought}</think>{answer}")
    by_kind = {kind: "".join(p.text for p in parts if p.kind == kind) for kind in (THINKING, ANSWER)}
    assert by_kind == {THINKING: thought.lstrip("\n"), ANSWER: answer.lstrip("\n")}


def test_a_stop_string_ends_the_answer_and_not_the_thinking() -> None:
    tokenizer = TAGGED["special tokens"]
    stream = TextStream(tokenizer, ["END"], (), splitter_of(tokenizer))
    parts = [p for i in tokenizer.encode("<think>the END?</think>ok END no") for p in stream.push(i)]
    assert joined([*parts, *stream.finish()]) == [Part(THINKING, "the END?"), Part(ANSWER, "ok ")]
    assert stream.stopped


SWITCHED = (
    "{{ messages[0].content }}{% if enable_thinking is defined and enable_thinking is false %}"
    "<think></think>{% endif %}"
)


def test_the_switch_of_a_template_is_found_and_turned() -> None:
    tokenizer = tokenizer_of(plain=THINK, template=SWITCHED)
    plain = encode_prompt(tokenizer, "hi")
    assert encode_prompt(tokenizer, "hi", thinking=True) == plain
    assert tokenizer.decode(encode_prompt(tokenizer, "hi", thinking=False)) == "hi<think></think>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}", "no switch for thinking .*as it was trained"),
        ("{{ messages[0].content }}{{ reasoning_effort }}", "always thinks.*reasoning_effort"),
        ("{% set thinking = 1 %}{{ messages[0].content }}", "no switch for thinking"),
    ],
)
def test_a_template_without_the_switch_says_so(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encode_chat(tokenizer_of(template=template), [{"role": "user", "content": "hi"}], thinking=False)


def test_a_choice_about_thinking_needs_a_template() -> None:
    with pytest.raises(ConfigError, match="thinking goes into the chat template, but raw was asked for"):
        encode_prompt(tokenizer_of(template=SWITCHED), "hi", raw=True, thinking=False)


class Scripted:
    """A model that answers with given tokens, through transformers' stopping criteria."""

    def __init__(self, answer_ids: Sequence[int], eos_token_id: int | None) -> None:
        from types import SimpleNamespace

        from transformers import GenerationConfig

        self.generation_config = GenerationConfig(eos_token_id=eos_token_id)
        self.answer_ids = answer_ids
        spec = SimpleNamespace(max_position_embeddings=4096)
        stats = SimpleNamespace(as_dict=dict)
        self.offload = SimpleNamespace(context_tokens=4096, spec=spec, stats=lambda: stats)

    def generate(self, prompt: Any, *, generation_config: Any, stopping_criteria: Any, **others: Any) -> None:
        import torch

        ids, ends = prompt, generation_config.eos_token_id
        for token_id in self.answer_ids:
            ids = torch.cat([ids, torch.tensor([[token_id]])], dim=1)
            if stopping_criteria(ids, None).any() or token_id in (ends if isinstance(ends, list) else [ends]):
                return


def test_a_run_hands_thinking_and_answer_to_different_takers() -> None:
    from moe_offload.runtime.generate import Sampling, run

    tokenizer = tokenizer_of(special=HARMONY)
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes<|return|>no"
    )
    model = Scripted(tokenizer.encode(text), tokenizer.convert_tokens_to_ids("<|return|>"))
    answer: list[str] = []
    thought: list[str] = []
    prompt = tokenizer.encode("<|start|>assistant")
    result = run(model, tokenizer, prompt, Sampling(temperature=0), answer.append, on_thinking=thought.append)
    assert (result.text, result.thinking, result.finish_reason) == ("Yes", "Hm.", "stop")
    assert ("".join(answer), "".join(thought)) == ("Yes", "Hm.")
    whole = run(model, tokenizer, prompt, Sampling(temperature=0), answer.append, split=False)
    assert whole.thinking == "" and whole.text == "analysisHm.assistantfinalYes"


def test_the_tokenizers_own_end_of_turn_ends_an_answer() -> None:
    """Tunes often keep their base model's end in generation_config, and name the turn's in the tokenizer."""
    from moe_offload.runtime.generate import Sampling, run

    tokenizer = tokenizer_of(special=["<|im_end|>", "<|endoftext|>"])
    tokenizer.eos_token = "<|im_end|>"
    model = Scripted(tokenizer.encode("Hi<|im_end|>user"), tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    result = run(model, tokenizer, tokenizer.encode("x"), Sampling(temperature=0), lambda piece: None)
    assert (result.text, result.finish_reason) == ("Hi", "stop")


def test_the_command_line_says_when_a_template_has_no_switch(tiny_moe: Any, capsys: Any) -> None:
    from moe_offload.cli import main

    for command in (["generate", "--prompt", "hi"], ["chat"]):
        assert main([*command, "--model", str(tiny_moe), "--no-think"]) == 2
        assert "no switch for thinking (enable_thinking or thinking)" in capsys.readouterr().err
