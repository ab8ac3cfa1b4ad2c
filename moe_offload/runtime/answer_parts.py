"""Tell a model's thinking from its answer, in the markup of its family, as the text streams.

Three kinds: ``<think> … </think>`` (Qwen, DeepSeek, GLM, MiniMax), Gemma 4's thought channel, and
gpt-oss's channels, each of which a header names. Marks that are special tokens never come as text,
so that an answer may speak of them; ``<think>`` counts at the beginning of an answer only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

ANSWER, THINKING, COMMENTARY = "answer", "thinking", "commentary"


class Part(NamedTuple):
    """A piece of text and what it belongs to."""

    kind: str  # ANSWER | THINKING | COMMENTARY (gpt-oss: what is said before a tool is called)
    text: str


class Splitter(Protocol):
    """Text and marks in, parts out; what could still become a mark is held back."""

    marks: Mapping[int, str]  # token id → text of a mark that a decoder would leave out

    def push(self, text: str) -> list[Part]: ...
    def mark(self, text: str) -> list[Part]: ...
    def finish(self) -> list[Part]: ...


class WholeAnswer:
    """A model without markup: everything is answer."""

    marks: Mapping[int, str] = {}

    def push(self, text: str) -> list[Part]:
        return _parts(ANSWER, text)

    def mark(self, text: str) -> list[Part]:
        return self.push(text)

    def finish(self) -> list[Part]:
        return []


class Tags:
    """One stretch of thinking between two tags, at the beginning of the answer.

    Args:
        started: the prompt's end has opened it (True), or opened and closed it (False); None when the
            model decides.
    """

    def __init__(
        self, opening: str, closing: str, marks: Mapping[int, str], started: bool | None = None
    ) -> None:
        self._opening, self._closing, self.marks = opening, closing, marks
        self._state = {True: "inside", False: "after", None: "before"}[started]
        self._held, self._begun = "", False

    def push(self, text: str) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        if self._state == "before":
            self._look_for_opening()
        if self._state == "inside":
            parts += self._thinking()
        if self._state == "between":  # blank lines after the thinking belong to nothing
            self._held = self._held.lstrip("\n")
            self._state = "after" if self._held else "between"
        if self._state == "after":
            parts, self._held = parts + _parts(ANSWER, self._held), ""
        return parts

    def mark(self, text: str) -> list[Part]:
        return self.push(text)

    def finish(self) -> list[Part]:
        held, self._held = self._held, ""
        return _parts(THINKING if self._state == "inside" else ANSWER, held)

    def _look_for_opening(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(self._opening):
            self._state, self._held = "inside", begun.removeprefix(self._opening)
        elif not self._opening.startswith(begun):
            self._state = "after"

    def _thinking(self) -> list[Part]:
        if not self._begun:  # the line break after the tag
            self._held = self._held.lstrip("\n")
            self._begun = bool(self._held)
        inside, closed, rest = self._held.partition(self._closing)
        if closed:
            self._state, self._held = "between", rest
            return _parts(THINKING, inside)
        keep = beginning_at_the_end(inside, self._closing)
        self._held = inside[len(inside) - keep :]
        return _parts(THINKING, inside[: len(inside) - keep])


class Channels:
    """gpt-oss: ``<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…``."""

    KINDS = {"final": ANSWER, "analysis": THINKING, "commentary": COMMENTARY}  # noqa: RUF012
    NAMES = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")

    def __init__(self, marks: Mapping[int, str]) -> None:
        self.marks = marks
        self._kind = ANSWER
        self._header: str | None = None  # text of a header that is being read

    def push(self, text: str) -> list[Part]:
        if self._header is not None:
            self._header += text
            return []
        return _parts(self._kind, text)

    def mark(self, text: str) -> list[Part]:
        if text == "<|message|>":
            if self._header is not None:
                self._kind, self._header = self._kind_of(self._header), None
        elif text == "<|channel|>":
            self._header = ""
        elif text in ("<|start|>", "<|end|>"):
            self._header, self._kind = "", ANSWER
        return []

    def finish(self) -> list[Part]:
        return []

    def _kind_of(self, header: str) -> str:
        """A header begins with the channel's name; after <|start|> alone it is a role: an answer."""
        words = header.split()
        return self.KINDS.get(words[0], ANSWER) if words else self._kind


def splitter_of(tokenizer: Any, prompt_ids: Sequence[int] = ()) -> Splitter:
    """Return the splitter of a tokenizer's family, in the state that the end of the prompt leaves."""
    vocab: Mapping[str, int] = tokenizer.get_vocab()
    if {"<|channel|>", "<|message|>"} <= vocab.keys():
        marks = {vocab[name]: name for name in Channels.NAMES if name in vocab}
        return _after_prompt(Channels(marks), tokenizer, prompt_ids)
    for opening, closing, after in (("<|channel>", "<channel|>", "thought\n"), ("<think>", "</think>", "")):
        known = opening in vocab and closing in vocab
        if known or (not after and opening in str(getattr(tokenizer, "chat_template", None) or "")):
            marks = {
                vocab[name]: name for name in (opening, closing) if _is_left_out(tokenizer, vocab.get(name))
            }
            return Tags(
                opening + after, closing, marks, _opened(tokenizer, prompt_ids, opening + after, closing)
            )
    return WholeAnswer()


def _is_left_out(tokenizer: Any, token_id: int | None) -> bool:
    """Whether decoding leaves out a token as special."""
    token = tokenizer.added_tokens_decoder.get(token_id)
    return token is not None and bool(token.special)


def _opened(tokenizer: Any, prompt_ids: Sequence[int], opening: str, closing: str) -> bool | None:
    """Whether the prompt's end opens the thinking (True) or leaves it out (False)."""
    text = tokenizer.decode(list(prompt_ids[-16:]), skip_special_tokens=False).rstrip()
    if text.endswith(opening.rstrip()):
        return True
    return False if text.endswith(closing) else None


def _after_prompt(splitter: Channels, tokenizer: Any, prompt_ids: Sequence[int]) -> Channels:
    """Read the header that the prompt has begun: its last <|start|> and what follows."""
    start = next((token_id for token_id, name in splitter.marks.items() if name == "<|start|>"), None)
    begun = list(prompt_ids)
    if start in begun:
        begun = begun[len(begun) - 1 - begun[::-1].index(start) :]
        for token_id in begun:
            if token_id in splitter.marks:
                splitter.mark(splitter.marks[token_id])
            else:
                splitter.push(tokenizer.decode([token_id], skip_special_tokens=False))
    return splitter


def _parts(kind: str, text: str) -> list[Part]:
    return [Part(kind, text)] if text else []


def beginning_at_the_end(text: str, mark: str) -> int:
    """Return the length of the longest end of ``text`` that is a beginning of ``mark``."""
    longest = min(len(text), len(mark) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(mark[:size])), 0)
