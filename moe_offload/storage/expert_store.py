"""Reads experts from the files of a checkpoint into slots, and dense tensors into their memory.

Owns the translation from ``ExpertKey`` to bytes on disk and from read errors to ``CheckpointError``.
It knows no policy: which slot, when, and whether a read is a demand or speculation is the cache's to say.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_offload.errors import CheckpointError
from moe_offload.storage.expert_format import (
    DIRECT_IO_ALIGNMENT_BYTES,
    ExpertIndex,
    ExpertKey,
    Span,
    region_bytes,
)
from moe_offload.storage.io import DirectReader, TicketState, add_file

WAIT_S = 3600.0  # per native call; the native side looks for Ctrl-C every 100 ms


class ExpertStore:
    """The experts of one checkpoint behind tickets.

    A ticket is an int and ends in one ``wait``, or in one ``cancel`` that returned True and ``forget``.
    The slot belongs to the read from ``read`` until the ticket is finished: not to be touched, reused
    or unmapped before. After ``close`` every ticket is finished.
    """

    def __init__(self, index: ExpertIndex, files: Sequence[Path], reader: DirectReader) -> None:
        """Open ``files`` (``Span.file_id`` counts in them) in ``reader``, which the store then owns.

        Raises:
            CheckpointError: a file cannot be opened.
        """
        self.reader = reader
        self._index = index
        self._files = tuple(files)
        self._reader_ids = [add_file(reader, path) for path in files]
        self._versions = [_version(path) for path in files]
        self._slot_bytes = {layer_idx: layout.slot_bytes for layer_idx, layout in index.layouts.items()}
        self._expert_bytes = {layer_idx: layout.expert_bytes for layer_idx, layout in index.layouts.items()}
        self._segments: dict[ExpertKey, npt.NDArray[np.int64]] = {}
        self._relayouts: dict[ExpertKey, npt.NDArray[np.int64]] = {}
        self._first_bytes: dict[ExpertKey, tuple[int, ...]] = {}  # of each matrix, from the slot's start
        self._keys: dict[int, ExpertKey] = {}  # of tickets not yet forgotten, for error messages
        self._prepare()

    def _prepare(self) -> None:
        """Fill the tables that keep ``read`` and ``addresses`` at a few microseconds."""
        rows: list[tuple[int, int, int, int]] = []
        starts: dict[ExpertKey, tuple[int, int]] = {}
        for key, spans in self._index.spans.items():
            if key in self._index.scale_spans:
                self._prepare_scaled(key)
                continue
            first_row, end = len(rows), 0
            for run in neighbours(spans):
                num_bytes = sum(span.num_bytes for span in run)
                rows.append((self._reader_ids[run[0].file_id], run[0].offset, num_bytes, end))
                end += region_bytes(num_bytes)
            starts[key] = (first_row, len(rows))
            self._first_bytes[key] = first_bytes(spans)
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        self._segments |= {key: table[start:end] for key, (start, end) in starts.items()}

    def _prepare_scaled(self, key: ExpertKey) -> None:
        """Codes and scales are read apart into each matrix's region; its blocks begin where that does."""
        layout, pages = self._index.layouts[key.layer_idx], DIRECT_IO_ALIGNMENT_BYTES
        segments, relayouts = [], []
        spans = zip(self._index.spans[key], self._index.scale_spans[key], strict=True)
        places = zip(layout.matrices, layout.region_offsets, strict=True)
        for (codes, scales), (matrix, region) in zip(spans, places, strict=True):
            assert matrix.relayout is not None, f"{key} has scales, but its layout says nothing of them"
            codes_region = region + matrix.codes_offset
            segments.append((self._reader_ids[scales.file_id], scales.offset, scales.num_bytes, region))
            segments.append((self._reader_ids[codes.file_id], codes.offset, codes.num_bytes, codes_region))
            first_scale, first_code = region + scales.offset % pages, codes_region + codes.offset % pages
            relayouts.append(
                (int(matrix.relayout), first_scale, first_code, region, matrix.rows, matrix.cols)
            )
        self._segments[key] = np.array(segments, dtype=np.int64)
        self._relayouts[key] = np.array(relayouts, dtype=np.int64)
        self._first_bytes[key] = layout.region_offsets

    def slot_bytes(self, layer_idx: int) -> int:
        """Bytes of a slot that holds any expert of the layer."""
        return self._slot_bytes[layer_idx]

    def expert_bytes(self, key: ExpertKey) -> int:
        """Bytes of the expert in the files."""
        return self._expert_bytes[key.layer_idx]

    def addresses(self, key: ExpertKey, slot_address: int) -> tuple[int, ...]:
        """First byte of each matrix of the expert in a slot, in the layout's order; aligned to nothing."""
        return tuple([slot_address + first for first in self._first_bytes[key]])

    def read(self, key: ExpertKey, slot_address: int, *, speculative: bool) -> int:
        """Queue the expert's bytes into the slot at ``slot_address`` (4096-aligned); returns a ticket."""
        ticket = self.reader.submit(self._segments[key], speculative, slot_address, self._relayouts.get(key))
        self._keys[ticket] = key
        return ticket

    def segments(self, layer_idx: int) -> list[npt.NDArray[np.int64]] | None:
        """Return what ``read`` submits for each expert of a layer, from the slot's start.

        None where blocks are put together after the reads.
        """
        keys = [ExpertKey(layer_idx, i) for i in range(self._index.layouts[layer_idx].num_experts)]
        if any(key in self._relayouts for key in keys):
            return None
        return [self._segments[key] for key in keys]

    def adopt(self, ticket: int, key: ExpertKey) -> None:
        """Take note of a read that somebody else submitted to ``reader``: as if ``read`` had."""
        self._keys[ticket] = key

    def done(self, ticket: int) -> bool:
        """Whether the read is finished: its bytes are there, or it failed, or it was cancelled."""
        return self.reader.state(ticket) >= TicketState.DONE

    def state(self, ticket: int) -> int:
        """The ``TicketState`` of the read."""
        return self.reader.state(ticket)

    def wait(self, ticket: int) -> None:
        """Wait until the expert's bytes are in the slot; the ticket is forgotten then.

        Raises:
            CheckpointError: they could not be read, or the store was closed meanwhile. The ticket is
                forgotten then, too.
            KeyboardInterrupt: within 100 ms of Ctrl-C; the read goes on, the ticket stays valid.
        """
        while not self.reader.wait(ticket, WAIT_S):
            pass
        failure = self._failure(ticket)
        self.forget(ticket)
        if failure is not None:
            raise CheckpointError(failure)

    def promote(self, ticket: int) -> bool:
        """Let a speculative read go ahead as a demand; False when all of it is issued already."""
        return self.reader.promote(ticket)

    def cancel(self, ticket: int) -> bool:
        """Drop a read of which nothing was issued; False when it will run to its end."""
        return self.reader.cancel(ticket)

    def forget(self, ticket: int) -> bool:
        """Drop the record of a finished read; False, and nothing happens, while it is not finished."""
        forgotten = self.reader.forget(ticket)
        if forgotten:
            self._keys.pop(ticket, None)  # an interrupt may have come before it was noted
        return forgotten

    def read_bytes(self, span: Span) -> npt.NDArray[np.uint8]:
        """Read ``span`` into new memory, now; (span.num_bytes,)."""
        out = np.empty(span.num_bytes, dtype=np.uint8)
        self.read_into(span, out.ctypes.data)
        return out

    def read_into(self, span: Span, address: int) -> None:
        """Read ``span`` to ``address`` (any alignment), now.

        Raises:
            CheckpointError: the bytes could not be read.
            KeyboardInterrupt: within 100 ms of Ctrl-C; the memory is the caller's again.
        """
        try:
            self.reader.read_into(self._reader_ids[span.file_id], span.offset, span.num_bytes, address)
        except OSError as error:
            raise CheckpointError(f"{self._files[span.file_id]}: {error.strerror}{_REMEDY}") from error

    def check_unchanged(self) -> None:
        """Look whether the files are as they were when they were opened; one ``stat`` each.

        A file that was renamed, deleted or replaced by another is still read, and still the same.

        Raises:
            CheckpointError: one was written to.
        """
        for path, opened in zip(self._files, self._versions, strict=True):
            now = _version(path)
            if now is None or opened is None or now.place != opened.place or now == opened:
                continue
            raise CheckpointError(
                f"{path} was written to while a model had it open: it had {opened.describe()}, now it has "
                f"{now.describe()}, so what is in memory and what is read no longer belong together; load "
                "the model again"
            )

    def close(self) -> None:
        """Cancel what is queued, join the reader's threads, close the files. May be called twice."""
        self.reader.close()

    def _failure(self, ticket: int) -> str | None:
        """Say why a finished read has no bytes; None when it has them."""
        state = self.reader.state(ticket)
        if state == TicketState.DONE:
            return None
        key = self._keys[ticket]
        expert = f"expert {key.expert_id} of layer {key.layer_idx}"
        error = self.reader.error(ticket)
        if error is None:
            assert state == TicketState.CANCELLED, f"the read of {expert} failed without an error"
            return f"{expert}: its read was cancelled before it began, or the model was closed"
        file_id, _, _, message = error
        path = self._files[self._reader_ids.index(file_id)]
        return f"{path}: {expert}: {message}{_REMEDY}"


