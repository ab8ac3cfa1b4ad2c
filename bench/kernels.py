"""How much of the memory's read bandwidth do the kernels use, and how fast do they multiply?

    python bench/kernels.py [--types Q4_0,Q4_K] [--isas avx2] [--threads 1,2] [--rounds 15] [--mib 256]

Decode: one token against matrices of 2048 columns. Each timing reads the next ``--slice-mib`` of a
buffer of ``--mib`` MiB, so that no cache holds them, and is divided by the best of five read tests of
such slices, which run between the kernels of the same round on the same threads. Slices are short so
that other work on the machine spares some of them: compare ratios, and look at the spread.
Prefill: 32 tokens against 1024 rows, in 10^9 multiply-adds per second. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from card import commit, cpu_name

from moe_offload import _native, ops
from moe_offload.storage.expert_format import GgmlType, row_bytes

COLS = 2048
PREFILL_TOKENS, PREFILL_ROWS = 32, 1024
MIB = 1 << 20
READ_TESTS = 5  # per round
DEFAULT_TYPES = "Q4_0,Q8_0,Q4_K,Q6_K,MXFP4,BF16,F16,Q5_K,Q5_0,IQ4_NL,IQ4_XS,Q3_K,Q2_K"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", default=DEFAULT_TYPES)
    parser.add_argument("--isas", default=",".join(_native.available_isas()[1:]))
    parser.add_argument("--threads", default=f"1,{ops.num_threads()}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--slice-mib", type=int, default=16)
    args = parser.parse_args()

    types = [GgmlType[name] for name in args.types.split(",")]
    memory = Memory(args.mib * MIB, args.slice_mib * MIB)
    print(
        f"{cpu_name()}, {os.cpu_count()} cores seen, {args.rounds} interleaved rounds, slices of "
        f"{args.slice_mib} MiB out of {args.mib} MiB, {COLS} columns, commit {commit()}\n"
    )
    results = []
    for num_threads in sorted({int(n) for n in args.threads.split(",")}):
        ops.set_num_threads(num_threads)
        results += run(types, args.isas.split(","), num_threads, memory, args.rounds)
    report(results)
    print(json.dumps({"bench": "kernels", "machine": cpu_name(), "commit": commit(), "results": results}))


class Memory:
    """Random bytes, given out slice by slice."""

    def __init__(self, num_bytes: int, slice_bytes: int) -> None:
        rng = np.random.default_rng(0)
        self.data = torch.from_numpy(rng.integers(0, 256, num_bytes // slice_bytes * slice_bytes, np.uint8))
        self.slice_bytes = slice_bytes
        self.position = 0

    def next_slice(self) -> torch.Tensor:
        """Return the slice that was used longest ago."""
        start, self.position = self.position, (self.position + self.slice_bytes) % self.data.numel()
        return self.data[start : start + self.slice_bytes]


def run(
    types: list[GgmlType], isas: list[str], num_threads: int, memory: Memory, rounds: int
) -> list[dict[str, object]]:
    """Measure every type and ISA once per round, read tests in between; return one row per pair."""
    cases = [(isa, ggml_type) for ggml_type in types for isa in isas]
    decode: dict[tuple[str, GgmlType], list[float]] = {case: [] for case in cases}
    shares: dict[tuple[str, GgmlType], list[float]] = {case: [] for case in cases}
    prefill: dict[tuple[str, GgmlType], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        speeds: dict[tuple[str, GgmlType], float] = {}
        reads = []
        for i, (isa, ggml_type) in enumerate(cases):
            if i * READ_TESTS // len(cases) >= len(reads):
                data = memory.next_slice()
                reads.append(_native.read_bandwidth(data.data_ptr(), data.numel()))
            _native.force_isa(isa)
            speeds[isa, ggml_type] = decode_bytes_per_s(ggml_type, memory.next_slice())
            prefill[isa, ggml_type].append(prefill_macs_per_s(ggml_type, memory.data))
        for case, speed in speeds.items():
            decode[case].append(speed)
            shares[case].append(speed / max(reads))
    _native.force_isa("")
    return [
        {
            "type": ggml_type.name,
            "isa": isa,
            "threads": num_threads,
            "decode_bytes_per_s": decode[isa, ggml_type],
            "share_of_read_bandwidth": shares[isa, ggml_type],
            "prefill_macs_per_s": prefill[isa, ggml_type],
        }
        for isa, ggml_type in cases
    ]


def decode_bytes_per_s(ggml_type: GgmlType, data: torch.Tensor) -> float:
    """Return bytes of weights per second for one token."""
    rows = data.numel() // row_bytes(ggml_type, COLS)
    weight = data[: rows * row_bytes(ggml_type, COLS)]
    x = torch.randn(1, COLS)
    return weight.numel() / seconds(lambda: ops.linear(x, weight, ggml_type, rows, COLS))


def prefill_macs_per_s(ggml_type: GgmlType, data: torch.Tensor) -> float:
    """Return multiply-adds per second for 32 tokens."""
    weight = data[: PREFILL_ROWS * row_bytes(ggml_type, COLS)]
    x = torch.randn(PREFILL_TOKENS, COLS)
    elapsed = seconds(lambda: ops.linear(x, weight, ggml_type, PREFILL_ROWS, COLS))
    return PREFILL_TOKENS * PREFILL_ROWS * COLS / elapsed


def seconds(function: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def report(results: list[dict[str, object]]) -> None:
    """Print the table."""
    print("| type | ISA | threads | decode GB/s (min–max) | of reads (best) | prefill GMAC/s (min–max) |")
    print("|---|---|---|---|---|---|")
    for row in results:
        shares = row["share_of_read_bandwidth"]
        assert isinstance(shares, list)
        print(
            f"| {row['type']} | {row['isa']} | {row['threads']} | {spread(row['decode_bytes_per_s'])} "
            f"| {statistics.median(shares):.0%} ({max(shares):.0%}) | {spread(row['prefill_macs_per_s'])} |"
        )


def spread(values: object) -> str:
    """Return "median (min–max)" in units of 10^9."""
    assert isinstance(values, list)
    low, middle, high = (f(values) / 1e9 for f in (min, statistics.median, max))
    return f"{middle:.1f} ({low:.1f}–{high:.1f})"


if __name__ == "__main__":
    main()
