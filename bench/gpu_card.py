"""What a card can do, for gpu.py: its ceilings, its kernels against them, their bits against the CPU's.

Every function yields rows (dicts) as they are known. The CUDA library is asked by ctypes, so that the times
are the card's own events, without Python.

    python bench/gpu_card.py ceilings|link|kernels|bits '{"device": "cuda", ...}'

prints a step's rows as JSON lines, so that a fault of the card ends no process but its own.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MIB = 1 << 20
# Rows and columns of Qwen3-30B-A3B's experts, gate and up fused, and down.
HIDDEN_SIZE, UNITS, TOP_K = 2048, 768, 8
PROMPT_EXPERTS, PROMPT_TOKENS = 128, 32  # a prompt of 512 tokens
TIMES = 21
FORMATS = (
    *("Q4_0", "Q8_0", "Q4_K", "Q6_K", "Q5_K", "MXFP4", "IQ4_XS", "Q2_K", "Q3_K"),
    *("Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "BF16", "F16", "F32", "F8_E4M3"),
)


class Measurement(ctypes.Structure):
    """``MatrixMeasurement`` of csrc/cuda/library.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("ggml_type", "is_gate_up", "num_experts", "pairs_per_expert")),
        *((name, ctypes.c_int32) for name in ("num_sets", "times")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "row_bytes")),
    )


