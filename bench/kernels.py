"""How much of the memory's read bandwidth do the kernels use, and how fast do they multiply?

    python bench/kernels.py [--types Q4_0,Q4_K] [--isas avx2] [--threads 1,2] [--rounds 15] [--mib 512]

Decode: one token against matrices of 2048 columns, and against 8 experts of 2048 x 768 in one fused call
(weighted sum included). Each timing reads the next ``--slice-mib`` (8 experts) of a buffer of ``--mib`` MiB,
so that no cache holds them, and is divided by the best of five read tests of such slices, which run between
the kernels of the same round on the same threads. A timing during which the process did not get its cores
(CPU time below 90% of threads times elapsed time) is left out: other work on the machine, or a worker that
woke late. Before each timing the threads read 4 MiB, so that they are awake, as in the middle of a
decode step. Prefill: 32 and 512 tokens against 1024 rows, in 10^9 multiply-adds per second. Medians over the
rounds; the line of JSON has every undisturbed timing.
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
from moe_offload.expert_ops import Activation, ActivationKind, ExpertKernel
from moe_offload.storage.expert_format import ExpertLayout, GgmlType, MatrixFormat, RowOrder, row_bytes

COLS = 2048
NUM_EXPERTS, UNITS = 8, 768
LEAST_CPU_SHARE = 0.9
WARM_UP = np.ones(4 << 20, np.uint8)
PREFILL_TOKENS, PREFILL_ROWS = (32, 512), 1024
MIB = 1 << 20
READ_TESTS = 5  # per round
DEFAULT_TYPES = "Q4_0,Q8_0,Q4_K,Q6_K,MXFP4,BF16,F16,Q5_K,Q5_0,Q4_1,Q5_1,IQ4_NL,IQ4_XS,Q3_K,Q2_K"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", default=DEFAULT_TYPES)
    parser.add_argument("--isas", default=",".join(_native.available_isas()[1:]))
    parser.add_argument("--threads", default=f"1,{ops.num_threads()}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--slice-mib", type=int, default=32)
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
        return self.take(self.slice_bytes)

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return the next bytes; from the start again where too few are left."""
        start = self.position if self.position + num_bytes <= self.data.numel() else 0
        self.position = start + num_bytes
        return self.data[start : self.position]


def run(
    types: list[GgmlType], isas: list[str], num_threads: int, memory: Memory, rounds: int
) -> list[dict[str, object]]:
    """Measure every type and ISA once per round, read tests in between; return one row per pair."""
    cases = [(isa, ggml_type) for ggml_type in types for isa in isas]
    measured: dict[str, dict[tuple[str, GgmlType], list[float]]] = {
        name: {case: [] for case in cases}
        for name in ("linear", "experts", *(f"prefill {n}" for n in PREFILL_TOKENS))
    }
    shares: dict[str, dict[tuple[str, GgmlType], list[float]]] = {
        name: {case: [] for case in cases} for name in ("linear", "experts")
    }
    for _ in range(rounds):
        speeds: dict[str, dict[tuple[str, GgmlType], float | None]] = {"linear": {}, "experts": {}}
        reads = []
        for i, (isa, ggml_type) in enumerate(cases):
            while len(reads) * len(cases) <= i * READ_TESTS:
                data = memory.next_slice()
                wake_threads()
                reads.append(_native.read_bandwidth(data.data_ptr(), data.numel()))
            _native.force_isa(isa)
            speeds["linear"][isa, ggml_type] = decode_bytes_per_s(ggml_type, memory.next_slice())
            speeds["experts"][isa, ggml_type] = experts_bytes_per_s(ggml_type, memory)
            for num_tokens in PREFILL_TOKENS:
                macs = prefill_macs_per_s(ggml_type, memory.data, num_tokens)
                if macs is not None:
                    measured[f"prefill {num_tokens}"][isa, ggml_type].append(macs)
        for name, of_case in speeds.items():
            for case, speed in of_case.items():
                if speed is not None:
                    measured[name][case].append(speed)
                    shares[name][case].append(speed / max(reads))
    _native.force_isa("")
    return [
        {
            "type": ggml_type.name,
            "isa": isa,
            "threads": num_threads,
            "decode_bytes_per_s": rounded(measured["linear"][isa, ggml_type]),
            "share_of_read_bandwidth": rounded(shares["linear"][isa, ggml_type]),
            "experts_bytes_per_s": rounded(measured["experts"][isa, ggml_type]),
            "experts_share_of_read_bandwidth": rounded(shares["experts"][isa, ggml_type]),
        }
        | {
            f"prefill_{n}_macs_per_s": rounded(measured[f"prefill {n}"][isa, ggml_type])
            for n in PREFILL_TOKENS
        }
        for isa, ggml_type in cases
    ]


