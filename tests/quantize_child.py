"""Quantize the experts of a folder as another process would; argv: folder, seconds to sleep per matrix."""

from __future__ import annotations

import sys
import time

from moe_offload.storage import quantize_file
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.quantize import quantize_once
from moe_offload.storage.quantize_plan import plan_quantization


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    quantize_rows, pause_s = quantize_file.quantize_rows, float(sys.argv[2])

    def slow(values, ggml_type):
        time.sleep(pause_s)
        return quantize_rows(values, ggml_type)

    quantize_file.quantize_rows = slow
    plan = plan_quantization(open_checkpoint(sys.argv[1]), "q8_0", {})
    print("begin", flush=True)
    checkpoint = quantize_once(plan, say=say, num_threads=lambda: 1)
    print(f"done {checkpoint.files[-1]}", flush=True)


if __name__ == "__main__":
    main()
