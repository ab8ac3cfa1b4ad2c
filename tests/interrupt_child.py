"""A process whose disk stops answering, for test_cli.py: ``interrupt_child.py CHECKPOINT``.

Runs `moe-offload generate` once per scenario, lets every read hang from some point on, sends itself
SIGINT while the command waits, and prints what came of it: one JSON line per scenario.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
from typing import Any

from moe_offload import cli, cli_session
from moe_offload.runtime import loading
from moe_offload.runtime import model as model_module
from moe_offload.storage.io import DirectReader, open_reader


def hang_and_interrupt(reader: DirectReader) -> None:
    reader.inject("hang")
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()


class Scenario:
    """Replaces the seams of the command so that reads hang during ``when``."""

    def __init__(self, when: str) -> None:
        self.when = when
        self.readers: list[DirectReader] = []

    def open_reader(self) -> DirectReader:
        self.readers.append(open_reader())
        if self.when == "load":
            hang_and_interrupt(self.readers[-1])
        return self.readers[-1]

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        model = from_pretrained(*args, **kwargs)
        if self.when == "prefill":
            hang_and_interrupt(self.readers[-1])
        return model

    def print_piece(self, piece: str) -> None:
        print_piece(piece)
        if self.when == "decode":
            self.when = "hanging"
            hang_and_interrupt(self.readers[-1])

    def run(self, checkpoint: str) -> dict[str, Any]:
        loading.open_reader = self.open_reader
        model_module.from_pretrained = self.from_pretrained
        cli_session.print_piece = self.print_piece
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(
                ["generate", "--model", checkpoint, "--raw", "--prompt", "a" * 40, "--experts", "2",
                 "--no-prefetch", "--max-new-tokens", "200"]
            )  # fmt: skip
        return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


from_pretrained, print_piece = model_module.from_pretrained, cli_session.print_piece


def files_open() -> int:
    return len(os.listdir("/proc/self/fd"))


if __name__ == "__main__":
    Scenario("never").run(sys.argv[1])  # what a first run opens for good (a locale, /dev/null) is open now
    before = files_open()
    for when in ("load", "prefill", "decode"):
        result = Scenario(when).run(sys.argv[1])
        left = [thread.name for thread in threading.enumerate() if not isinstance(thread, threading.Timer)]
        print(
            json.dumps({"when": when, **result, "threads": left, "files": files_open() - before}), flush=True
        )
