"""What the machine can do: how fast its memory and its disk are read."""

from __future__ import annotations

import os
import time
from typing import Any

from forced_tokens import say


def run_bandwidth(spec: dict[str, Any]) -> None:
    """Say how fast memory is read by the threads, and the disk in pieces of an expert's matrices."""
    import numpy as np

    from moe_offload import _native, ops

    ops.set_num_threads(spec["threads"])
    data = np.ones(spec["ram_test_bytes"], np.uint8)
    rates = [_native.read_bandwidth(data.ctypes.data, data.nbytes) for _ in range(6)][1:]
    del data
    say(ram_bytes_per_s=max(rates), ram_rates=rates)
    rates = disk_rates(spec["model"], spec["disk_test_s"])
    say(disk_bytes_per_s=max(rates), disk_rates=rates)


def disk_rates(path: str, seconds: float) -> list[float]:
    """Return bytes per second in three windows: an expert's matrices in random order, O_DIRECT, 4 threads."""
    import mmap
    import random
    import threading

    from moe_offload.storage.checkpoint import open_checkpoint

    page = 4096
    spans = [span for expert in open_checkpoint(path).experts.spans.values() for span in expert]
    windows = [
        (span.offset // page * page, -(-(span.offset + span.num_bytes) // page) * page) for span in spans
    ]
    random.Random(0).shuffle(windows)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    done = [0] * 4
    stop = threading.Event()

    def read(thread: int) -> None:
        buffer = mmap.mmap(-1, max(end - start for start, end in windows))
        index = thread
        while not stop.is_set():
            start, end = windows[index % len(windows)]
            done[thread] += os.preadv(fd, [memoryview(buffer)[: end - start]], start)
            index += len(done)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(done))]
    for thread in threads:
        thread.start()
    rates = []
    for _ in range(3):
        before, began = sum(done), time.perf_counter()
        time.sleep(seconds / 3)
        rates.append((sum(done) - before) / (time.perf_counter() - began))
    stop.set()
    for thread in threads:
        thread.join()
    os.close(fd)
    return rates
