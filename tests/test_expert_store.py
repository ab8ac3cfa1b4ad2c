"""The expert store: keys to bytes, read errors in the checkpoint's words."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.errors import CheckpointError, ConfigError
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
from moe_offload.storage.io import Arena, TicketState, add_file, io_mode_from_env, open_reader

FILE_BYTES = 200_001
NUM_EXPERTS = 3
LAYOUTS = {
    0: ExpertLayout(
        0,
        NUM_EXPERTS,
        RowOrder.SPLIT,
        (
            MatrixFormat(GgmlType.Q4_0, 48, 64),
            MatrixFormat(GgmlType.Q4_0, 48, 64),
            MatrixFormat(GgmlType.F16, 64, 48),
        ),
    ),
    2: ExpertLayout(
        2,
        NUM_EXPERTS,
        RowOrder.GATE_UP,
        (MatrixFormat(GgmlType.F32, 64, 64), MatrixFormat(GgmlType.Q8_0, 64, 32)),
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two shards of random bytes."""
    folder, rng = tmp_path_factory.mktemp("store"), np.random.default_rng(1)
    paths = [folder / f"model-{i}.safetensors" for i in range(2)]
    for path in paths:
        path.write_bytes(rng.bytes(FILE_BYTES))
    return paths


def make_index(seed: int = 0) -> ExpertIndex:
    """Experts at random offsets of both files; one ends where its file ends."""
    rng = np.random.default_rng(seed)
    spans = {}
    for layout in LAYOUTS.values():
        for expert_id in range(layout.num_experts):
            spans[ExpertKey(layout.layer_idx, expert_id)] = tuple(
                Span(int(rng.integers(2)), int(rng.integers(FILE_BYTES - matrix.num_bytes)), matrix.num_bytes)
                for matrix in layout.matrices
            )
    last = LAYOUTS[2].matrices[1].num_bytes
    spans[ExpertKey(2, 2)] = (spans[ExpertKey(2, 2)][0], Span(1, FILE_BYTES - last, last))
    return ExpertIndex(LAYOUTS, spans)


def memory_of(arena: Arena) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * arena.num_bytes).from_address(arena.address), dtype=np.uint8)


def bytes_at(address: int, num_bytes: int) -> bytes:
    return ctypes.string_at(address, num_bytes)


def expected(files: list[Path], span: Span) -> bytes:
    return files[span.file_id].read_bytes()[span.offset : span.offset + span.num_bytes]


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(1 << 20)
    yield arena
    arena.close()


@pytest.fixture
def store(files: list[Path], arena: Arena) -> Iterator[ExpertStore]:
    """Ends before its arena does, as in the runtime."""
    store = ExpertStore(make_index(), files, open_reader(1))
    yield store
    store.close()


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), io_mode=st.sampled_from(["direct", "threads", "buffered"]))
def test_every_expert_arrives_whole_and_inside_its_slot(files: list[Path], seed: int, io_mode: str) -> None:
    index = make_index(seed)
    store = ExpertStore(index, files, open_reader(2, io_mode))
    slot_bytes = max(layout.slot_bytes for layout in LAYOUTS.values())
    arena = Arena(slot_bytes * (len(index.spans) + 2))
    try:
        slots = {key: arena.address + slot_bytes * (i + 1) for i, key in enumerate(index.spans)}
        tickets = [store.read(key, slot, speculative=bool(key.expert_id)) for key, slot in slots.items()]
        for ticket in tickets:
            store.wait(ticket)
        for key, slot in slots.items():
            for address, span in zip(store.addresses(key, slot), index.spans[key], strict=True):
                assert bytes_at(address, span.num_bytes) == expected(files, span), key
            used = slot - arena.address + LAYOUTS[key.layer_idx].slot_bytes
            assert not memory_of(arena)[used : slot - arena.address + slot_bytes].any(), "past the slot's end"
        assert not memory_of(arena)[:slot_bytes].any() and not memory_of(arena)[-slot_bytes:].any()
    finally:
        store.close()
        arena.close()


def test_matrices_side_by_side_in_the_file_are_one_read(files: list[Path], arena: Arena) -> None:
    """In any order, and only where nothing lies between them; a slot has room for either."""
    sizes = [matrix.num_bytes for matrix in LAYOUTS[0].matrices]
    apart, after, before = (
        Span(0, 70_001, sizes[0]),
        Span(0, 12_345, sizes[1]),
        Span(0, 12_345 - sizes[2], sizes[2]),
    )
    spans = make_index().spans | {ExpertKey(0, 0): (apart, after, before)}
    store = ExpertStore(ExpertIndex(LAYOUTS, spans), files, open_reader(1))
    try:
        store.wait(store.read(ExpertKey(0, 0), arena.address, speculative=False))
        assert store.reader.counters()["requests"] == 2
        for address, span in zip(
            store.addresses(ExpertKey(0, 0), arena.address), spans[ExpertKey(0, 0)], strict=True
        ):
            assert bytes_at(address, span.num_bytes) == expected(files, span)
        assert not memory_of(arena)[LAYOUTS[0].slot_bytes :].any()
    finally:
        store.close()


def test_sizes_are_the_layouts(store: ExpertStore) -> None:
    for layer_idx, layout in LAYOUTS.items():
        assert store.slot_bytes(layer_idx) == layout.slot_bytes
        assert store.expert_bytes(ExpertKey(layer_idx, 1)) == layout.expert_bytes


def test_dense_spans_are_read_into_new_or_given_memory(store: ExpertStore, files: list[Path]) -> None:
    span = Span(1, 12_345, 100_000)
    assert store.read_bytes(span).tobytes() == expected(files, span)
    out = np.zeros(span.num_bytes + 1, dtype=np.uint8)
    store.read_into(span, out.ctypes.data + 1)
    assert out[1:].tobytes() == expected(files, span)


