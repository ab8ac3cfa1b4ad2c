"""What the routers chose lately, in a bounded buffer: for the distance to Belady and the next start.

Events are kept as the cache saw them. Chunks of them are packed, and the oldest chunks are dropped; each one
knows who was resident when it began, so that what is left can be replayed from there. One log serves a cache
and the one above it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.storage.expert_format import ExpertKey

ROUTE_LOG_BYTES = 1 << 20
CHUNK_EVENTS = 1024
HEAT_KEPT = 0.98  # of an expert's heat, from chunk to chunk

STEP, STREAM, SHARED_STEP = 0, 1, 2  # what follows an event's ids: nothing, token counts, who was above

# layer, expert ids, tokens of each of a stream, which of a step's the tier above served
LoggedEvent = tuple[int, Sequence[int], Sequence[int] | None, Sequence[int]]
Residents = Callable[[], Iterable[ExpertKey]]
Counters = Callable[[], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Mark:
    """A tier when a chunk began: who was resident, and (hits, needs) by then."""

    residents: bytes  # (n, 2) uint16
    hits: int
    needs: int

    def keys(self) -> list[ExpertKey]:
        return [ExpertKey(*pair) for pair in np.frombuffer(self.residents, np.uint16).reshape(-1, 2).tolist()]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """``numbers``: per event layer, count, what follows (STEP, ...), ids, and what follows them."""

    numbers: NDArray[np.uint16]
    marks: tuple[Mark, ...]  # by tier

    @property
    def num_bytes(self) -> int:
        return self.numbers.nbytes + sum(len(mark.residents) for mark in self.marks)


class RouteLog:
    """The last events, at most ``max_bytes`` of them, and every expert's heat.

    Args:
        residents: who is resident now.
        counters: (hits on residents, needs) of decode steps so far.
        num_experts: by layer index.
    """

    def __init__(
        self,
        residents: Residents,
        counters: Counters,
        num_experts: dict[int, int],
        max_bytes: int = ROUTE_LOG_BYTES,
    ) -> None:
        self._tiers: list[tuple[Residents, Counters]] = [(residents, counters)]
        self._max_bytes = max_bytes
        self._chunks: deque[_Chunk] = deque()
        self._num_bytes = 0
        self._pending: list[LoggedEvent] = []
        self._start: tuple[Mark, ...] = ()
        self.heat = {layer_idx: np.zeros(count) for layer_idx, count in num_experts.items()}

    def watch_above(self, residents: Residents, counters: Counters) -> None:
        """Note from now on where another tier stands, too; it serves what ``add`` is told is ``above``."""
        self.pack()
        self._tiers.append((residents, counters))

    def add(
        self,
        layer_idx: int,
        expert_ids: Sequence[int],
        num_tokens: Sequence[int] | None = None,
        above: Sequence[int] = (),
    ) -> None:
        """Note an event before it is served: a step's, or a stream's with the tokens of each expert."""
        pending = self._pending
        if not pending:
            self._start = self._marks()
        pending.append((layer_idx, expert_ids, num_tokens, above))
        if len(pending) >= CHUNK_EVENTS:
            self.pack()

    def add_steps(
        self,
        steps: Sequence[tuple[int, Sequence[int], Sequence[float] | None]],
        above: Sequence[Sequence[int]] = (),
    ) -> bool:
        """Note steps (layer, expert ids, weights) that nobody came or left between, where they fit.

        False: nothing was noted, because a chunk ends among them; it has to say where the tiers stood then.

        Args:
            above: by step, which experts the tier above served; nothing: it served none.
        """
        if len(self._pending) + len(steps) > CHUNK_EVENTS - 1:
            return False
        if steps and not self._pending:
            self._start = self._marks()
        self._pending += [
            (layer_idx, expert_ids, None, there)
            for (layer_idx, expert_ids, _), there in zip(steps, above or repeat(()), strict=False)
        ]
        return True

    def pack(self) -> None:
        """Turn the pending events into a chunk, warm what they used, and drop what is too old."""
        if not self._pending:
            return
        self._warm(self._pending)
        chunk = _Chunk(_packed_events(self._pending), self._start)
        self._pending = []
        self._chunks.append(chunk)
        self._num_bytes += chunk.num_bytes
        while self._num_bytes > self._max_bytes and len(self._chunks) > 1:
            self._num_bytes -= self._chunks.popleft().num_bytes

    def events(self) -> tuple[list[LoggedEvent], tuple[Mark, ...]]:
        """Return what is kept, oldest first, and where each tier stood before it, the lowest first."""
        self.pack()
        events = [event for chunk in self._chunks for event in _unpacked_events(chunk.numbers)]
        return events, self._chunks[0].marks if self._chunks else self._marks()

    def _marks(self) -> tuple[Mark, ...]:
        return tuple(Mark(_packed_keys(residents()), *counters()) for residents, counters in self._tiers)

    def _warm(self, events: Sequence[LoggedEvent]) -> None:
        for heat in self.heat.values():
            heat *= HEAT_KEPT
        of_steps: dict[int, list[int]] = {layer_idx: [] for layer_idx in self.heat}
        for layer_idx, expert_ids, num_tokens, _ in events:
            if num_tokens is None:
                of_steps[layer_idx] += expert_ids
            else:
                self.heat[layer_idx][list(expert_ids)] += np.asarray(num_tokens)
        for layer_idx, used in of_steps.items():
            heat = self.heat[layer_idx]
            heat += np.bincount(np.array(used, np.int64), minlength=len(heat))


def _packed_keys(keys: Iterable[ExpertKey]) -> bytes:
    return np.array(list(keys), np.uint16).tobytes()


def _packed_events(events: Sequence[LoggedEvent]) -> NDArray[np.uint16]:
    numbers: list[int] = []
    for layer_idx, expert_ids, num_tokens, above in events:
        if num_tokens is not None:
            numbers += (layer_idx, len(expert_ids), STREAM, *expert_ids, *num_tokens)
        elif above:
            numbers += (
                layer_idx,
                len(expert_ids),
                SHARED_STEP,
                *expert_ids,
                *map(above.__contains__, expert_ids),
            )
        else:
            numbers += (layer_idx, len(expert_ids), STEP, *expert_ids)
    return np.array(numbers, np.uint16)


def _unpacked_events(packed: NDArray[np.uint16]) -> list[LoggedEvent]:
    numbers: list[int] = packed.tolist()
    events: list[Any] = []
    position = 0
    while position < len(numbers):
        layer_idx, count, kind = numbers[position : position + 3]
        ids_end = position + 3 + count
        end = ids_end + (0 if kind == STEP else count)
        ids, rest = numbers[position + 3 : ids_end], numbers[ids_end:end]
        above = list(compress(ids, rest)) if kind == SHARED_STEP else []
        events.append((layer_idx, ids, rest if kind == STREAM else None, above))
        position = end
    return events
