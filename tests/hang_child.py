"""A process whose disk never answers, for test_direct_read.py: ``hang_child.py SCENARIO FILE``.

It sends itself SIGINT from another thread while it waits, then closes everything and says so.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moe_offload.errors import ConfigError
from moe_offload.storage.expert_format import (
    ExpertIndex,
    ExpertKey,
    ExpertLayout,
    GgmlType,
    MatrixFormat,
    RowOrder,
    Span,
)
from moe_offload.storage.expert_store import ExpertStore
from moe_offload.storage.io import Arena, DirectReader

KEY = ExpertKey(0, 0)


def make_store(path: Path, reader: DirectReader) -> ExpertStore:
    matrix = MatrixFormat(GgmlType.F32, 32, 32)
    layout = ExpertLayout(0, 1, RowOrder.GATE_UP, (matrix, matrix))
    spans = (Span(0, 100, matrix.num_bytes), Span(0, 9000, matrix.num_bytes))
    return ExpertStore(ExpertIndex({0: layout}, {KEY: spans}), [path], reader)


def blocking_call(scenario: str, path: Path, reader: DirectReader, arena: Arena) -> Callable[[], object]:
    if scenario.startswith("store"):
        store = make_store(path, reader)
        if scenario == "store_read_into":
            return lambda: store.read_into(Span(0, 5, 100), arena.address)
        ticket = store.read(KEY, arena.address, speculative=False)
        return lambda: store.wait(ticket)
    file_id = reader.add_file(str(path))
    if scenario == "read_into":
        return lambda: reader.read_into(file_id, 5, 100, arena.address)
    ticket = reader.submit(np.array([[file_id, 5, 100, arena.address]]), False)
    return lambda: reader.wait(ticket, 1e9)


def interrupt(scenario: str, path: Path) -> None:
    first = threading.Thread(target=int)  # with a process's first thread ThreadSanitizer starts its own
    first.start()
    first.join()
    tasks, files = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    reader, arena = DirectReader(2, "direct"), Arena(1 << 20)
    reader.inject("hang")
    block = blocking_call(scenario, path, reader, arena)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        block()
    except KeyboardInterrupt:
        timer.join()
        reader.close()
        arena.close()
        deadline = time.monotonic() + 20
        while len(os.listdir("/proc/self/task")) > tasks:  # joined ones may stand there for a moment
            assert time.monotonic() < deadline, "a reader thread is left"
            time.sleep(0.001)
        assert len(os.listdir("/proc/self/fd")) == files, "a file is left open"
        print("interrupted, threads joined, files closed")


def fork(path: Path) -> None:
    reader = DirectReader(2, "direct")
    arena = Arena(1 << 20)
    file_id = reader.add_file(str(path))
    uses: list[Callable[[], object]] = [
        lambda: reader.submit(np.array([[file_id, 5, 100, arena.address]]), False),
        lambda: reader.add_file(str(path)),
        lambda: reader.read_into(file_id, 5, 100, arena.address),
        lambda: reader.counters(),
    ]
    child = os.fork()
    if child == 0:
        for use in uses:
            try:
                use()
            except ConfigError as error:
                os.write(1, f"{error}\n".encode())
            else:
                os._exit(1)
        reader.close()  # neither this nor the destructor may wait for threads that are not here
        del reader, uses
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    reader.close()


if __name__ == "__main__":
    scenario, path = sys.argv[1], Path(sys.argv[2])
    if scenario == "fork":
        fork(path)
    else:
        interrupt(scenario, path)
