"""Tokenizers: a Hugging Face folder's own, or one built from a GGUF's metadata.

A GGUF names the rule that splits text before merging (``tokenizer.ggml.pre``) and trusts the reader
to know it. ``split_rules`` states each rule; tests hold their ids equal to llama.cpp's. An unknown
name is refused: a wrong rule gives almost right tokens, which nobody notices.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from moe_offload.config import DEMO_MODEL
from moe_offload.errors import CheckpointError
from moe_offload.storage.checkpoint import locate
from moe_offload.storage.gguf import GgufHeader
from moe_offload.storage.gguf_parts import read_gguf
from moe_offload.storage.header_reader import read_json_object
from moe_offload.storage.split_rules import SPLIT_RULES, WHOLE_PIECES_FIRST

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_SPACE_MARK = "▁"
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


_loaded_paths: set[Path] = set()


def load_tokenizer(path: str | Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint: a transformers tokenizer with its chat template.

    Args:
        path: folder or GGUF file; None is the bundled demo model.

    Raises:
        CheckpointError: there is none, it cannot be read, or its split rule is unknown.
    """
    source, path = locate(DEMO_MODEL if path is None else path)
    tokenizer = _from_gguf(read_gguf(path)) if source == "gguf" else _from_folder(path)
    _loaded_paths.add(path.resolve())
    return tokenizer


def tokenizer_was_loaded(path: Path) -> bool:
    """Whether this process holds, or held, the tokenizer of ``path``: then its memory is measured."""
    return path.resolve() in _loaded_paths


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    # transformers would make an empty tokenizer out of config.json alone.
    if not any((folder / name).exists() for name in _VOCABULARY_FILES):
        raise CheckpointError(
            f"{folder}: no tokenizer.json (nor {', '.join(_VOCABULARY_FILES[1:])}); "
            "fetch the model's tokenizer files"
        )
    if (config := folder / "config.json").exists():
        read_json_object(config)  # transformers reads it first and would say that the tokenizer is broken
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers raises on a bad or absent file
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be loaded ({error}); fetch tokenizer.json, "
            "tokenizer_config.json and config.json again"
        ) from error
    return tokenizer


def _from_gguf(header: GgufHeader) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    reader = _TokenizerReader(header)
    backend = reader.build()
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=reader.text("tokenizer.chat_template"),
        **{
            f"{name}_token": reader.token(key)
            for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        },
    )
    if len(tokenizer) != len(reader.tokens):
        reader.fail(f"the vocabulary has {len(reader.tokens)} tokens, but the tokenizer {len(tokenizer)}")
    return tokenizer