def test_wait_forgets_the_ticket_and_cancel_plus_forget_does_too(store: ExpertStore, arena: Arena) -> None:
    store.reader.inject("hang")
    reading = store.read(ExpertKey(0, 0), arena.address, speculative=False)
    queued = store.read(ExpertKey(0, 1), arena.address + (1 << 19), speculative=True)
    while store.state(reading) == TicketState.QUEUED:
        store.reader.wait(reading, 0.01)
    assert not store.done(reading) and not store.done(queued)
    assert store.promote(queued)
    assert store.cancel(queued) and store.done(queued)
    assert store.forget(queued)
    assert not store.forget(reading), "it is not finished"
    store.reader.release(3)  # a SPLIT expert has three matrices
    store.wait(reading)
    for ticket in (reading, queued):
        with pytest.raises(ConfigError, match="unknown or forgotten"):
            store.done(ticket)


def test_a_read_error_names_file_expert_and_cause_once(
    store: ExpertStore, arena: Arena, files: list[Path]
) -> None:
    key = ExpertKey(2, 2)
    span = make_index().spans[key][1]
    store.reader.inject("error", path_substring=files[1].name, times=1, error_number=errno.EIO)
    ticket = store.read(key, arena.address, speculative=False)
    with pytest.raises(CheckpointError) as caught:
        store.wait(ticket)
    message = str(caught.value)
    assert message.startswith(f"{files[1]}: expert 2 of layer 2: read at offset ")
    assert "failed: Input/output error; check the disk" in message
    with pytest.raises(ConfigError, match="unknown or forgotten"):
        store.done(ticket)

    store.wait(store.read(key, arena.address, speculative=False))  # the fault struck once
    assert bytes_at(store.addresses(key, arena.address)[1], span.num_bytes) == expected(files, span)


@pytest.mark.parametrize("io_mode", ["direct", "buffered"])
def test_a_file_shortened_while_running_is_named(tmp_path: Path, arena: Arena, io_mode: str) -> None:
    path = tmp_path / "shrinks.gguf"
    path.write_bytes(bytes(FILE_BYTES))
    matrices = LAYOUTS[2].matrices
    spans = (Span(0, 100, matrices[0].num_bytes), Span(0, 150_000, matrices[1].num_bytes))
    store = ExpertStore(
        ExpertIndex({2: LAYOUTS[2]}, {ExpertKey(2, 0): spans}), [path], open_reader(2, io_mode)
    )
    os.truncate(path, 150_010)
    with pytest.raises(CheckpointError) as expert:
        store.wait(store.read(ExpertKey(2, 0), arena.address, speculative=False))
    assert (
        f"{path}: expert 0 of layer 2: read at offset 150000 wanted {matrices[1].num_bytes} bytes, found 10: "
        f"the file ends at 150010, it had {FILE_BYTES} bytes when it was opened"
    ) in str(expert.value)
    with pytest.raises(
        CheckpointError, match=r"shrinks\.gguf: read at offset 160000 wanted 50 bytes, found 0"
    ):
        store.read_bytes(Span(0, 160_000, 50))
    store.close()


def test_a_missing_shard_is_named(tmp_path: Path, files: list[Path]) -> None:
    reader = open_reader(1)
    with pytest.raises(
        CheckpointError, match=r"gone\.gguf: cannot be opened: No such file.*check that the file"
    ):
        ExpertStore(make_index(), [files[0], tmp_path / "gone.gguf"], reader)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        add_file(reader, tmp_path)
    reader.inject("open_error", error_number=errno.EACCES)
    with pytest.raises(CheckpointError, match="Permission denied"):
        add_file(reader, files[0])
    reader.close()


def test_waiting_for_a_closed_store_is_an_error(store: ExpertStore, arena: Arena) -> None:
    store.reader.inject("hang")
    tickets = [store.read(ExpertKey(0, i), arena.address, speculative=False) for i in range(2)]
    while store.state(tickets[0]) == TicketState.QUEUED:
        store.reader.wait(tickets[0], 0.01)
    store.close()
    with pytest.raises(CheckpointError, match="the reader was closed"):
        store.wait(tickets[0])
    with pytest.raises(CheckpointError, match="expert 1 of layer 0: its read was cancelled before it began"):
        store.wait(tickets[1])


def test_a_store_serves_files_at_any_place_in_the_reader(files: list[Path], arena: Arena) -> None:
    """The reader's file ids are not the checkpoint's when two checkpoints share a reader."""
    reader = open_reader(1)
    add_file(reader, files[1])
    store = ExpertStore(make_index(), files, reader)
    span = Span(0, 77, 1000)
    assert store.read_bytes(span).tobytes() == expected(files, span)
    key = ExpertKey(0, 0)
    store.wait(store.read(key, arena.address, speculative=False))
    for address, matrix in zip(store.addresses(key, arena.address), make_index().spans[key], strict=True):
        assert bytes_at(address, matrix.num_bytes) == expected(files, matrix)
    store.close()


def test_the_environment_chooses_the_mode(monkeypatch: pytest.MonkeyPatch, files: list[Path]) -> None:
    monkeypatch.delenv("MOE_OFFLOAD_IO", raising=False)
    assert io_mode_from_env() == "direct"
    monkeypatch.setenv("MOE_OFFLOAD_IO", "buffered")
    reader = open_reader(1)
    assert reader.file_mode(add_file(reader, files[0])) == ("buffered", "asked to")
    reader.close()
    monkeypatch.setenv("MOE_OFFLOAD_IO", "mmap")
    with pytest.raises(
        ConfigError, match="MOE_OFFLOAD_IO must be one of direct, threads, buffered, got 'mmap'"
    ):
        open_reader(1)
