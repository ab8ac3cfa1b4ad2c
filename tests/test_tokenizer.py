"""Tokenizers built from GGUF metadata give llama.cpp's ids, rule by rule and byte by byte."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import write_vocabulary

from moe_offload import CheckpointError
from moe_offload.storage.gguf_config import gguf_generation_config
from moe_offload.storage.gguf_parts import read_gguf
from moe_offload.storage.split_rules import SPLIT_RULES
from moe_offload.storage.tokenizer import load_tokenizer

TEXTS = [
    "The quick brown fox jumps over 13 lazy dogs, doesn't it? I'LL say: it's 1234567 and 3.14159!",
    "  two spaces\tand a tab\n\nnew   paragraph \n  indented\r\nwindows\n\n\n",
    "def f(x):\n    return x**2 + y[0] == 'a' if x != 10 else {\"k\": -1}  # comment\n\n\tpass",
    "Größe, façade, naïve, cœur, Ærøskøbing, İstanbul, ΑΒΓ αβγ, Привет мир! Ёлка 2024 года.",
    "你好,世界!今天是2024年5月17日。中文English混排。「引用」、これは日本語のテキストです。カタカナ",
    "안녕하세요 세계 123. مرحبا بالعالم ١٢٣ שלום עולם हिन्दी में १२३ ภาษาไทย",
    "emoji 😀👩‍👩‍👧 🇩🇪 ½ ² ₃ Ⅳ ① € $5.00 £ ¥ ^caret| `tick` ~tilde <tag> a+b=c",
    "CamelCaseWORDSandmore HTTPServer v2beta x86_64 a_b-c/d\\e user@example.com https://x.org/?q=1&r=2",
    " leading", "trail ", "   ", "\n", "a", "", "1", " 1 2  3   4", "'s 'S 're 'RE ''ll", "e\u0301 z\u030c",
    "/path//to///file /\n/ ...!!!??? --- ", "\u00a0nbsp\u2003em\u3000ideographic", "x\u200by ﬁ ǅ ʰ ᴬ ª",
]  # fmt: skip


@pytest.fixture(scope="session")
def boundless_bpe() -> tuple[list[str], list[str]]:
    """(tokens, merges) of a BPE trained without a split rule: its tokens span words, digits and marks.

    With such merges each boundary that a split rule draws, or does not, shows in the ids.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [text[i : i + 12] for text in TEXTS for i in range(0, len(text), 3)]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(pieces, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(merge) for merge in model["merges"]]


def llama_ids(path: Path, texts: list[str], **options: Any) -> list[list[int]]:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        return [model.tokenize(text.encode(), special=True, **options) for text in texts]
    finally:
        model.close()


# llama.cpp only approximates some rules; there the model's own regular expression is followed.
WITH_MARKS = frozenset(text for text in TEXTS if any(unicodedata.category(char)[0] == "M" for char in text))
WITH_WIDE_SPACES = frozenset(text for text in TEXTS if "\u3000ideographic" in text)
APPROXIMATED_BY_LLAMA_CPP = {
    # It leaves \\p{M} out.
    **dict.fromkeys(("gpt-4o", "llama4", "tekken", "kanana2", "minimax-m2"), WITH_MARKS),
    **dict.fromkeys(("deepseek-llm", "deepseek-coder"), WITH_WIDE_SPACES),  # it sees every space as ASCII
}


@pytest.mark.parametrize("pre", sorted(SPLIT_RULES))
def test_a_split_rule_gives_the_ids_of_llama_cpp(pre: str, tmp_path: Path, boundless_bpe: Any) -> None:
    tokens, merges = boundless_bpe
    path = write_vocabulary(tmp_path / "vocab.gguf", tokens, pre=pre, merges=merges)
    tokenizer = load_tokenizer(path)
    ours = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    theirs = llama_ids(path, TEXTS, add_bos=False)
    different = {text for text, mine, other in zip(TEXTS, ours, theirs, strict=True) if mine != other}
    assert different <= APPROXIMATED_BY_LLAMA_CPP.get(pre, frozenset())
    assert [tokenizer.decode(ids) for ids in ours] == TEXTS


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-4o", "llama4", "dbrx", "megrez"])
def test_a_split_rule_gives_the_ids_of_transformers(pre: str, tmp_path: Path, boundless_bpe: Any) -> None:
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokens, merges = boundless_bpe
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "vocab.gguf", tokens, pre=pre, merges=merges))
    ours = [tokenizer.encode(text) for text in TEXTS]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert ours == [tokenizer.encode(text) for text in TEXTS]


