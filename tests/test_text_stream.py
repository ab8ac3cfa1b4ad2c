"""Text as it comes: whole characters only, stop strings never seen."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_offload.errors import ConfigError
from moe_offload.runtime.text_stream import StopStrings, TextStream, TokenDecoder


class ByteTokenizer:
    """One token per byte; incomplete characters decode to U+FFFD, as byte-level BPE does."""

    def decode(self, token_ids: Sequence[int], **kwargs: bool) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


class FallbackTokenizer(ByteTokenizer):
    """As SentencePiece's byte fallback does: every byte of an incomplete character is a U+FFFD."""

    def decode(self, token_ids: Sequence[int], **kwargs: bool) -> str:
        whole = bytes(token_ids)
        for missing in range(4):
            try:
                end = len(whole) - missing
                return whole[:end].decode() + "\ufffd" * missing
            except UnicodeDecodeError:
                continue
        return super().decode(token_ids)


class StrippingTokenizer:
    """Words with a leading space, which is dropped at the start of a text (SentencePiece)."""

    words = ("▁once", "▁upon", "▁a", "▁time", "s")

    def decode(self, token_ids: Sequence[int], **kwargs: bool) -> str:
        return "".join(self.words[i] for i in token_ids).replace("▁", " ").removeprefix(" ")


@given(st.text())
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), FallbackTokenizer()])
def test_pieces_are_whole_characters_and_add_up_to_the_text(tokenizer, text):
    decoder = TokenDecoder(tokenizer)
    streamed = "".join(decoder.push(byte) for byte in text.encode())
    assert text.startswith(streamed)
    assert (streamed + decoder.finish()).rstrip("\ufffd") == text.rstrip("\ufffd")


@given(st.lists(st.integers(0, 255)))
def test_bytes_that_are_no_text_neither_crash_nor_wait_for_ever(token_ids):
    tokenizer = ByteTokenizer()
    decoder = TokenDecoder(tokenizer)
    text = "".join(decoder.push(token_id) for token_id in token_ids) + decoder.finish()
    assert tokenizer.decode(token_ids).startswith(text)
    assert tokenizer.decode(token_ids).rstrip("\ufffd") == text.rstrip("\ufffd")


def test_an_emoji_is_printed_once_when_its_last_byte_is_there():
    decoder = TokenDecoder(ByteTokenizer())
    assert [decoder.push(byte) for byte in "a👩b".encode()] == ["a", "", "", "", "👩", "b"]


def test_half_a_character_at_the_end_is_dropped():
    decoder = TokenDecoder(ByteTokenizer())
    assert "".join(decoder.push(byte) for byte in "ok €".encode()[:-1]) + decoder.finish() == "ok "


def test_endless_broken_bytes_are_printed_in_the_end():
    decoder = TokenDecoder(ByteTokenizer())
    assert len("".join(decoder.push(0x80) for _ in range(200))) > 100


def test_spaces_between_words_survive_decoding_in_pieces():
    decoder = TokenDecoder(StrippingTokenizer())
    assert "".join(decoder.push(i) for i in (0, 1, 2, 3, 4)) == "once upon a times"


def test_the_first_word_keeps_its_space_after_a_prompt():
    decoder = TokenDecoder(StrippingTokenizer(), context_ids=[0, 1])
    assert decoder.push(2) + decoder.push(3) == " a time"


@given(st.text("ab.", max_size=30), st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3))
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text, stop):
    by_char, at_once = StopStrings(stop), StopStrings(stop)
    slow = "".join(by_char.push(char) for char in text) + by_char.finish()
    fast = at_once.push(text) + at_once.finish()
    assert (slow, by_char.found) == (fast, at_once.found)
    assert text.startswith(slow)
    assert not any(s in slow for s in stop)
    assert (slow == text) == (by_char.found is None)


def test_what_may_begin_a_stop_string_waits():
    stop = StopStrings(["\nUser:"])
    assert [stop.push(piece) for piece in ("Hi", "\nUs", "e", "ful", "\nUser:", "more")] == [
        "Hi", "", "", "\nUseful", "", "",
    ]  # fmt: skip
    assert stop.found == "\nUser:" and stop.finish() == ""


def test_a_beginning_that_leads_nowhere_is_printed_at_the_end():
    stream = TextStream(ByteTokenizer(), ["END"])
    parts = [part for byte in b"the EN" for part in stream.push(byte)] + stream.finish()
    assert "".join(part.text for part in parts) == "the EN"
    assert not stream.stopped


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="stop string is empty"):
        StopStrings(["a", ""])
