"""Ctrl-C may come between any two instructions of the cache: it must stay right and usable.

A trace function raises KeyboardInterrupt at the n-th line of the cache's own code, for every n that a
busy scenario has; then the cache recovers and goes on.
"""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest
from simulated_disk import FakeArena, SimulatedDisk, make_layouts, make_pool

from moe_offload.errors import ConfigError
from moe_offload.planning.eviction import EwmaPolicy
from moe_offload.residency.early_reads import EarlyReads
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.stats import OffloadStats
from moe_offload.storage.expert_format import ExpertKey

NUM_LAYERS, NUM_EXPERTS, TOP_K = 2, 8, 2
CODE = (
    "cache_books.py",
    "early_reads.py",
    "expert_cache.py",
    "cache_hints.py",
    "cache_pools.py",
    "cache_upkeep.py",
    "prompt_stream.py",
    "slot_pool.py",
    "slot_reads.py",
)


class ForgetfulDisk(SimulatedDisk):
    """Says of a forgotten ticket what the native reader says."""

    def check_known(self, ticket: int) -> None:
        if self.reads[ticket].state == "ended":
            raise ConfigError(f"ticket {ticket} is unknown or forgotten")

    def done(self, ticket: int) -> bool:
        self.check_known(ticket)
        return self.reads[ticket].state in ("done", "failed")

    def cancel(self, ticket: int) -> bool:
        self.check_known(ticket)
        return self.reads[ticket].state == "cancelled" or super().cancel(ticket)

    def adopt(self, ticket: int, key: ExpertKey) -> None:
        assert self.reads[ticket].key == key


class NativeRun:
    """Stands for native code that has begun reads: what it tells afterwards."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def lend(self, slot_addresses: list[list[int]]) -> None:
        assert not slot_addresses, "the loan ends"

    def events(self) -> list[tuple[Any, ...]]:
        return self.told

    def used(self) -> list[tuple[int, int]]:
        return []

    def clear_events(self) -> None:
        self.told = []


class Door(EarlyReads):
    """The real door to what is not native here."""

    def __init__(self, cache: ExpertCache, disk: ForgetfulDisk) -> None:
        self._cache, self._store, self.native = cache, disk, NativeRun()  # type: ignore[assignment]
        self.has_lent = False

    def run(self, after_layer: int) -> None:
        """Guess what is not in memory, as many as there are slots for, in place of older guesses, too."""
        self.has_lent = True
        (addresses,) = self._cache.lend_for_guesses(NUM_EXPERTS, after_layer, 0)
        (pool,), disk = self._cache._pools, self._store
        keys = [ExpertKey(0, expert_id) for expert_id in range(NUM_EXPERTS)]
        absent = [key for key in keys if pool.find(key) is None]
        for key, address in zip(absent, reversed(addresses), strict=False):
            ticket = disk.read(key, address, speculative=True)
            self.native.told.append((True, *key, address, ticket))  # type: ignore[attr-defined]
        self.end()


def make_cache() -> tuple[ExpertCache, ForgetfulDisk, Door]:
    layouts = make_layouts(NUM_LAYERS, NUM_EXPERTS)
    disk = ForgetfulDisk(layouts, seed=3)
    pools = [make_pool(layouts, 8, TOP_K)]
    cache = ExpertCache(pools, layouts, disk, FakeArena(), EwmaPolicy, OffloadStats(), top_k=TOP_K)
    return cache, disk, Door(cache, disk)


def run_token(cache: ExpertCache, disk: SimulatedDisk, token: int) -> None:
    """Decode one token through all layers, with guesses right and wrong, and look at every byte."""
    for layer_idx in range(NUM_LAYERS):
        ids = sorted({(token + layer_idx) % NUM_EXPERTS, (3 * token + 1) % NUM_EXPERTS})
        cache.contradict(layer_idx, ids)
        step = cache.begin(layer_idx, ids)
        assert step is not None
        guesses = [ExpertKey((layer_idx + 1) % NUM_LAYERS, (token + i) % NUM_EXPERTS) for i in (1, 2)]
        cache.prefetch(guesses)
        for expert_id in ids:
            cache.wait(step, expert_id)
            address = cache.addresses(layer_idx, expert_id)[0]
            assert disk.contents[address] == (layer_idx, expert_id)
        cache.end(step)


def use_guesses(cache: ExpertCache, disk: SimulatedDisk) -> None:
    """Tell of a run that used guesses which had arrived, and after them residents that may have left."""
    (pool,) = cache._pools
    arrived = sorted(entry.key for entry in pool.unclaimed())[:TOP_K]
    later = sorted(key.expert_id for key in pool.residents if key.layer_idx == 1)
    steps = [(0, [key.expert_id for key in arrived], None), (1, later, None)]
    cache.used_in_run(steps, [tuple(key) for key in arrived])
    for key, entry in pool.residents.items():
        assert disk.contents[entry.addresses[0]] == key


def run_scenario(cache: ExpertCache, disk: SimulatedDisk, door: Door) -> None:
    for token in range(3):
        run_token(cache, disk, token)
        cache.finish_reads()
        door.run(-1)
        cache.finish_reads()
        use_guesses(cache, disk)
    for expert_id, addresses in cache.stream(0, list(range(NUM_EXPERTS))):
        assert disk.contents[addresses[0]] == (0, expert_id)
    run_token(cache, disk, 5)


def interrupt_at(line_number: int) -> Any:
    """Return a trace function that interrupts at the n-th line of the cache's code."""
    seen = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.endswith(CODE):
            return None
        if event == "line":
            seen += 1
            if seen == line_number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    return trace


def lines_in_order() -> list[tuple[str, int]]:
    """Return (file, line) of each step that the scenario takes in the cache's code."""
    cache, disk, door = make_cache()
    lines: list[tuple[str, int]] = []

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.endswith(CODE):
            return None
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        run_scenario(cache, disk, door)
    finally:
        sys.settrace(None)
    return lines


@pytest.mark.parametrize("times", [3, pytest.param(10**6, marks=pytest.mark.slow, id="each")])
def test_an_interrupt_at_any_line_is_recovered_from(times: int) -> None:
    """At every line that runs, the first ``times`` times that it does."""
    lines = lines_in_order()
    assert len(lines) > 500
    seen: Counter[tuple[str, int]] = Counter()
    interrupted = wanted = 0
    for line_number, line in enumerate(lines, start=1):
        seen[line] += 1
        if seen[line] > times:
            continue
        wanted += 1
        cache, disk, door = make_cache()
        sys.settrace(interrupt_at(line_number))
        try:
            run_scenario(cache, disk, door)
        except KeyboardInterrupt:
            interrupted += 1
            door.end()
        finally:
            sys.settrace(None)
        cache.recover()
        (pool,) = cache._pools
        assert pool.num_slots >= 8 - 1, "an interrupt loses one slot at most"
        cache.check()
        run_scenario(cache, disk, door)
        cache.check()
    assert interrupted == wanted > 200


@pytest.mark.parametrize("times", [1, 5])
def test_recovering_an_untouched_cache_keeps_its_residents(times: int) -> None:
    cache, disk, door = make_cache()
    run_scenario(cache, disk, door)
    residents = cache.residents()
    for _ in range(times):
        cache.recover()
    assert cache.residents() == residents
    cache.check()