def test_the_rules_are_really_different(tmp_path: Path, boundless_bpe: Any) -> None:
    """Otherwise the vocabulary above could not tell a wrong rule from a right one."""
    tokens, merges = boundless_bpe
    names = (
        "default falcon gpt-2 smollm llama-bpe qwen2 gpt-4o tekken deepseek-llm deepseek-coder deepseek-v3"
    )
    seen = {}
    for pre in names.split():
        tokenizer = load_tokenizer(write_vocabulary(tmp_path / "vocab.gguf", tokens, pre=pre, merges=merges))
        seen[pre] = str([tokenizer.encode(text, add_special_tokens=False) for text in TEXTS])
    assert len(set(seen.values())) == len(seen)


def test_without_a_named_rule_the_default_is_used_as_in_llama_cpp(tmp_path: Path, boundless_bpe: Any) -> None:
    path = write_vocabulary(tmp_path / "vocab.gguf", boundless_bpe[0], merges=boundless_bpe[1])
    tokenizer = load_tokenizer(path)
    assert [tokenizer.encode(text) for text in TEXTS] == llama_ids(path, TEXTS, add_bos=False)


def test_an_unknown_split_rule_is_refused_by_name(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "vocab.gguf", ["a", "b"], pre="of-tomorrow")
    with pytest.raises(
        CheckpointError, match=r"vocab.gguf: tokenizer.ggml.pre 'of-tomorrow' .*known are .*gpt-2"
    ):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}]
)
def test_control_tokens_stay_whole_and_texts_begin_as_the_file_says(
    flags: dict[str, bool], tmp_path: Path, boundless_bpe: Any
) -> None:
    specials = ["<s:0>", "<｜end▁of▁sentence｜>", "<|im_end|>", "<think>", "  \n"]
    tokens = [*boundless_bpe[0], *specials]
    first = len(boundless_bpe[0])
    path = write_vocabulary(
        tmp_path / "vocab.gguf",
        tokens,
        pre="qwen2",
        merges=boundless_bpe[1],
        token_types=[1] * first + [3, 3, 3, 4, 4],
        special={"bos": first, "eos": first + 1},
        flags=flags,
    )
    tokenizer = load_tokenizer(path)
    texts = ["hi<|im_end|>there <think> x", "<｜end▁of▁sentence｜>a", "plain", "a  \nb<s:0>"]
    ids = [tokenizer.encode(text) for text in texts]
    assert ids == llama_ids(path, texts, add_bos=bool(flags))
    assert tokenizer.bos_token == "<s:0>" and tokenizer.eos_token_id == first + 1
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "hithere <think> x"


def spm_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """(tokens, scores, types) of a sentencepiece BPE: unk, BOS, EOS, 256 bytes, characters, pieces."""
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    pieces = [("▁" + text.replace(" ", "▁"))[i : i + 9] for text in TEXTS for i in range(0, len(text), 4)]
    tokenizer.train_from_iterator(
        pieces, trainers.BpeTrainer(vocab_size=900, min_frequency=2, limit_alphabet=150, show_progress=False)
    )
    learned = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(learned))]
    return tokens, scores, [2, 3, 3, *[6] * 256, *[1] * len(learned)]


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_a_sentencepiece_vocabulary_gives_the_ids_of_llama_cpp(
    add_space_prefix: bool, tmp_path: Path
) -> None:
    tokens, scores, types = spm_vocabulary()
    path = write_vocabulary(
        tmp_path / "vocab.gguf", tokens, model="llama", scores=scores, token_types=types,
        special={"bos": 1, "eos": 2, "unknown": 0}, flags={"add_space_prefix": add_space_prefix},
    )  # fmt: skip
    tokenizer = load_tokenizer(path)
    texts = [*TEXTS, "turn</s>next <s> one", "</s> spaced"]
    assert [tokenizer.encode(text) for text in texts] == llama_ids(path, texts, add_bos=True)
    assert tokenizer.decode(tokenizer.encode(TEXTS[3]), skip_special_tokens=True) == TEXTS[3]


