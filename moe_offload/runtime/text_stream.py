"""Turn tokens into text as they come: whole characters only, and never a stop string.

A token may hold half a character (byte-level BPE, byte fallback), and a stop string may arrive in
pieces. What could still turn out to be either is held back. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from moe_offload.errors import ConfigError
from moe_offload.runtime.answer_parts import ANSWER, Part, Splitter, WholeAnswer, beginning_at_the_end

REPLACEMENT = "\ufffd"  # what a decoder prints for bytes that are not a character, or not yet
MAX_PENDING = 3  # a UTF-8 character has at most three bytes before its last one
MAX_WINDOW_TOKENS = 64  # beyond this the bytes are no character's beginning: print what is there


class Decoder(Protocol):
    """What is used of a transformers tokenizer."""

    def decode(self, token_ids: list[int], **kwargs: bool) -> str: ...


class TokenDecoder:
    """Decode one sequence token by token; the pieces add up to the decoded sequence.

    A window of tokens is decoded again with every token, because the text of a token may depend on
    its neighbours (SentencePiece drops a leading space); its first tokens were printed before.

    Args:
        context_ids: tokens before the sequence (the end of the prompt), which are not printed.
    """

    def __init__(self, tokenizer: Decoder, context_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context_ids)
        if self._decode(self._window).endswith(REPLACEMENT):  # no boundary to start from
            self._window = []
        self._last_boundary = len(self._window)  # tokens of the window that end in a whole character
        self._printed_chars = len(self._decode(self._window))

    def push(self, token_id: int) -> str:
        """Return the characters that are complete with this token; often a word, sometimes none."""
        self._window.append(token_id)
        text = self._decode(self._window)
        is_whole = not text.endswith(REPLACEMENT) or len(self._window) > MAX_WINDOW_TOKENS
        end = len(text) if is_whole else _whole_chars(text)
        piece = text[self._printed_chars : end]
        self._printed_chars = max(self._printed_chars, end)
        if is_whole:
            self._slide()
        return piece

    def finish(self) -> str:
        """Return what was held back and is text after all; half a character is dropped."""
        return self._decode(self._window)[self._printed_chars :].rstrip(REPLACEMENT)

    def _slide(self) -> None:
        """Keep the tokens since the boundary before this one: enough context, and short."""
        self._window = self._window[self._last_boundary :]
        self._last_boundary = len(self._window)
        self._printed_chars = len(self._decode(self._window))

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _whole_chars(text: str) -> int:
    """Return the length of ``text`` without the characters that more bytes may complete."""
    end = len(text)
    while end > max(0, len(text) - MAX_PENDING) and text[end - 1] == REPLACEMENT:
        end -= 1
    return end


class StopStrings:
    """Pass text on up to the first stop string; hold back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        if not all(stop):
            raise ConfigError("a stop string is empty: nothing would be generated; leave it out")
        self._stop = tuple(stop)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Return the text that no stop string can claim any more; nothing once one was found."""
        if self.found is not None:
            return ""
        self._held += text
        matches = [(self._held.find(stop) + len(stop), stop) for stop in self._stop if stop in self._held]
        if matches:  # the one complete first, as if the text had come in single characters
            end, self.found = min(matches, key=lambda match: (match[0], -len(match[1])))
            passed, self._held = self._held[: end - len(self.found)], ""
            return passed
        keep = max((beginning_at_the_end(self._held, stop) for stop in self._stop), default=0)
        passed, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return passed

    def finish(self) -> str:
        """Return what was held back for a stop string that did not come."""
        passed, self._held = self._held, ""
        return passed


class TextStream:
    """Tokens of one answer in, its parts out, stop strings and half characters withheld.

    Args:
        stop: texts that end the answer; thinking may speak of them.
        context_ids: tokens before the answer, which are not printed.
        splitter: tells thinking from answer; by default everything is answer.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        stop: Sequence[str] = (),
        context_ids: Sequence[int] = (),
        splitter: Splitter | None = None,
    ) -> None:
        self._tokenizer, self._splitter = tokenizer, splitter or WholeAnswer()
        self._decoder = TokenDecoder(tokenizer, context_ids)
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.found is not None

    def push(self, token_id: int) -> list[Part]:
        """Return the parts that this token sets free."""
        mark = self._splitter.marks.get(token_id)
        if mark is None:
            return self._passed(self._splitter.push(self._decoder.push(token_id)))
        parts = self._splitter.push(self._decoder.finish()) + self._splitter.mark(mark)
        self._decoder = TokenDecoder(self._tokenizer)
        return self._passed(parts)

    def finish(self) -> list[Part]:
        """Return the rest; call once, at the end."""
        rest = self._passed(self._splitter.push(self._decoder.finish()) + self._splitter.finish())
        return rest + [Part(ANSWER, text) for text in [self._stop.finish()] if text]

    def _passed(self, parts: Sequence[Part]) -> list[Part]:
        passed = [Part(kind, self._stop.push(text) if kind == ANSWER else text) for kind, text in parts]
        return [part for part in passed if part.text]
