"""One layer's experts as the runtime serves them: its cache, reader and kernels on the model's own file.

What a decode step waits for and what a prompt's chunk costs come from the interplay of reads in flight, the
threads that compute and the book-keeping between them, so they are timed together, not part by part.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from itertools import cycle

import numpy as np
import torch

from moe_offload.config import PREFILL_CHUNK_TOKENS, RuntimeConfig
from moe_offload.expert_bench import ExpertBench
from moe_offload.expert_ops import Activation, ExpertKernel
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.machine_speed import Curve
from moe_offload.planning.plans import PoolPlan
from moe_offload.planning.prompt_roofline import value_at
from moe_offload.planning.slots import staging_slots
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.stats import OffloadStats

COMPUTE_S, READ_S = 0.015, 0.05  # for a measurement, without and with reads
LEAST_RUNS = 4
FEW_TOKENS = (1, 4, 16, 32, 64, 128)  # of an expert in a chunk
STREAMED_TOKENS, STREAMED_PER_TOP_K = (16, 64, 128), 4
RESIDENT_CALLS = 4  # experts in one call, as a prompt's residents come
TURNS = 8  # of experts that follow one another, so that no cache has them


class LayerExperts:
    """A layer of a checkpoint with some of its experts resident, in the slots of a bench.

    At most half of the layer is resident, so that every step can be given hits and misses.
    """

    def __init__(self, bench: ExpertBench, layer_idx: int) -> None:
        checkpoint = bench.checkpoint
        layouts = checkpoint.experts.layouts
        self.layout, self.layer_idx = layouts[layer_idx], layer_idx
        num_experts = self.layout.num_experts
        self.top_k = min(checkpoint.spec.top_k, num_experts)
        num_slots = max(1, min(bench.num_slots, num_experts // 2 + 2 * self.top_k, num_experts - 1))
        staging = staging_slots(num_slots, num_experts, self.top_k)
        self.cache = ExpertCache(
            (PoolPlan(bench.slot_bytes, (layer_idx,), num_experts, num_slots, staging),),
            layouts,
            bench.store,
            bench.arena,
            lambda: make_policy(RuntimeConfig().policy),
            OffloadStats(),
            top_k=self.top_k,
        )
        self.kernel = ExpertKernel(self.layout, Activation())
        self._arena = bench.arena
        self._by_last_use = list(range(num_experts))
        self.fill()

    def fill(self) -> None:
        """Serve every expert once, so that slots are in use as they are while a model decodes."""
        num_experts = self.layout.num_experts
        for first in range(0, num_experts, self.top_k):
            self._serve(list(range(first, min(first + self.top_k, num_experts))))

    @property
    def most_misses(self) -> int:
        """How many of a step's experts can be missing."""
        return min(self.top_k, len(self._split()[1]))

    def at_hand_s(self) -> float:
        """Return the seconds of one token's experts in memory, the kernel alone."""
        return self._call_s(self.top_k, 1)

    def resident_s(self, num_tokens: int) -> float:
        """Return the seconds of one resident expert of a chunk for ``num_tokens`` tokens."""
        return self._call_s(RESIDENT_CALLS, num_tokens) / RESIDENT_CALLS

    def submit_s(self) -> float:
        """Return what asking for an expert's read takes from who computes."""
        return max(0.0, _mean(lambda: self._begin(1), READ_S / 2) - _mean(lambda: self._begin(0), COMPUTE_S))

    def step_s(self, misses: int) -> float:
        """Return the seconds of one token's experts of which so many must be read, all that goes with it."""
        return _mean(lambda: self._step(misses), READ_S if misses else COMPUTE_S)

    def streamed_s(self, num_tokens: int, latency_s: float = 0.0, *, fresh: bool = False) -> float:
        """Return the seconds of one expert of a first prompt's chunk: all are read, all slots are free.

        Args:
            latency_s: until the first read bears, which is of the layer, not of its experts.
            fresh: the slots' pages have yet to be made.
        """
        count = min(self.layout.num_experts, STREAMED_PER_TOP_K * self.top_k)
        hidden = torch.randn(num_tokens, self.layout.hidden_size)
        times: list[float] = []
        started = time.perf_counter()
        while not times or time.perf_counter() - started < READ_S:
            times.append(self._stream(count, hidden, fresh))
        return max(0.0, statistics.fmean(times) - latency_s) / count

    def prompt_curve(self) -> Curve:
        """Return seconds of a resident expert by tokens, up to what a chunk gives to the busiest ones."""
        counts = [tokens for tokens in FEW_TOKENS if tokens <= self._most_tokens()]
        return tuple((float(tokens), self.resident_s(tokens)) for tokens in counts)

    def handling_curve(self, resident: Curve, read_s: float, latency_s: float) -> Curve:
        """Return what an expert that is read takes beyond the longer of reading and computing, by tokens.

        Args:
            resident: ``prompt_curve``.
            read_s, latency_s: ``streamed_s`` of one token, and what it was given.
        """
        return tuple(
            (float(count), self.streamed_s(count, latency_s) - max(read_s, value_at(resident, count)))
            for count in self._streamed_tokens()
        )

    def fresh_curve(self) -> Curve:
        """Return what an expert that is read takes more while its slot's pages are made, by tokens.

        To be measured last: new pages lie scattered, and reads into them take longer from then on.
        """
        return tuple(
            (float(count), self.streamed_s(count, fresh=True) - self.streamed_s(count))
            for count in self._streamed_tokens()
        )

    def _streamed_tokens(self) -> list[int]:
        return [tokens for tokens in STREAMED_TOKENS if tokens <= self._most_tokens()]

    def _most_tokens(self) -> int:
        """Return how many tokens of a chunk the busiest experts get."""
        return max(FEW_TOKENS[2], 4 * PREFILL_CHUNK_TOKENS * self.top_k // self.layout.num_experts)

    def _split(self) -> tuple[list[int], list[int]]:
        """Return the ids of residents and of all others, those used longest ago first."""
        resident = self.cache.are_resident(self.layer_idx, self._by_last_use)
        parts: tuple[list[int], list[int]] = ([], [])
        for expert_id, is_resident in zip(self._by_last_use, resident, strict=True):
            parts[not is_resident].append(expert_id)
        return parts

    def _used(self, expert_ids: list[int]) -> None:
        used = set(expert_ids)
        self._by_last_use = [i for i in self._by_last_use if i not in used] + expert_ids

    def _step(self, misses: int) -> float:
        resident, absent = self._split()
        chosen = sorted(resident[: self.top_k - misses] + absent[:misses])
        seconds = self._serve(chosen)
        self._used(chosen)
        return seconds

    def _begin(self, misses: int) -> float:
        """Return the seconds of a step's beginning, of which so many experts must be read."""
        resident, absent = self._split()
        chosen = sorted(resident[: self.top_k - misses] + absent[:misses])
        started = time.perf_counter()
        step = self.cache.begin(self.layer_idx, chosen, [1 / len(chosen)] * len(chosen))
        seconds = time.perf_counter() - started
        assert step is not None, "a pool has slots for one token's experts"
        for expert_id in step.pending:
            self.cache.wait(step, expert_id)
        self.cache.end(step)
        self._used(chosen)
        return seconds

    def _serve(self, expert_ids: list[int]) -> float:
        """Compute one token as runtime/executor.py and native_step.py do."""
        hidden = torch.randn(1, self.layout.hidden_size)
        weights = [1 / len(expert_ids)] * len(expert_ids)
        started = time.perf_counter()
        step = self.cache.begin(self.layer_idx, expert_ids, weights)
        assert step is not None, "a pool has slots for one token's experts"
        for group in (step.ready, *([expert_id] for expert_id in step.pending)):
            if group and group is not step.ready:
                self.cache.wait(step, group[0])
            if group:
                self._rows(hidden, self.cache.step_addresses(step, group), len(group))
        self.cache.end(step)
        return time.perf_counter() - started

    def _call_s(self, count: int, num_tokens: int) -> float:
        """Return the seconds of so many residents in one call, call after call as a decode step's layers."""
        resident = cycle(self._split()[0])
        hidden = torch.randn(num_tokens, self.layout.hidden_size)
        out, tokens = torch.zeros_like(hidden), [num_tokens] * count
        ids = [[next(resident) for _ in range(count)] for _ in range(TURNS)]
        calls = cycle(self._prepared(hidden, self._addresses(i), tokens, out) for i in ids)
        return _mean(lambda: _seconds(next(calls)), COMPUTE_S)

    def _addresses(self, expert_ids: list[int]) -> list[int]:
        return self.cache.resident_addresses(self.layer_idx, expert_ids)

    def _stream(self, count: int, hidden: torch.Tensor, fresh: bool) -> float:
        self.cache.keep_only(())
        if fresh:
            self._arena.give_back(0, self._arena.num_bytes)
        chosen, num_tokens = sorted(self._by_last_use[:count]), len(hidden)
        out = torch.zeros_like(hidden)
        started = time.perf_counter()
        with closing(self.cache.stream_batches(self.layer_idx, chosen, [num_tokens] * count)) as batches:
            for batch in batches:
                addresses = [address for _, there in batch for address in there]
                self._prepared(hidden, addresses, [num_tokens] * len(batch), out)()
        seconds = time.perf_counter() - started
        self._used(chosen)
        return seconds

    def _rows(self, hidden: torch.Tensor, addresses: list[int], count: int) -> None:
        ids, offsets = np.arange(count, dtype=np.int32), np.arange(count + 1, dtype=np.int32)
        where = np.array(addresses, np.uint64).reshape(count, -1)
        self.kernel.rows(hidden, ids, where, offsets, np.zeros(count, np.int32))

    def _prepared(
        self, hidden: torch.Tensor, addresses: list[int], tokens: list[int], out: torch.Tensor
    ) -> Callable[[], object]:
        """Return the call that adds experts' rows to ``out``, each for as many of the first tokens."""
        ids, offsets = np.arange(len(tokens), dtype=np.int32), np.cumsum([0, *tokens], dtype=np.int32)
        where = np.array(addresses, np.uint64).reshape(len(tokens), -1)
        rows = np.concatenate([np.arange(count, dtype=np.int32) for count in tokens])
        weights = torch.full((len(rows),), 0.5)
        return lambda: self.kernel.sum(hidden, ids, where, offsets, rows, weights, out)


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _mean(function: Callable[[], float], most_s: float) -> float:
    """Return the mean of what ``function`` returns, the first left out.

    What is predicted from it is a sum of many such times, a disk's moods among them.
    """
    function()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < LEAST_RUNS or time.perf_counter() - started < most_s:
        times.append(function())
    return statistics.fmean(times)