def test_gemma_4s_vocabulary_gives_the_ids_of_llama_cpp(tmp_path: Path) -> None:
    """Merges over raw characters with spaces as marks, bytes where a character is unknown."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    pieces = [text[i : i + 9] for text in TEXTS for i in range(0, len(text), 4)]
    learner.train_from_iterator(
        pieces, trainers.BpeTrainer(vocab_size=900, min_frequency=2, limit_alphabet=150, show_progress=False)
    )
    model = json.loads(learner.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].__getitem__)
    controls = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "\n", "\n\n"]
    tokens = [*controls, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    path = write_vocabulary(
        tmp_path / "vocab.gguf", tokens, model="gemma4", pre="gemma4",
        merges=["\n \n", *(" ".join(merge) for merge in model["merges"])],
        token_types=[3, 3, 3, 2, 3, 3, 1, 1, *[6] * 256, *[1] * len(learned)],
        special={"bos": 2, "eos": 1, "unknown": 3, "padding": 0},
    )  # fmt: skip
    tokenizer = load_tokenizer(path)
    texts = [*TEXTS, "turn<turn|>\n<|turn>model\n"]
    assert [tokenizer.encode(text) for text in texts] == llama_ids(path, texts, add_bos=True)
    assert [tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) for text in TEXTS] == TEXTS


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["a", "<|im_start|>", "<|im_end|>", "<|endoftext|>"], {"a", "<|im_end|>", "<|endoftext|>"}),
        (["a", "<|user|>", "<|assistant|>", "<|end|>"], {"a", "<|end|>"}),
        (["a", "<|user|>", "<|observation|>", "[gMASK]", "<sop>"], {"a", "<|user|>", "<|observation|>"}),
        (
            ["a", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"],
            {"a", "<|return|>", "<|call|>"},
        ),
        (["a", "<|turn>", "<turn|>"], {"a", "<turn|>"}),
    ],
)
def test_a_turn_ends_where_the_family_ends_it(tokens: list[str], ends: set[str], tmp_path: Path) -> None:
    """The file's own eos is "a". GLM's next speaker ends a turn; in gpt-oss a channel's end ends none."""
    header = read_gguf(write_vocabulary(tmp_path / "vocab.gguf", tokens, special={"eos": 0}))
    config = {"vocab_size": len(tokens), "bos_token_id": None, "pad_token_id": None}
    found = gguf_generation_config(header, config)["eos_token_id"]
    assert {tokens[token_id] for token_id in found} == ends


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "rwkv"}, r"tokenizer.ggml.model 'rwkv' is not supported"),
        ({"merges": ["ab"]}, r"two pieces are wanted, found 'ab'"),
        ({"merges": ["a zz"]}, r"'a zz' joins pieces that are not all in the vocabulary"),
        ({"token_types": [1]}, r"1 token types for 3 tokens"),
        ({"special": {"eos": 99}}, r"eos_token_id must be an id below 3, found 99"),
        ({"tokens": ["a", "b", "a"]}, r"token 'a' is in the vocabulary twice, as 0 and 2"),
        ({"tokens": []}, r"no vocabulary"),
        ({"model": "llama", "scores": [1.0]}, r"1 scores for 3 tokens"),
    ],
)
def test_a_bad_vocabulary_is_a_checkpoint_error(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arguments = {"tokens": ["a", "b", "ab"], "pre": "gpt-2", "merges": ["a b"]} | changes
    path = write_vocabulary(tmp_path / "vocab.gguf", **arguments)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(path)


def test_a_folder_without_tokenizer_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(CheckpointError, match=r"no tokenizer.json .*fetch the model's tokenizer files"):
        load_tokenizer(tmp_path)
