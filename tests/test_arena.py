"""The arena: anonymous memory that costs what was touched."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest

from moe_offload._native import Arena
from moe_offload.errors import ConfigError

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
