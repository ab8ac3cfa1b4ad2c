"""`moe-offload chat`: a conversation in the model's chat template, its key/value cache kept."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from moe_offload import cli_session
from moe_offload.errors import BudgetError, ConfigError

if TYPE_CHECKING:
    from moe_offload.runtime.generate import GenerationResult, Sampling

PROMPT = "> "


class Conversation:
    """Messages and the key/value cache of the tokens that were computed for them."""

    def __init__(self, model: Any, tokenizer: Any, system: str | None, thinking: bool | None = None) -> None:
        self._model, self._tokenizer, self._system = model, tokenizer, system
        self._thinking = thinking  # None: as the template has it
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system is not None else []
        self._cache: Any = None  # frees the old one before a new one is asked for
        self._cache = self._model.offload.new_cache()
        self._cached_ids: list[int] = []

    def ask(
        self,
        text: str,
        sampling: Sampling,
        on_text: Callable[[str], None],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        on_thinking: Callable[[str], None] | None = None,
    ) -> GenerationResult:
        """Answer ``text``; what the turns before have in common with this one is not computed again.

        Raises:
            BudgetError: the conversation has reached the end of the context. It stays as it was.
        """
        from moe_offload.runtime.generate import run
        from moe_offload.runtime.prompts import encode_chat

        messages = [*self.messages, {"role": "user", "content": text}]
        input_ids = encode_chat(self._tokenizer, messages, thinking=self._thinking)
        # The last token is computed again: generate() needs its logits.
        self._keep(min(_common_prefix(self._cached_ids, input_ids), len(input_ids) - 1))
        result = run(
            self._model,
            self._tokenizer,
            input_ids,
            sampling,
            on_text,
            max_new_tokens=max_new_tokens,
            stop=stop,
            past_key_values=self._cache,
            on_thinking=on_thinking,
        )
        if result.token_ids:  # the newest token was chosen, but never went through the layers
            self._cached_ids = [*input_ids, *result.token_ids[:-1]]
        # An interrupted pass leaves some layers ahead of others.
        self._keep(len(self._cached_ids), interrupted=result.finish_reason == "interrupted")
        self.messages = [*messages, {"role": "assistant", "content": result.text}]
        return result

    def _keep(self, num_tokens: int, *, interrupted: bool = False) -> None:
        """Forget what comes after ``num_tokens``; a running state forgets everything or nothing."""
        if not self._cache.can_forget and (interrupted or num_tokens < len(self._cached_ids)):
            self._cache.reset()
            num_tokens = 0
        self._cached_ids = self._cached_ids[:num_tokens]
        self._cache.crop_to(num_tokens)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many first tokens are the same in both."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def run(args: argparse.Namespace) -> int:
    """Talk until /exit or the end of input."""
    cli_session.import_libraries()
    sampling = cli_session.make_sampling(args)
    tokenizer = cli_session.load_tokenizer(args)
    _check_template(tokenizer, args.system, args.thinking)
    with cli_session.loaded_model(args, tokenizer) as loaded:
        conversation = Conversation(loaded.model, tokenizer, args.system, args.thinking)
        _talk(args, loaded, conversation, sampling)
    return 0


def _check_template(tokenizer: Any, system: str | None, thinking: bool | None) -> None:
    """Refuse a model without a chat template, or without the switch, before its weights are read."""
    from moe_offload.runtime.prompts import encode_chat

    messages = [{"role": "system", "content": system}] if system is not None else []
    encode_chat(tokenizer, [*messages, {"role": "user", "content": "Hello"}], thinking=thinking)


def _talk(
    args: argparse.Namespace, loaded: cli_session.Loaded, conversation: Conversation, sampling: Sampling
) -> None:
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())

        print("/reset forgets, /exit or Ctrl-D ends, Ctrl-C stops an answer", file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is refused, not the rest
    while (text := _read_line()) is not None:
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
        elif text.startswith("/"):
            print("moe-offload: commands are /reset and /exit", file=sys.stderr)
        elif text:
            _answer(args, loaded, conversation, sampling, text)


def _read_line() -> str | None:
    """Return the next line, "" after Ctrl-C at the prompt, None at the end of input."""
    prompt = PROMPT if sys.stdin.isatty() else ""
    if prompt and not sys.stdout.isatty():  # where answers go into a file, input() would put it there, too
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt).strip()
    except EOFError:
        if sys.stdin.isatty():
            print(file=sys.stderr)
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""


def _answer(
    args: argparse.Namespace,
    loaded: cli_session.Loaded,
    conversation: Conversation,
    sampling: Sampling,
    text: str,
) -> None:
    context_tokens = loaded.model.offload.context_tokens
    try:
        takers = cli_session.print_piece, cli_session.print_thinking
        with cli_session.prompt_progress(loaded, *takers) as (on_text, on_thinking):
            result = conversation.ask(
                text,
                sampling,
                on_text,
                max_new_tokens=args.max_new_tokens,
                stop=args.stop,
                on_thinking=on_thinking,
            )
    except (BudgetError, ConfigError) as error:
        print(f"moe-offload: {error}; /reset starts a new conversation", file=sys.stderr)
        return
    print(flush=True)
    if result.finish_reason == "length" and result.prompt_tokens + result.new_tokens >= context_tokens:
        print(
            f"moe-offload: the context of {context_tokens} tokens is full; /reset starts a new conversation, "
            "--context makes more room",
            file=sys.stderr,
        )
    cli_session.report(args, result, loaded.model.offload)
