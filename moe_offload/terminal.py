"""What a person sees on stderr while a command runs: progress, the last line, sizes in words."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TextIO

from moe_offload.config import GIB, gib

FIRST_SHOWN_S = 1.0  # steps that are done by then show nothing
REDRAW_S = 0.2
CLEAR_LINE = "\r\x1b[K"


def gigabytes(num_bytes: float) -> str:
    """Return what was read as "1.9 GB", decimal as disks are; small amounts in MB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def seconds(duration_s: float) -> str:
    """Return "3.1 s", "2 min 05 s" or "1 h 02 min"."""
    if duration_s < 60:
        return f"{duration_s:.1f} s"
    minutes, rest_s = divmod(round(duration_s), 60)
    return f"{minutes} min {rest_s:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """One line on a terminal that is redrawn while a step runs, and removed when it ends.

    Shown after a second, so that short steps stay silent; never when ``stream`` is no terminal. A
    thread redraws it: a step that waits (an import, a slow disk) is seen to be alive.
    """

    def __init__(self, label: str, stream: TextIO, show_amount: Callable[[float], str] | None = None) -> None:
        self._label, self._stream, self._show_amount = label, stream, show_amount
        self._done = self._total = 0.0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._started = time.perf_counter()
        self._drawn = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def update(self, done: float, total: float) -> None:
        """Note how far the step is; called from the step, as often as it likes."""
        self._done, self._total = done, total

    def step(self, label: str) -> Callable[[float, float], None]:
        """Return an ``update`` that shows ``label`` from its first call on, timed from there."""

        def update(done: float, total: float) -> None:
            if self._label != label:
                self._label, self._started = label, time.perf_counter()
            self.update(done, total)

        return update

    def end(self) -> None:
        """Remove the line and join the thread. Idempotent."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            if self._drawn:
                self._drawn = False
                self._stream.write(CLEAR_LINE)
                self._stream.flush()

    def line(self, elapsed_s: float) -> str:
        """Return the line: label, amounts, and how long it will take at the pace so far."""
        parts = [self._label]
        if self._total and self._show_amount is not None:
            parts.append(f"{self._show_amount(self._done)} of {self._show_amount(self._total)}")
        if 0 < self._done < self._total:
            parts.append(f"{seconds(elapsed_s / self._done * (self._total - self._done))} left")
        else:
            parts.append(seconds(elapsed_s))
        return " · ".join(parts)

    def _run(self) -> None:
        wait_s = FIRST_SHOWN_S
        while not self._ended.wait(wait_s):
            wait_s = REDRAW_S
            with self._lock:
                self._drawn = True
                self._stream.write(CLEAR_LINE + self.line(time.perf_counter() - self._started))
                self._stream.flush()


def last_line(
    *,
    prompt_tokens: int,
    prefill_s: float,
    new_tokens: int,
    decode_s: float,
    tokens_per_s: float | None,
    hit_rate: float | None,
    bytes_read: int,
    peak_bytes: int,
    ram_bytes: int,
) -> str:
    """Return the line that ends a run: times, rate, hits, what was read, peak memory of the budget."""
    rate = f" {tokens_per_s:.1f} tok/s" if tokens_per_s is not None else ""
    parts = [
        f"prompt {prompt_tokens} tok {seconds(prefill_s)}",
        f"{new_tokens} tok {seconds(decode_s)}{rate}",
        *([f"hit {hit_rate:.0%}".replace("%", " %")] if hit_rate is not None else []),
        f"read {gigabytes(bytes_read)}",
        f"peak {peak_bytes / GIB:.2f} of {gib(ram_bytes)}",
    ]
    return " · ".join(parts)
