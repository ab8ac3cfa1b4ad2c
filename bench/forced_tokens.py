"""A generation whose tokens are forced, and what it costs: what processes that measure one model share.

Whatever the model would have chosen, it gets the same ids: a model of random weights soon repeats itself,
and a repeated token is a cache's best friend.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def token_ids(spec: dict[str, Any], first: int, count: int) -> list[int]:
    """Return ``count`` ids in ascending order; 0 ends a text and is left out."""
    return [1 + (first + i) % (spec["vocab_size"] - 1) for i in range(count)]


def read_bytes() -> int:
    """Return what this process has caused to be fetched from storage."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/io has no line read_bytes")


def status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no line {name}")


def counters(model: Any) -> dict[str, float]:
    return {name: value for name, value in model.offload.stats().as_dict().items() if name != "hit_rate"}


def differences(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


class Marks:
    """Forces the tokens of a generation and notes when each was asked for, as a LogitsProcessor."""

    def __init__(self, model: Any, following: list[int], warm_tokens: int, limit_s: float) -> None:
        self.model, self.following, self.warm_tokens, self.limit_s = model, following, warm_tokens, limit_s
        self.times: list[float] = []
        self.choices: list[int] = []  # what the model would have said
        self.digest = ""  # of the prompt's last logits
        self.counters: dict[str, float] = {}

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        self.choices.append(int(scores[0].argmax()))
        if not self.digest:
            self.digest = hashlib.sha256(scores.numpy().tobytes()).hexdigest()
        if len(self.times) == self.warm_tokens:
            self.counters = counters(self.model)
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.following[len(self.times)]] = 0.0
        self.times.append(time.perf_counter())
        return forced

    def is_over(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Stop when the time is up, as a StoppingCriteria; never before the warm-up and two tokens."""
        import torch

        late = self.times[-1] - self.times[0] > self.limit_s and len(self.times) > self.warm_tokens + 2
        return torch.full((len(input_ids),), late, dtype=torch.bool)


def generate(
    model: Any,
    prompt: list[int],
    following: list[int],
    warm_tokens: int,
    limit_s: float,
    processors: Sequence[Any] = (),
) -> Marks:
    """Run the prompt, then ``following`` but its last token; times[i] is when logits i were there."""
    import torch
    from transformers import LogitsProcessorList, StoppingCriteriaList

    marks = Marks(model, following, warm_tokens, limit_s)
    inputs = torch.tensor([prompt])
    model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=len(following), do_sample=False,
        logits_processor=LogitsProcessorList([marks, *processors]),
        stopping_criteria=StoppingCriteriaList([marks.is_over]),
    )  # fmt: skip
    return marks