class Card:
    """The measuring functions of the CUDA library, for card 0."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name in ("matrix", "memory", "link"):
            getattr(self.library, f"moe_offload_cuda_{name}_seconds").restype = ctypes.c_double

    def bytes_per_s(self, what: str, num_bytes: int) -> float:
        """Return the speed of a copy: "memory" counts bytes read and written, "link" bytes sent."""
        function = getattr(self.library, f"moe_offload_cuda_{what}_seconds")
        seconds = float(function(0, ctypes.c_int64(num_bytes)))
        if seconds <= 0:
            raise RuntimeError(f"the card refused a copy of {num_bytes} bytes")
        return num_bytes * (2 if what == "memory" else 1) / seconds

    def matrix_s(self, measurement: Measurement) -> float:
        seconds = float(self.library.moe_offload_cuda_matrix_seconds(0, ctypes.byref(measurement)))
        if seconds <= 0:
            raise RuntimeError("the card refused a launch")
        return seconds


def ceilings(card: Card) -> Iterator[dict[str, Any]]:
    """Yield what memory and link reach with nothing of ours in between."""
    yield {"what": "memory", "bytes_per_s": card.bytes_per_s("memory", 512 * MIB)}
    yield {"what": "link, pinned", "bytes_per_s": card.bytes_per_s("link", 256 * MIB)}


def kernels(
    card: Card, memory_bytes_per_s: float, l2_bytes: int, formats: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield GB/s of decoding launches (8 experts, 1 token each) and Tops of prompts (128 experts, 32 each).

    Decoding turns among sets of weights that together are four times the cache.
    """
    from moe_offload.storage.expert_format import row_bytes

    for name in formats:
        yield {"begins": name}
        ggml_type = type_named(name)
        for is_gate_up, rows, cols in ((1, UNITS, HIDDEN_SIZE), (0, HIDDEN_SIZE, UNITS)):
            width = row_bytes(ggml_type, cols)
            expert_bytes = width * rows * (1 + is_gate_up)
            sets = max(2, -(-4 * l2_bytes // (TOP_K * expert_bytes)))
            for phase, experts, pairs, num_sets in (
                ("decode", TOP_K, 1, sets),
                ("prefill", PROMPT_EXPERTS, PROMPT_TOKENS, 1),
            ):
                what = Measurement(
                    int(ggml_type), is_gate_up, experts, pairs, num_sets, 21, rows, cols, width
                )
                seconds = card.matrix_s(what)
                speed = experts * expert_bytes / seconds
                yield {
                    "format": name,
                    "matrix": "gate_up" if is_gate_up else "down",
                    "phase": phase,
                    "experts": experts,
                    "tokens_per_expert": pairs,
                    "seconds": seconds,
                    "bytes_per_s": speed,
                    "of_memory_peak": speed / (memory_bytes_per_s or float("inf")),
                    "operations_per_s": 2.0 * experts * pairs * rows * (1 + is_gate_up) * cols / seconds,
                }


def type_named(name: str) -> Any:
    """Return the weight type of a name, ggml's or our own."""
    from moe_offload.storage import expert_format

    is_own = name in expert_format.OwnType.__members__
    return (expert_format.OwnType if is_own else expert_format.GgmlType)[name]


def link_speed(device: Any, peak_bytes_per_s: float | None) -> Iterator[dict[str, Any]]:
    """Yield what the engine's copies reach by size of a demand, from pinned and from pageable memory."""
    source = np.ones(min(64 * MIB, device.num_bytes), np.uint8)
    largest = len(source)
    for kind in ("pageable", "pinned"):
        if kind == "pinned" and device.pin(source.ctypes.data, largest) < largest:
            yield {"from": kind, "status": "not run: the system does not pin as much"}
            return
        for size in (MIB // 4, MIB, 4 * MIB, 16 * MIB, 64 * MIB):
            if size > largest:
                continue
            seconds = best_copy_s(device, source, size, times=5 if size < 16 * MIB else 3)
            yield {
                "from": kind,
                "bytes": size,
                "bytes_per_s": size / seconds,
                "of_peak": None if peak_bytes_per_s is None else size / seconds / peak_bytes_per_s,
            }


def best_copy_s(device: Any, source: Any, size: int, times: int) -> float:
    """Return the quickest of some copies: what the engine costs, not what else the machine did."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        ticket = device.submit(np.array([[source.ctypes.data, device.address, size]], np.int64), False)
        assert device.wait(ticket, 60), "a copy took a minute"
        seconds.append(time.perf_counter() - begin)
        error = device.error(ticket)
        assert error is None, error
    return min(seconds)


def bits(device: Any, tokens: Sequence[int], formats: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield, for every format and number of tokens, whether the device's rows are the CPU's to the bit."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch
    from op_cases import ExpertCase
    from test_device_launches import OnDevice
    from test_expert_ops import Layer

    from moe_offload.expert_ops import ActivationKind
    from moe_offload.storage.expert_format import RowOrder

    for name in formats:
        yield {"begins": name}
        case = ExpertCase(name, RowOrder.SPLIT, (type_named(name),) * 3, ActivationKind.SILU, 512, 256)
        layer = Layer(case)
        if not device.has_kernel(layer.kernel().native):
            yield {"format": name, "same_bits": None, "status": "not run: no kernel"}
            continue
        for num_tokens in tokens:
            work = OnDevice(device, layer, num_tokens)
            launch = work.launch([work.copy(expert_id) for expert_id in work.ids])
            ours, expected = work.collect(launch).flip(0), work.cpu_rows()
            different = int((ours.view(torch.int32) != expected.view(torch.int32)).sum())
            yield {
                "format": name,
                "tokens": num_tokens,
                "same_bits": different == 0,
                "different": different,
                "of": ours.numel(),
            }


def open_device(name: str, num_bytes: int) -> Any:
    """Open an accelerator with so much memory for slots."""
    from moe_offload import _native, cuda

    if name.startswith("cuda"):
        return _native.CudaDevice(str(cuda.LIBRARY), 0, num_bytes)
    from moe_offload.config import parse_device
    from moe_offload.residency.accelerator import open_device

    choice = parse_device(device_text(name, num_bytes), None)
    assert choice is not None, name
    return open_device(choice, num_bytes)


def device_text(device: str, vram: int, dense: str = "off") -> str:
    """Return the device with this memory; ``dense``: whether dense layers go there."""
    if device.startswith("cuda"):
        return f"cuda:{device.partition(':')[2] or 0},dense={dense}"
    settings = [part for part in device.partition(":")[2].split(",") if part and not part.startswith("vram=")]
    return "emulated:" + ",".join([f"vram={vram}", *settings, f"dense={dense}"])


def rows_of(step: str, device: str = "cuda", **arguments: Any) -> Iterator[dict[str, Any]]:
    from moe_offload import cuda

    if step == "ceilings":
        yield from ceilings(Card(cuda.LIBRARY))
    elif step == "kernels":
        yield from kernels(Card(cuda.LIBRARY), **arguments)
    else:
        measure = {"bits": bits, "link": link_speed}[step]
        there = open_device(device, (16 if step == "bits" else 64) * MIB)
        try:
            yield from measure(there, **arguments)
        finally:
            there.close()


if __name__ == "__main__":
    for row in rows_of(sys.argv[1], **json.loads(sys.argv[2])):
        print(json.dumps(row), flush=True)