class _TokenizerReader:
    """Builds a tokenizer from ``tokenizer.ggml.*`` metadata."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.kind = self.text("tokenizer.ggml.model")
        self.pre = self.text("tokenizer.ggml.pre") or "default"  # absent in files before the key existed
        tokens = header.array("tokenizer.ggml.tokens", str)
        if not tokens:
            self.fail("no vocabulary (tokenizer.ggml.tokens); use a GGUF that has its tokenizer")
        self.tokens, self.vocab = tokens, dict[str, int]()
        for token_id, token in enumerate(tokens):
            if self.vocab.setdefault(token, token_id) != token_id:
                self.fail(
                    f"token {token!r} is in the vocabulary twice, as {self.vocab[token]} and {token_id}"
                )
        self.token_types = header.array("tokenizer.ggml.token_type", int) or [1] * len(tokens)
        if len(self.token_types) != len(tokens):
            self.fail(f"{len(self.token_types)} token types for {len(tokens)} tokens")

    def build(self) -> Tokenizer:
        builders = {"gpt2": self.byte_level, "llama": self.sentencepiece, "gemma4": self.merged_characters}
        if self.kind not in builders:
            self.fail(
                f"tokenizer.ggml.model {self.kind!r:.80} is not supported; gpt2 (BPE), llama (SPM) and "
                "gemma4 are"
            )
        try:
            backend = builders[self.kind]()
            self.add_special_tokens(backend)
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises bare Exception on vocabulary and merges that disagree
            self.fail(f"the vocabulary makes no tokenizer: {error}")
        return backend

    def byte_level(self) -> Tokenizer:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        rule = SPLIT_RULES.get(self.pre)
        if rule is None:
            self.fail(
                f"tokenizer.ggml.pre {self.pre!r:.80} is not a split rule that is known here; known are "
                f"{', '.join(sorted(SPLIT_RULES))}: use the model's safetensors folder"
            )
        backend = Tokenizer(
            models.BPE(self.vocab, list(self.merges()), ignore_merges=self.pre in WHOLE_PIECES_FIRST)
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        return backend

    def merged_characters(self) -> Tokenizer:
        """Gemma 4: merges over raw characters, spaces as marks, bytes where a character is unknown."""
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        backend = Tokenizer(
            models.BPE(
                self.vocab,
                list(self.merges()),
                byte_fallback=True,
                unk_token=self.token("unknown"),
                fuse_unk=True,
            )
        )
        backend.normalizer = normalizers.Replace(" ", _SPACE_MARK)
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
        backend.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        return backend

    def merges(self) -> Iterator[tuple[str, str]]:
        for merge in self.header.array("tokenizer.ggml.merges", str) or ():
            space = merge.find(" ", 1)  # a piece may begin with a space, not end with one
            if space < 0:
                self.fail(f"tokenizer.ggml.merges: two pieces are wanted, found {merge!r:.80}")
            left, right = merge[:space], merge[space + 1 :]
            if not {left, right, left + right} <= self.vocab.keys():
                self.fail(f"tokenizer.ggml.merges: {merge!r} joins pieces that are not all in the vocabulary")
            yield left, right

    def sentencepiece(self) -> Tokenizer:
        """SPM as llama.cpp reads it: a space is put before every stretch of text between special tokens."""
        from tokenizers import normalizers
        from transformers.integrations.gguf import convert_gguf_tokenizer

        scores = self.header.array("tokenizer.ggml.scores", float)
        if not scores or len(scores) != len(self.tokens):
            self.fail(f"{len(scores or ())} scores for {len(self.tokens)} tokens in tokenizer.ggml.scores")
        backend: Tokenizer = convert_gguf_tokenizer(
            "llama",
            {
                "tokenizer_type": "llama",
                "tokens": self.tokens,
                "scores": scores,
                "token_type": self.token_types,
            },
        )[0]
        steps: list[Any] = [normalizers.Replace(" ", _SPACE_MARK)]
        if self.flag("tokenizer.ggml.add_space_prefix", True):
            steps.insert(0, normalizers.Prepend(_SPACE_MARK))
        backend.normalizer = normalizers.Sequence(steps)
        backend.pre_tokenizer = None
        return backend

    def add_special_tokens(self, backend: Tokenizer) -> None:
        """Keep control and user-defined tokens whole, and begin or end texts as the file says."""
        from tokenizers import AddedToken, processors

        for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
            texts = (text for text, found in zip(self.tokens, self.token_types, strict=True) if found == kind)
            added = [AddedToken(text, normalized=False, special=special) for text in texts if text]
            (backend.add_special_tokens if special else backend.add_tokens)(added)
        starts = self.kind in ("llama", "gemma4") or self.pre in WHOLE_PIECES_FIRST
        begins = self.flag("tokenizer.ggml.add_bos_token", starts) and self.token_id("bos") is not None
        ends = self.flag("tokenizer.ggml.add_eos_token", False) and self.token_id("eos") is not None
        names = ["BOS"] * begins + ["$A"] + ["EOS"] * ends
        backend.post_processor = processors.TemplateProcessing(
            single=names,
            pair=[*names, "$B:1"],
            special_tokens=[
                {"id": name.upper(), "ids": [self.token_id(name)], "tokens": [self.token(name)]}
                for name, used in (("bos", begins), ("eos", ends))
                if used
            ],
        )

    def token_id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = self.header.metadata.get(key)
        if token_id is not None and (type(token_id) is not int or not 0 <= token_id < len(self.tokens)):
            self.fail(f"{key} must be an id below {len(self.tokens)}, found {token_id!r:.80}")
        return token_id

    def token(self, name: str) -> str | None:
        token_id = self.token_id(name)
        return None if token_id is None else self.tokens[token_id]

    def text(self, key: str) -> str | None:
        value = self.header.metadata.get(key)
        if value is not None and type(value) is not str:
            self.fail(f"metadata key {key!r} must be a text, found {value!r:.80}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.header.metadata.get(key, default)
        if type(value) is not bool:
            self.fail(f"metadata key {key!r} must be true or false, found {value!r:.80}")
        return value

    def fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self.header.path}: {message}")
