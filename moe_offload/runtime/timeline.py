"""What the CPU, the device and the link did when, in Chrome's trace format (chrome://tracing, Perfetto)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_offload.errors import ConfigError
from moe_offload.runtime.hybrid_layers import HybridLayers
from moe_offload.storage.expert_format import ExpertKey
from moe_offload.whole_file import whole_file, why_not

MOST_EVENTS = 1_000_000  # of the device; what comes later is left out
CPU, DEVICE, RETURN, LINK = 1, 2, 3, 4  # rows; copies that overlap take the rows from LINK on
COPY_LANE, ROWS_LANE = 0, 2  # csrc/device/event_log.h

Event = tuple[str, int, int, int, dict[str, Any]]  # name, row, begin and end in ns of perf_counter, arguments


@contextmanager
def recorded_timeline(layers: HybridLayers, path: Path) -> Iterator[None]:
    """Write what happens inside to ``path``.

    Raises:
        ConfigError: the file cannot be written.
    """
    if reason := why_not(path):
        raise ConfigError(f"timeline {path} {reason}")
    recorder = Recorder(layers)
    try:
        yield
    finally:
        _write(path, recorder.stop())


def _write(path: Path, events: Sequence[Event]) -> None:
    try:
        with whole_file(path, "w") as file:
            json.dump(as_chrome_trace(events), file)
    except OSError as error:
        raise ConfigError(f"timeline {path}: {error.strerror}; give a file that can be written") from error


class Recorder:
    """Watch the layers from now until ``stop``."""

    def __init__(self, layers: HybridLayers) -> None:
        self._layers, self._device = layers, layers.tier.device
        self._spans: list[Event] = []
        self._launches: dict[int, tuple[int, Sequence[int]]] = {}
        self._copies: dict[int, ExpertKey] = {}
        layers.span, layers.launched, layers.tier.source.log = self._span, self._launches, self._copies
        self._device.take_events()
        self._device.record_events(MOST_EVENTS)

    def _span(self, layer_idx: int, expert_ids: Sequence[int], begin_s: float, end_s: float) -> None:
        arguments = {"layer": layer_idx, "experts": list(expert_ids)}
        self._spans.append((f"layer {layer_idx}", CPU, int(begin_s * 1e9), int(end_s * 1e9), arguments))

    def stop(self) -> list[Event]:
        """Return the events, by row and time."""
        self._layers.span = self._layers.launched = self._layers.tier.source.log = None
        self._device.record_events(0)
        events = list(self._spans)
        rows_end: list[int] = []  # of the link: when each row's last copy ended
        for lane, ticket, amount, begin, end in sorted(self._device.take_events(), key=lambda e: e[3]):
            if lane == COPY_LANE:
                events.append(self._copy(rows_end, ticket, amount, begin, end))
            else:
                layer_idx, expert_ids = self._launches.get(ticket, (-1, []))
                arguments: dict[str, Any] = {"layer": layer_idx, "experts": list(expert_ids)}
                row, what = (RETURN, "bytes") if lane == ROWS_LANE else (DEVICE, "computed")
                events.append((f"layer {layer_idx}", row, begin, end, arguments | {what: amount}))
        return sorted(events, key=lambda event: event[1:3])

    def _copy(self, rows_end: list[int], ticket: int, num_bytes: int, begin: int, end: int) -> Event:
        free = [row for row, until in enumerate(rows_end) if until <= begin]
        row = free[0] if free else len(rows_end)
        rows_end[row : row + 1] = [end]
        key = self._copies.get(ticket)
        arguments: dict[str, Any] = {"bytes": num_bytes}
        if key is not None:
            arguments |= {"layer": key.layer_idx, "expert": key.expert_id}
        return ("copy" if key is None else f"layer {key.layer_idx}", LINK + row, begin, end, arguments)


def as_chrome_trace(events: Sequence[Event]) -> dict[str, Any]:
    """Return the trace's JSON object; times in microseconds from the first event."""
    start = min((begin for _, _, begin, _, _ in events), default=0)
    rows = sorted({CPU, DEVICE, RETURN, LINK, *(row for _, row, *_ in events)})
    names = {CPU: "CPU: experts", DEVICE: "device: experts", RETURN: "rows to the host"}
    trace: list[dict[str, Any]] = [
        {
            "name": "thread_name",
            "ph": "M",
            "pid": 1,
            "tid": row,
            "args": {"name": names.get(row, f"link: copies {row - LINK + 1}")},
        }
        for row in rows
    ]
    trace += [
        {
            "name": name,
            "ph": "X",
            "pid": 1,
            "tid": row,
            "ts": (begin - start) / 1000,
            "dur": (end - begin) / 1000,
            "args": arguments,
        }
        for name, row, begin, end, arguments in events
    ]
    return {"traceEvents": trace, "displayTimeUnit": "ms"}
