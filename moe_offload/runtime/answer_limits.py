"""How long an answer may be: what no model could do, and what the context has room for."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from moe_offload.errors import BudgetError, ConfigError

DEFAULT_MAX_NEW_TOKENS = 256


def check_limits(max_new_tokens: int | None, stop: Sequence[str]) -> None:
    """Refuse what no model could do; called before one is loaded.

    Raises:
        ConfigError: fewer than one token, or no whole number of them, or an empty stop string.
    """
    if max_new_tokens is not None and not (isinstance(max_new_tokens, Integral) and max_new_tokens >= 1):
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens!r:.80}")
    if "" in stop:
        raise ConfigError("a stop string is empty: nothing would be generated; leave it out")


def room_for_answer(offload: Any, prompt_tokens: int, max_new_tokens: int | None) -> int:
    """Return how many tokens may be generated after a prompt; None asks for the default or what is left.

    Raises:
        BudgetError: prompt or new tokens are beyond the context.
    """
    context_tokens: int = offload.context_tokens
    room = context_tokens - prompt_tokens
    if room < 1:
        remedy = _larger_context(offload, prompt_tokens + DEFAULT_MAX_NEW_TOKENS)
        raise BudgetError(
            f"the prompt has {prompt_tokens} tokens and leaves no room for an answer in the context of "
            f"{context_tokens}; shorten it{remedy}"
        )
    if max_new_tokens is None:
        return min(DEFAULT_MAX_NEW_TOKENS, room)
    if max_new_tokens > room:
        remedy = _larger_context(offload, prompt_tokens + max_new_tokens)
        raise BudgetError(
            f"{prompt_tokens} tokens of prompt and max_new_tokens={max_new_tokens} are beyond the context of "
            f"{context_tokens}; ask for at most {room}{remedy}"
        )
    return max_new_tokens


def _larger_context(offload: Any, wanted_tokens: int) -> str:
    """Name a larger context as a remedy where the model was made for one."""
    most = offload.spec.max_position_embeddings
    if offload.context_tokens >= most:
        return f" (the model was made for {most} positions)"
    return f", or ask for context={min(wanted_tokens, most)}"