@dataclass(frozen=True)
class _Version:
    """A file at one time."""

    place: tuple[int, int]  # device and inode
    num_bytes: int
    modified_ns: int

    def describe(self) -> str:
        when = datetime.fromtimestamp(self.modified_ns / 1e9).isoformat(" ", "milliseconds")
        return f"{self.num_bytes} bytes of {when}"


def _version(path: Path) -> _Version | None:
    """Return a file's version; None where there is no file any more."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return _Version((found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns)


def neighbours(spans: Sequence[Span]) -> list[list[Span]]:
    """Group spans that follow one another in a file, in the file's order: each group is read at once.

    Most folders keep the matrices of an expert side by side, in the order of their names.
    """
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (span.file_id, span.offset)):
        last = groups[-1][-1] if groups else None
        if last is not None and (last.file_id, last.offset + last.num_bytes) == (span.file_id, span.offset):
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def first_bytes(spans: Sequence[Span]) -> tuple[int, ...]:
    """Return where each span begins in a slot: groups one after the other, each as a direct read leaves it.

    A slot is laid out for spans that are read one by one, so there is always room.
    """
    places: dict[Span, int] = {}
    region = 0
    for run in neighbours(spans):
        first = region + run[0].offset % DIRECT_IO_ALIGNMENT_BYTES
        places |= {span: first + span.offset - run[0].offset for span in run}
        region += region_bytes(sum(span.num_bytes for span in run))
    return tuple(places[span] for span in spans)


_REMEDY = "; check the disk and that no other program writes to the file, then load the model again"
