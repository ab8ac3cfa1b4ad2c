"""Quantize the experts of a folder as another process would.

argv: folder, then seconds to sleep per matrix or a file to wait for.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from moe_offload.storage import quantize_file
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.quantize import quantize_once
from moe_offload.storage.quantize_plan import plan_quantization


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    quantize_rows, pause = quantize_file.quantize_rows, sys.argv[2]

    def slow(values, ggml_type):
        if pause[0].isdigit():
            time.sleep(float(pause))
        else:
            while not Path(pause).exists():
                time.sleep(0.01)
        return quantize_rows(values, ggml_type)

    quantize_file.quantize_rows = slow
    plan = plan_quantization(open_checkpoint(sys.argv[1]), "q8_0", {})
    print("begin", flush=True)
    checkpoint = quantize_once(plan, say=say, num_threads=lambda: 1)
    print(f"done {checkpoint.files[-1]}", flush=True)


if __name__ == "__main__":
    main()
