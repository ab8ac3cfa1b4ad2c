"""The arena: anonymous memory that costs what was touched."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest

from moe_offload._native import HUGE_PAGE_BYTES, NOT_FILLED, Arena
from moe_offload.errors import ConfigError
from moe_offload.residency.huge_pages import try_huge_page

PAGE = 4096


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_an_arena_costs_what_was_touched_and_gives_it_back() -> None:
    before = resident_bytes()
    arena = Arena(2**30)
    memory = (ctypes.c_uint8 * arena.num_bytes).from_address(arena.address)
    assert arena.address % PAGE == 0
    ctypes.memset(arena.address, 1, 64 * 2**20)
    touched = resident_bytes() - before
    assert 60 * 2**20 < touched < 72 * 2**20
    arena.give_back(PAGE // 2, 64 * 2**20 - PAGE)
    assert resident_bytes() - before < 8 * 2**20
    # Only whole pages went: the first and the last page were asked for by halves.
    assert (memory[0], memory[PAGE - 1], memory[PAGE]) == (1, 1, 0)
    assert (memory[64 * 2**20 - PAGE], memory[64 * 2**20 - PAGE - 1]) == (1, 0)
    del memory
    arena.close()


@pytest.mark.parametrize(
    ("offset", "num_bytes"), [(-1, 10), (0, -1), (0, 8193), (8193, 0), (4096, 2**63 - 1)]
)
def test_an_arena_gives_back_only_what_it_has(offset: int, num_bytes: int) -> None:
    arena = Arena(8192)
    with pytest.raises(ConfigError, match="are outside of its 8192 bytes"):
        arena.give_back(offset, num_bytes)


def huge_page_bytes(address: int) -> int:
    """Return how much of the mapping that holds ``address`` is in huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition("-")
        if rest and ":" not in first:
            inside = int(first, 16) <= address < int(rest.split()[0], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{address:#x} is not mapped")


def test_a_huge_page_is_made_of_pages_that_are_there_and_given_back_in_part() -> None:
    if reason := try_huge_page():
        pytest.skip(f"no huge pages here: {reason}")
    arena = Arena(3 * HUGE_PAGE_BYTES)
    offset = -arena.address % HUGE_PAGE_BYTES
    first = arena.address + offset
    memory = (ctypes.c_uint8 * HUGE_PAGE_BYTES).from_address(first)
    assert arena.gather(offset) == NOT_FILLED
    for page in range(0, HUGE_PAGE_BYTES, PAGE):
        memory[page] = page // PAGE % 251
        if page == HUGE_PAGE_BYTES // 2:
            assert arena.gather(offset) == NOT_FILLED  # a budget counts what was touched
    assert huge_page_bytes(first) == 0
    assert arena.gather(offset) == 0
    assert huge_page_bytes(first) == HUGE_PAGE_BYTES
    before = resident_bytes()
    arena.give_back(offset + HUGE_PAGE_BYTES // 2, HUGE_PAGE_BYTES)
    assert before - resident_bytes() > HUGE_PAGE_BYTES // 2 - 64 * PAGE
    half = HUGE_PAGE_BYTES // PAGE // 2
    assert [memory[n * PAGE] for n in range(2 * half)] == [n % 251 for n in range(half)] + [0] * half
    del memory
    with pytest.raises(ConfigError, match=r"Arena.gather: 2097152 bytes at 4194305 are outside"):
        arena.gather(2 * HUGE_PAGE_BYTES + 1)
    arena.close()


def test_a_closed_arena_has_no_address() -> None:
    arena = Arena(8192)
    arena.close()
    arena.close()
    with pytest.raises(ConfigError, match="closed"):
        _ = arena.address
    with pytest.raises(ConfigError, match="closed"):
        arena.give_back(0, 8192)
    for num_bytes in (0, -1):
        with pytest.raises(ConfigError, match=f"num_bytes must be positive, got {num_bytes}"):
            Arena(num_bytes)
