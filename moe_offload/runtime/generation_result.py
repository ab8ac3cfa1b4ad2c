"""How an answer is asked for and what it is: ``Sampling`` and ``GenerationResult``."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from moe_offload.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; ``None`` leaves it to the model's generation config.

    ``temperature=0`` is greedy. A positive temperature, ``top_p`` or ``top_k`` asks for sampling.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("temperature", Real), ("top_p", Real), ("top_k", Integral), ("seed", Integral)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                what = "a number" if kind is Real else "a whole number"
                raise ConfigError(f"{name} must be {what}, got {value!r:.80}")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {self.top_k}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")

    def apply(self, config: Any) -> None:
        """Write the choice into a transformers GenerationConfig."""
        if self.temperature == 0:
            config.do_sample = False
        elif (self.temperature, self.top_p, self.top_k) != (None, None, None):
            config.do_sample = True
        for name in ("temperature", "top_p", "top_k"):
            if not config.do_sample:
                setattr(config, name, None)  # transformers warns of settings that have no effect
            elif getattr(self, name) is not None:
                setattr(config, name, getattr(self, name))


@dataclass(frozen=True)
class GenerationResult:
    """An answer. ``str(result)`` is its text."""

    text: str  # the answer, without stop strings and special tokens
    token_ids: list[int]  # all that were generated, the end-of-text token too
    finish_reason: str  # "stop": by the model or a stop string | "length" | "interrupted"
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the key/value cache of the turn before
    prefill_s: float  # until the first new token
    decode_s: float  # from the first new token to the last
    seed: int | None = None  # what sampling started from; None for greedy
    stats: dict[str, Any] = field(default_factory=dict)  # OffloadStats.as_dict() after the run
    thinking: str = ""  # what the model's markup sets apart from the answer
    commentary: str = ""  # gpt-oss: what it says before it calls a tool

    @property
    def new_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Rate of the tokens after the first, which the prompt's pass yields; None without any."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s > 0 else None

    def __str__(self) -> str:
        return self.text
