"""What a decode step and a prompt's chunk cost on a model's own experts: for `plan` on this machine.

The code that the runtime runs, on experts of the checkpoint in memory and on its file, in about a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from moe_offload import ops
from moe_offload.config import PREFILL_CHUNK_TOKENS
from moe_offload.expert_bench import ExpertBench, expert_bench
from moe_offload.header_costs import dense_read_bytes, multiplied_bytes_by_type
from moe_offload.measure import COLS, WEIGHTS_BYTES, disk_bytes_per_s, kernel_bytes_per_s, random_weights
from moe_offload.planning.roofline import MachineSpeed
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.expert_format import ExpertLayout, WeightType, row_bytes

SHARE_S = 0.15  # for each measurement
LEAST_RUNS = 3
CHUNK_TOKENS, CHUNK_ROWS = 128, 1024  # of a dense product: enough tokens that its time grows with them

Loaded = list[NDArray[np.uint64]]  # of each expert in memory, its matrices' addresses


def measure_steps(checkpoint: Checkpoint) -> MachineSpeed:
    """Measure the machine at the checkpoint's formats, sizes and numbers of tokens; overheads are left 0."""
    dense_type = next(iter(multiplied_bytes_by_type(checkpoint)))
    weights = random_weights(min(WEIGHTS_BYTES, dense_read_bytes(checkpoint)))
    ram_bytes_per_s = kernel_bytes_per_s(dense_type, weights)
    dense_macs_per_s = _dense_macs_per_s(dense_type, weights)
    if not checkpoint.experts.layouts:
        return MachineSpeed(ram_bytes_per_s, ram_bytes_per_s, dense_macs_per_s)
    layout = next(iter(checkpoint.experts.layouts.values()))
    top_k = min(checkpoint.spec.top_k, layout.num_experts)
    tokens = max(1, PREFILL_CHUNK_TOKENS * top_k // layout.num_experts)
    disk = disk_bytes_per_s(checkpoint)
    with expert_bench(checkpoint) as bench:
        latency_s = _median_s(lambda: _read_one(bench))
        loaded = bench.load(layout, bench.num_slots)
        return MachineSpeed(
            ram_bytes_per_s=ram_bytes_per_s,
            disk_bytes_per_s=disk,
            macs_per_s=dense_macs_per_s,
            expert_bytes_per_s=top_k * layout.expert_bytes / _step_s(layout, loaded, top_k),
            expert_macs_per_s=tokens * _macs(layout) / _rows_s(layout, loaded, tokens),
            disk_latency_s=max(0.0, latency_s - layout.expert_bytes / disk),
        )


def _macs(layout: ExpertLayout) -> int:
    return sum(matrix.rows * matrix.cols for matrix in layout.matrices)


def _dense_macs_per_s(ggml_type: WeightType, weights: torch.Tensor) -> float:
    """Return multiply-adds per second of a chunk's product with a dense matrix."""
    rows = min(CHUNK_ROWS, weights.numel() // row_bytes(ggml_type, COLS))
    packed, x = weights[: rows * row_bytes(ggml_type, COLS)], torch.randn(CHUNK_TOKENS, COLS)
    seconds = _median_s(lambda: ops.linear(x, packed, ggml_type, rows, COLS))
    return CHUNK_TOKENS * rows * COLS / seconds


def _read_one(bench: ExpertBench) -> None:
    bench.store.wait(bench.store.read(bench.next_key(), bench.slot(0), speculative=False))


def _step_s(layout: ExpertLayout, loaded: Loaded, top_k: int) -> float:
    """Return seconds of one token's experts of one layer, others each time."""
    kernel = ops.ExpertKernel(layout, ops.Activation())
    hidden, out = torch.randn(1, layout.hidden_size), torch.zeros(1, layout.hidden_size)
    ids, offsets = np.arange(top_k, dtype=np.int32), np.arange(top_k + 1, dtype=np.int32)
    tokens, weights = np.zeros(top_k, np.int32), torch.full((top_k,), 1 / top_k)
    turn = 0

    def step() -> None:
        nonlocal turn
        turn += 1
        addresses = np.concatenate([loaded[(turn * top_k + i) % len(loaded)] for i in range(top_k)])
        kernel.sum(hidden, ids, addresses, offsets, tokens, weights, out)

    return _median_s(step)


def _rows_s(layout: ExpertLayout, loaded: Loaded, num_tokens: int) -> float:
    """Return seconds of one expert for ``num_tokens`` tokens, another expert each time."""
    kernel = ops.ExpertKernel(layout, ops.Activation())
    hidden, tokens = torch.randn(num_tokens, layout.hidden_size), np.arange(num_tokens, dtype=np.int32)
    turn = 0

    def rows() -> None:
        nonlocal turn
        turn += 1
        offsets = np.array([0, num_tokens], np.int32)
        kernel.rows(hidden, np.zeros(1, np.int32), loaded[turn % len(loaded)], offsets, tokens)

    return _median_s(rows)


def _median_s(function: Callable[[], object]) -> float:
    """Return the median seconds of a call, the first left out, within ``SHARE_S``."""
    function()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < LEAST_RUNS or time.perf_counter() - started < SHARE_S:
        before = time.perf_counter()
        function()
        times.append(time.perf_counter() - before)
    return statistics.median(times)
