"""Huge pages under the slots that experts are read into, made of small ones while a text is generated.

A direct read into scattered pages of 4 KiB costs whoever asks for it two to three times what it costs into a
huge page, and the disk half as long again. Huge pages from the first touch on would hold up the first
prompt where a host has to find them, so they are made later, a few at a time, where the next reads will go.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from moe_offload.residency.memory import ROOT
from moe_offload.storage.io import HUGE_PAGE_BYTES, NOT_FILLED, Arena

TIME_SHARE = 0.02  # of decoding
MOST_SAVED_S = 0.01  # of that share, for later
LOOK_EVERY_S = 4e-4  # of that share, where the last look at the free slots found no place
MOST_TRIES = 8  # at one place
MOST_REFUSALS = 8  # one after the other


class GatheringMemory(Protocol):
    """Page-aligned memory (storage/io.py: Arena)."""

    @property
    def address(self) -> int:
        """First byte."""

    @property
    def num_bytes(self) -> int:
        """Length."""

    def gather(self, offset: int) -> int:
        """Make one huge page from ``offset`` on; 0, NOT_FILLED or an errno."""


class HugePages:
    """Makes huge pages of ``arena`` in a small share of the time that decoding takes.

    Args:
        next_slots: yields (address, bytes) of what experts will be read into next, the next one first.

    Attributes:
        num_made: so far.
        why_not: why no more are made; empty as long as they are.
    """

    def __init__(
        self,
        arena: GatheringMemory,
        next_slots: Callable[[], Iterable[tuple[int, int]]],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._arena, self._next_slots, self._clock = arena, next_slots, clock
        self._allowed_s = 0.0  # negative: the last one took longer
        self._rest_s = 0.0  # of that share, before the next look
        self._tries: dict[int, int] = {}  # by place: what is left of them; 0: made, or given up
        self._refusals = 0
        self.num_made, self.why_not = 0, ""

    def step_done(self, seconds: float) -> float:
        """Make some after ``seconds`` of decoding, while their share lasts; return the seconds it took."""
        self._allowed_s = min(self._allowed_s + TIME_SHARE * seconds, MOST_SAVED_S)
        self._rest_s -= TIME_SHARE * seconds
        if self._allowed_s <= 0 or self._rest_s > 0 or self.why_not:
            return 0.0
        started = now = self._clock()
        self._rest_s = LOOK_EVERY_S  # unless there is a place
        for place in self._places():
            self._rest_s = 0.0
            self._make(place)
            now = self._clock()
            if now - started >= self._allowed_s or self.why_not:
                break
        self._allowed_s -= now - started
        return now - started

    def _places(self) -> Iterator[int]:
        """Yield where huge pages are left to be made, wholly within the arena, under free slots."""
        size, arena = HUGE_PAGE_BYTES, self._arena
        begin = -(-arena.address // size) * size
        end = (arena.address + arena.num_bytes) // size * size
        for address, num_bytes in self._next_slots():
            for place in range(max(address // size * size, begin), min(address + num_bytes, end), size):
                if self._tries.get(place, MOST_TRIES):
                    yield place

    def _make(self, place: int) -> None:
        answer = self._arena.gather(place - self._arena.address)
        if answer == NOT_FILLED:
            return
        self._tries[place] = 0 if answer == 0 else self._tries.get(place, MOST_TRIES) - 1
        self._refusals = 0 if answer in (0, errno.EAGAIN) else self._refusals + 1
        self.num_made += answer == 0
        if self._refusals == MOST_REFUSALS:
            self.why_not = f"the system refuses them: {os.strerror(answer)}"


def why_no_huge_pages(root: Path = ROOT) -> str:
    """Say why the system has no huge pages for us; empty where it may have some."""
    switch = root / "sys/kernel/mm/transparent_hugepage/enabled"
    if not switch.exists():
        return "this kernel has none"
    return f"{switch} says never" if "[never]" in switch.read_text() else ""


def try_huge_page() -> str:
    """Make one; return why there is none, empty where that went well."""
    arena = Arena(2 * HUGE_PAGE_BYTES)
    try:
        offset = -arena.address % HUGE_PAGE_BYTES
        ctypes.memset(arena.address + offset, 0, HUGE_PAGE_BYTES)
        answer = arena.gather(offset)
        return why_no_huge_pages() or (os.strerror(answer) if answer else "")
    finally:
        arena.close()
