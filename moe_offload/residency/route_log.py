"""What the routers chose lately, in a bounded buffer: for the distance to Belady and the next start.

Events are kept as the cache saw them. Chunks of them are packed, and the oldest chunks are dropped; each one
knows who was resident when it began, so that what is left can be replayed from there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.storage.expert_format import ExpertKey

ROUTE_LOG_BYTES = 1 << 20
CHUNK_EVENTS = 1024
HEAT_KEPT = 0.98  # of an expert's heat, from chunk to chunk

LoggedEvent = tuple[int, Sequence[int], Sequence[int] | None]  # layer, expert ids, tokens of each of a stream


@dataclass(frozen=True, slots=True)
class _Chunk:
    """``numbers``: per event layer, count, ids, and whether token counts follow, which then do."""

    numbers: NDArray[np.uint16]
    residents: NDArray[np.uint16]  # (n, 2)
    hits: int  # of the cache, when the chunk began
    needs: int

    @property
    def num_bytes(self) -> int:
        return self.numbers.nbytes + self.residents.nbytes


class RouteLog:
    """The last events, at most ``max_bytes`` of them, and every expert's heat.

    Args:
        residents: who is resident now.
        counters: (hits on residents, needs) of decode steps so far.
        num_experts: by layer index.
    """

    def __init__(
        self,
        residents: Callable[[], Iterable[ExpertKey]],
        counters: Callable[[], tuple[int, int]],
        num_experts: dict[int, int],
        max_bytes: int = ROUTE_LOG_BYTES,
    ) -> None:
        self._residents, self._counters, self._max_bytes = residents, counters, max_bytes
        self._chunks: deque[_Chunk] = deque()
        self._num_bytes = 0
        self._pending: list[LoggedEvent] = []
        self._start: tuple[NDArray[np.uint16], int, int] = _packed_keys([]), 0, 0
        self.heat = {layer_idx: np.zeros(count) for layer_idx, count in num_experts.items()}

    def add(self, layer_idx: int, expert_ids: Sequence[int], num_tokens: Sequence[int] | None = None) -> None:
        """Note an event before it is served: a step's, or a stream's with the tokens of each expert."""
        pending = self._pending
        if not pending:
            self._start = (_packed_keys(self._residents()), *self._counters())
        pending.append((layer_idx, expert_ids, num_tokens))
        if len(pending) >= CHUNK_EVENTS:
            self.pack()

    def pack(self) -> None:
        """Turn the pending events into a chunk, warm what they used, and drop what is too old."""
        if not self._pending:
            return
        self._warm(self._pending)
        chunk = _Chunk(_packed_events(self._pending), *self._start)
        self._pending = []
        self._chunks.append(chunk)
        self._num_bytes += chunk.num_bytes
        while self._num_bytes > self._max_bytes and len(self._chunks) > 1:
            self._num_bytes -= self._chunks.popleft().num_bytes

    def events(self) -> tuple[list[LoggedEvent], list[ExpertKey], int, int]:
        """Return what is kept, oldest first, who was resident before it, and (hits, needs) by then."""
        self.pack()
        if not self._chunks:
            return [], [], *self._counters()
        first = self._chunks[0]
        events = [event for chunk in self._chunks for event in _unpacked_events(chunk.numbers)]
        return events, [ExpertKey(*pair) for pair in first.residents.tolist()], first.hits, first.needs

    def _warm(self, events: Sequence[LoggedEvent]) -> None:
        for heat in self.heat.values():
            heat *= HEAT_KEPT
        for layer_idx, expert_ids, num_tokens in events:
            self.heat[layer_idx][list(expert_ids)] += 1.0 if num_tokens is None else np.asarray(num_tokens)


def _packed_keys(keys: Iterable[ExpertKey]) -> NDArray[np.uint16]:
    return np.array(list(keys), np.uint16).reshape(-1, 2)


def _packed_events(events: Sequence[LoggedEvent]) -> NDArray[np.uint16]:
    numbers: list[int] = []
    for layer_idx, expert_ids, num_tokens in events:
        numbers += (layer_idx, len(expert_ids), num_tokens is not None, *expert_ids, *(num_tokens or ()))
    return np.array(numbers, np.uint16)


def _unpacked_events(packed: NDArray[np.uint16]) -> list[LoggedEvent]:
    numbers: list[int] = packed.tolist()
    events: list[Any] = []
    position = 0
    while position < len(numbers):
        layer_idx, count, is_stream = numbers[position : position + 3]
        ids_end = position + 3 + count
        end = ids_end + count * is_stream
        events.append(
            (layer_idx, numbers[position + 3 : ids_end], numbers[ids_end:end] if is_stream else None)
        )
        position = end
    return events
