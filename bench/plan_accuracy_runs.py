"""Texts, loads and runs of plan_accuracy.py: what is traced for predictions, and what is then measured."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COLD_TOKENS, BETWEEN_TOKENS, WARM_TOKENS = 64, 32, 128  # topics of the synthetic models last 128 tokens
DECODED_TOKENS = COLD_TOKENS + BETWEEN_TOKENS + WARM_TOKENS
STARTS = (1, 1100, 2000, 3000)  # first tokens of a synthetic model's texts
FILES = ("README.md", "docs/ARCHITECTURE.md", "docs/LOG.md", "CHANGELOG.md")  # the demo model's texts
SLACK_BYTES = 64 << 20  # the cap on experts decides, not bytes
LOOP_STEPS = 100_000
WEIGHTS_BYTES, ROW_BYTES = 16 << 20, 2176  # in Q8_0, 2048 columns
EVERY_S = 0.25  # between looks at the pace; more often would slow tokens down
LEAST_S, MOST_LOADS = 4.0, 4  # of measuring a case: a machine's moods last for seconds
BALLAST_BYTES = 2 << 30  # more than the kernel keeps for the processors, and what is in pieces
TAKE_MEMORY = """
import mmap, os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
memory = mmap.mmap(-1, int(sys.argv[2]))
for page in range(0, len(memory), mmap.PAGESIZE):
    memory[page] = 1
print("taken", flush=True)
sys.stdin.read()
"""


@contextmanager
def fresh_pages() -> Iterator[None]:
    """Let what is allocated meanwhile come from memory's larger free blocks.

    The kernel keeps what was just freed for each processor and hands it out again page by page, last one
    first; a direct read into pages that are scattered so takes up to twice as long on a virtual disk. A
    rehearsal's memory would be the next model's: so others take it first, on every processor.
    """
    processors = sorted(os.sched_getaffinity(0))
    size = str(BALLAST_BYTES // len(processors))
    with ExitStack() as stack:
        holders = []
        for processor in processors:
            command = [sys.executable, "-c", TAKE_MEMORY, str(processor), size]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            holders.append(stack.enter_context(subprocess.Popen(command, **pipes)))
            stack.callback(holders[-1].stdin.close)
        for holder in holders:
            holder.stdout.readline()
        yield


class Pace:
    """How fast the machine is now and then: seconds of a loop in Python and of a product by all threads."""

    def __init__(self) -> None:
        import torch

        from moe_offload.measure import random_weights

        self._rows, self._x = WEIGHTS_BYTES // ROW_BYTES, torch.randn(1, 2048)
        self._weights = random_weights(WEIGHTS_BYTES)[: self._rows * ROW_BYTES]
        self.seen: list[tuple[float, float]] = []

    def look(self, times: int = 1) -> None:
        from moe_offload import ops
        from moe_offload.storage.expert_format import GgmlType

        for _ in range(times):
            started, total = time.perf_counter(), 0
            for number in range(LOOP_STEPS):
                total += number
            looped = time.perf_counter()
            ops.linear(self._x, self._weights, GgmlType.Q8_0, self._rows, 2048)
            ended = time.perf_counter()
            self.seen.append((looped - started, ended - looped))

    def take(self) -> list[float]:
        """Return the medians of what was seen since the last time."""
        medians = [statistics.median(times) for times in zip(*self.seen, strict=True)]
        self.seen = []
        return medians


@cache
def texts(path: Path, context: int) -> list[list[int]]:
    """Return the ids of some texts: each round measures one, and its prediction rests on all others."""
    from moe_offload.config import DEMO_MODEL

    count = context + DECODED_TOKENS
    if path != DEMO_MODEL:
        return [list(range(first, first + count)) for first in STARTS]
    import moe_offload

    tokenizer = moe_offload.load_tokenizer()
    return [tokenizer((ROOT / name).read_text(encoding="utf-8"))["input_ids"][:count] for name in FILES]


def choices(share: str, context: int) -> Any:
    from moe_offload.config import RuntimeConfig

    return RuntimeConfig(experts=share, context_tokens=context + DECODED_TOKENS)


def process_of(checkpoint: Any) -> Any:
    """Return this process as the loader will find it."""
    from dataclasses import replace

    from moe_offload.header_costs import fresh_process
    from moe_offload.runtime.loaded_models import base_bytes

    return replace(fresh_process(checkpoint), base_bytes=base_bytes())


def ram_bytes(path: Path, share: str, context: int) -> int:
    from moe_offload.header_costs import place
    from moe_offload.storage.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    plan = place(checkpoint, choices(share, context), ram_bytes=1 << 40, process=process_of(checkpoint))
    return plan.total_bytes + SLACK_BYTES


def load(path: Path, share: str, context: int) -> Any:
    import moe_offload

    return moe_offload.from_pretrained(
        path, ram=ram_bytes(path, share, context), experts=share, context=context + DECODED_TOKENS,
        prefetch=False, warm_start=False, profile="none",
    )  # fmt: skip


@cache
def trace_of(path: Path, context: int, text: int) -> Any:
    """Return the routing of a text: its prompt, then token by token."""
    ids = texts(path, context)[text]
    model = load(path, "100%", context)
    try:
        with model.offload.trace() as recorder:
            run(model, ids, [DECODED_TOKENS])
        return recorder.trace()
    finally:
        model.offload.close()


def measure(path: Path, share: str, context: int, ids: list[int]) -> dict[str, dict[str, Any]]:
    """Load the model, again while little was measured; return tokens per second of prompt and tokens.

    Of the tokens the first ones and later ones, by all of the loads' seconds.
    """
    loads: list[list[dict[str, Any]]] = []
    seconds = 0.0
    while not loads or (seconds < LEAST_S and len(loads) < MOST_LOADS):
        with fresh_pages():
            model = load(path, share, context)
            try:
                loads.append(run(model, ids, [COLD_TOKENS, BETWEEN_TOKENS, WARM_TOKENS]))
            finally:
                model.offload.close()
        seconds += sum(mark["seconds"] for mark in loads[-1])
    counts = {"prefill": (0, context), "cold": (1, COLD_TOKENS), "warm": (3, WARM_TOKENS)}
    return {
        phase: mean_mark([marks[position] for marks in loads], count)
        for phase, (position, count) in counts.items()
    }


def mean_mark(marks: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Return what a part of several loads' runs had in common, and the tokens per second of all of them."""
    seconds = [mark["seconds"] for mark in marks]
    return marks[-1] | {
        "tokens_per_s": len(marks) * tokens / sum(seconds),
        "seconds": seconds,
        "pace_s": [statistics.fmean(paces) for paces in zip(*(m["pace_s"] for m in marks), strict=True)],
    }