def rounded(values: list[float]) -> list[float]:
    """Return the values to four digits."""
    return [float(f"{value:.4g}") for value in values]


def decode_bytes_per_s(ggml_type: GgmlType, data: torch.Tensor) -> float | None:
    """Return bytes of weights per second for one token."""
    rows = data.numel() // row_bytes(ggml_type, COLS)
    weight = data[: rows * row_bytes(ggml_type, COLS)]
    x = torch.randn(1, COLS)
    return per_second(weight.numel(), lambda: ops.linear(x, weight, ggml_type, rows, COLS))


def experts_bytes_per_s(ggml_type: GgmlType, memory: Memory) -> float | None:
    """Return bytes of weights per second of one fused call: 8 experts, one token."""
    matrices = (MatrixFormat(ggml_type, 2 * UNITS, COLS), MatrixFormat(ggml_type, COLS, UNITS))
    gate_up_bytes, down_bytes = (m.rows * row_bytes(m.ggml_type, m.cols) for m in matrices)
    kernel = ExpertKernel(
        ExpertLayout(0, NUM_EXPERTS, RowOrder.GATE_UP, matrices), Activation(ActivationKind.SILU)
    )
    weights = memory.take(NUM_EXPERTS * (gate_up_bytes + down_bytes))
    first = weights.data_ptr() + np.arange(NUM_EXPERTS, dtype=np.uint64) * (gate_up_bytes + down_bytes)
    arguments = (
        torch.randn(1, COLS),
        np.arange(NUM_EXPERTS, dtype=np.int32),
        np.stack([first, first + gate_up_bytes], axis=1).astype(np.uint64),
        np.arange(NUM_EXPERTS + 1, dtype=np.int32),
        np.zeros(NUM_EXPERTS, np.int32),
        torch.ones(NUM_EXPERTS),
        torch.zeros(1, COLS),
    )
    return per_second(weights.numel(), lambda: kernel.sum(*arguments))


def prefill_macs_per_s(ggml_type: GgmlType, data: torch.Tensor, num_tokens: int) -> float | None:
    """Return multiply-adds per second."""
    weight = data[: PREFILL_ROWS * row_bytes(ggml_type, COLS)]
    x = torch.randn(num_tokens, COLS)
    amount = num_tokens * PREFILL_ROWS * COLS
    return per_second(amount, lambda: ops.linear(x, weight, ggml_type, PREFILL_ROWS, COLS))


def wake_threads() -> None:
    """Give the pool something to read."""
    _native.read_bandwidth(WARM_UP.ctypes.data, WARM_UP.nbytes)


def per_second(amount: int, function: Callable[[], object]) -> float | None:
    """Return ``amount`` over the time of one call; None if the threads did not have their cores."""
    wake_threads()
    cpu, start = time.process_time(), time.perf_counter()
    function()
    elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
    return amount / elapsed if cpu >= LEAST_CPU_SHARE * ops.num_threads() * elapsed else None


def report(results: list[dict[str, object]]) -> None:
    """Print the table."""
    print(
        "| type | ISA | threads | linear GB/s | of reads | experts GB/s | of reads "
        "| 32 tokens, GMAC/s | 512 tokens | n |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    names = [
        "decode_bytes_per_s",
        "experts_bytes_per_s",
        *(f"prefill_{n}_macs_per_s" for n in PREFILL_TOKENS),
    ]
    for row in results:
        columns = [row[name] for name in names]
        linear, experts, *prefill = (spread(values, 1e9, "") for values in columns)
        shares = [row["share_of_read_bandwidth"], row["experts_share_of_read_bandwidth"]]
        of_reads, experts_of_reads = (spread(values, 0.01, "%") for values in shares)
        counts = ", ".join(str(len(values)) for values in columns if isinstance(values, list))
        print(
            f"| {row['type']} | {row['isa']} | {row['threads']} | {linear} | {of_reads} | {experts} "
            f"| {experts_of_reads} | {' | '.join(prefill)} | {counts} |"
        )


def spread(values: object, unit: float, suffix: str) -> str:
    """Return "median (max)" in a unit, "null" where no timing was undisturbed."""
    assert isinstance(values, list)
    if not values:
        return "null"
    middle, high = statistics.median(values) / unit, max(values) / unit
    return f"{middle:.0f}{suffix} ({high:.0f}{suffix})" if suffix else f"{middle:.1f} ({high:.1f})"


if __name__ == "__main__":
    main()
