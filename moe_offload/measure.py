"""What this machine gives to a model's own formats and sizes, measured within two seconds at most.

Three figures, each on the code that the runtime will run: the decode kernel on bytes that no cache
holds, the prompt kernel, and the reader on the model's own experts, several in flight.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import torch

from moe_offload import ops
from moe_offload.config import MIB
from moe_offload.planning.machine_speed import MachineSpeed
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.expert_format import ExpertKey, WeightType, row_bytes
from moe_offload.storage.expert_store import ExpertStore
from moe_offload.storage.io import Arena, open_reader

COLS = 2048  # columns of the matrices that are multiplied: every block size divides it
WEIGHTS_BYTES = 192 * MIB  # beyond the last-level cache of the machines this is for
PROMPT_TOKENS, PROMPT_ROWS = 32, 4096
READS_IN_FLIGHT = 8
DISK_BYTES = 192 * MIB
MOST_DISK_S = 0.75  # a slow disk has shown that by then
KERNEL_ROUNDS, MOST_ROUND_S = 3, 0.15


def measure_machine(checkpoint: Checkpoint, weights_bytes: int = WEIGHTS_BYTES) -> MachineSpeed:
    """Measure RAM, multiplication and disk with the format and the expert size of ``checkpoint``.

    Args:
        weights_bytes: memory that may be taken meanwhile.
    """
    ggml_type = main_format(checkpoint)
    weights = random_weights(weights_bytes)
    return MachineSpeed(
        ram_bytes_per_s=kernel_bytes_per_s(ggml_type, weights),
        disk_bytes_per_s=disk_bytes_per_s(checkpoint),
        macs_per_s=macs_per_s(ggml_type, weights),
    )


def random_weights(num_bytes: int) -> torch.Tensor:
    """Return uint8 bytes: a MiB of random ones, again and again, since making them all takes long."""
    pattern = torch.from_numpy(np.random.default_rng(0).integers(0, 256, MIB, np.uint8))
    return pattern.repeat(max(1, num_bytes // MIB))


def main_format(checkpoint: Checkpoint) -> WeightType:
    """Return the format that most of the checkpoint's bytes have."""
    return next(iter(checkpoint.bytes_by_type()))


def kernel_bytes_per_s(
    ggml_type: WeightType,
    weights: torch.Tensor,
    timed: Callable[[Callable[[], object]], float] | None = None,
) -> float:
    """Return bytes of weights per second of one token's matrix product.

    Args:
        weights: uint8, random bytes, more of them than any cache holds.
        timed: the seconds of a call; None: the best of a few rounds.
    """
    rows = weights.numel() // row_bytes(ggml_type, COLS)
    packed = weights[: rows * row_bytes(ggml_type, COLS)]
    x = torch.randn(1, COLS)
    return packed.numel() / (timed or _best_s)(lambda: ops.linear(x, packed, ggml_type, rows, COLS))


def macs_per_s(ggml_type: WeightType, weights: torch.Tensor) -> float:
    """Return multiply-adds per second of a prompt's matrix product."""
    rows = min(PROMPT_ROWS, weights.numel() // row_bytes(ggml_type, COLS))
    packed = weights[: rows * row_bytes(ggml_type, COLS)]
    x = torch.randn(PROMPT_TOKENS, COLS)
    elapsed_s = _best_s(lambda: ops.linear(x, packed, ggml_type, rows, COLS))
    return PROMPT_TOKENS * rows * COLS / elapsed_s


def _best_s(function: Callable[[], object]) -> float:
    first_s = _seconds(function)  # pages, threads
    if first_s > MOST_ROUND_S:
        return first_s
    return min(_seconds(function) for _ in range(KERNEL_ROUNDS))


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def disk_bytes_per_s(checkpoint: Checkpoint) -> float:
    """Return bytes per second of reading random experts into slots, ``READS_IN_FLIGHT`` at a time.

    A small model is read more than once; in buffered mode (MOE_OFFLOAD_IO) its pages may be in the
    page cache then, which is what the runtime would find, too.
    """
    keys = list(checkpoint.experts.spans)
    random.Random(0).shuffle(keys)
    slot_bytes = max(layout.slot_bytes for layout in checkpoint.experts.layouts.values())
    arena = Arena(READS_IN_FLIGHT * slot_bytes)
    store = ExpertStore(checkpoint.experts, checkpoint.files, open_reader())
    try:
        return _read_experts(store, arena, slot_bytes, keys)
    finally:
        store.close()
        arena.close()


def _read_experts(store: ExpertStore, arena: Arena, slot_bytes: int, keys: list[ExpertKey]) -> float:
    tickets: list[int] = []
    num_bytes, started = 0, time.perf_counter()
    for position in range(max(READS_IN_FLIGHT, DISK_BYTES // slot_bytes)):
        if len(tickets) == READS_IN_FLIGHT:
            store.wait(tickets.pop(0))
        key = keys[position % len(keys)]
        slot = arena.address + position % READS_IN_FLIGHT * slot_bytes
        tickets.append(store.read(key, slot, speculative=False))
        num_bytes += store.expert_bytes(key)
        if time.perf_counter() - started > MOST_DISK_S:
            break
    for ticket in tickets:
        store.wait(ticket)
    return num_bytes / (time.perf_counter() - started)