def run(model: Any, ids: list[int], parts: list[int]) -> list[dict[str, Any]]:
    """Run the prompt and then each part's tokens one by one; return seconds and hit rate of each."""
    import torch

    stats, prompt = model.offload.stats, len(ids) - DECODED_TOKENS
    marks: list[dict[str, Any]] = []
    pace = Pace()
    with torch.no_grad():
        pace.look(5)
        started = time.perf_counter()
        cache = model(torch.tensor([ids[:prompt]]), logits_to_keep=1).past_key_values
        seconds = time.perf_counter() - started
        pace.look(5)
        marks.append({"seconds": seconds, "pace_s": pace.take()})
        for part in parts:
            before = stats().as_dict()
            seconds = decode(model, ids[prompt : prompt + part], cache, pace)
            prompt += part
            after = stats().as_dict()
            hits, misses = (after[name] - before[name] for name in ("hits", "misses"))
            marks.append(
                {"seconds": seconds, "hit_rate": hits / max(1, hits + misses), "pace_s": pace.take()}
            )
    return marks


def decode(model: Any, ids: list[int], cache: Any, pace: Pace) -> float:
    """Run tokens one by one; return the seconds of the steps, looks at the pace left out."""
    import torch

    seconds = 0.0
    pace.look(2)
    looked = time.perf_counter()
    for token in ids:
        started = time.perf_counter()
        model(torch.tensor([[token]]), past_key_values=cache)
        ended = time.perf_counter()
        seconds += ended - started
        if ended - looked > EVERY_S:
            pace.look()
            looked = time.perf_counter()
    pace.look(2)
    return seconds
