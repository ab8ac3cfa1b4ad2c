"""The native reader: bytes land where they should, order, faults, end of life."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload._native import CANCELLED, DONE, FAILED, QUEUED, READING, Arena, DirectReader
from moe_offload.errors import ConfigError
from moe_offload.storage.expert_format import region_bytes

PAGE = 4096
FILE_BYTES = 9 * 2**20 + 1234  # more than one buffer of read_into; ends inside a page
ARENA_BYTES = 4 * 2**20
SENTINEL = 0xA5
GUARD_S = 20.0  # nothing here takes that long unless it hangs
HANG_CHILD = Path(__file__).parent / "hang_child.py"

both_modes = pytest.mark.parametrize("io_mode", ["direct", "buffered"])


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, FILE_BYTES, dtype=np.uint8)


@pytest.fixture(scope="module")
def path(data: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "data.bin"
    with path.open("wb") as file:
        file.write(data.tobytes())
        os.fsync(file.fileno())  # dirty pages would not leave the page cache
    return path


class Bench:
    """A reader with one file, an arena to read into, and the arena's bytes as an array."""

    def __init__(self, path: Path, io_mode: str, num_threads: int = 1) -> None:
        self.reader = DirectReader(num_threads, io_mode)
        self.file_id = self.reader.add_file(str(path))
        self.arena = Arena(ARENA_BYTES)
        self.memory = np.frombuffer(
            (ctypes.c_uint8 * ARENA_BYTES).from_address(self.arena.address), dtype=np.uint8
        )

    def submit(self, offset: int, num_bytes: int, *, region: int = 0, speculative: bool = False) -> int:
        segments = np.array([[self.file_id, offset, num_bytes, region]], dtype=np.int64)
        return self.reader.submit(segments, speculative, self.arena.address)

    def wait(self, ticket: int) -> int:
        assert self.reader.wait(ticket, GUARD_S), "the read hangs"
        return self.reader.state(ticket)

    def landed(self, offset: int, num_bytes: int, *, region: int = 0) -> np.ndarray:
        first = region + offset % PAGE
        return self.memory[first : first + num_bytes]

    def close(self) -> None:
        self.reader.close()
        self.arena.close()


@pytest.fixture
def bench(path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """One thread, direct; ``@pytest.mark.parametrize("bench", ["buffered"], indirect=True)`` changes it."""
    bench = Bench(path, getattr(request, "param", "direct"))
    yield bench
    bench.close()


on_both = pytest.mark.parametrize("bench", ["direct", "buffered"], indirect=True)


@pytest.fixture(scope="module", params=["direct", "threads", "buffered"])
def shared_bench(path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(path, request.param, num_threads=3)
    yield bench
    bench.close()


@st.composite
def spans(draw: st.DrawFn) -> tuple[int, int]:
    """An offset and a size inside the file, often near pages' and the file's ends."""
    num_bytes = draw(st.one_of(st.integers(1, 3 * PAGE), st.integers(1, 3 * 2**20)))
    last = FILE_BYTES - num_bytes
    offset = draw(
        st.one_of(
            st.integers(0, last),
            st.integers(max(0, last - 2 * PAGE), last),
            st.integers(0, last // PAGE).map(lambda page: page * PAGE),
        )
    )
    return offset, num_bytes


@settings(max_examples=60)
@given(span=spans(), region_pages=st.integers(1, 3))
def test_a_span_lands_in_its_region_and_nowhere_else(
    shared_bench: Bench, data: np.ndarray, span: tuple[int, int], region_pages: int
) -> None:
    offset, num_bytes = span
    region = region_pages * PAGE
    shared_bench.memory[:] = SENTINEL
    ticket = shared_bench.submit(offset, num_bytes, region=region)
    assert shared_bench.wait(ticket) == DONE
    assert shared_bench.reader.forget(ticket)
    np.testing.assert_array_equal(
        shared_bench.landed(offset, num_bytes, region=region), data[offset : offset + num_bytes]
    )
    assert (shared_bench.memory[:region] == SENTINEL).all()
    assert (shared_bench.memory[region + region_bytes(num_bytes) :] == SENTINEL).all()


@settings(max_examples=30)
@given(span=spans(), misalignment=st.integers(0, 64))
def test_read_into_serves_any_alignment_of_memory(
    shared_bench: Bench, data: np.ndarray, span: tuple[int, int], misalignment: int
) -> None:
    offset, num_bytes = span
    out = np.full(num_bytes + misalignment + 1, SENTINEL, dtype=np.uint8)
    shared_bench.reader.read_into(shared_bench.file_id, offset, num_bytes, out.ctypes.data + misalignment)
    np.testing.assert_array_equal(out[misalignment:-1], data[offset : offset + num_bytes])
    assert (out[:misalignment] == SENTINEL).all() and out[-1] == SENTINEL


def test_read_into_reads_more_than_its_buffers_hold(shared_bench: Bench, data: np.ndarray) -> None:
    out = np.zeros(FILE_BYTES, dtype=np.uint8)
    shared_bench.reader.read_into(shared_bench.file_id, 0, FILE_BYTES, out.ctypes.data)
    np.testing.assert_array_equal(out, data)


def test_read_into_from_several_threads_at_once(shared_bench: Bench, data: np.ndarray) -> None:
    outs = [np.zeros(2_000_000, dtype=np.uint8) for _ in range(3)]

    def read(i: int) -> None:
        shared_bench.reader.read_into(shared_bench.file_id, i * 1000 + 1, outs[i].size, outs[i].ctypes.data)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_S)
    for i, out in enumerate(outs):
        np.testing.assert_array_equal(out, data[i * 1000 + 1 : i * 1000 + 1 + out.size])


def test_one_ticket_reads_several_segments(shared_bench: Bench, data: np.ndarray) -> None:
    wanted = [(5, 1000, 0), (2_000_003, 1_500_000, 8 * PAGE), (FILE_BYTES - 7, 7, 400 * PAGE)]
    rows = [[shared_bench.file_id, offset, size, region] for offset, size, region in wanted]
    ticket = shared_bench.reader.submit(np.array(rows, dtype=np.int64), False, shared_bench.arena.address)
    assert shared_bench.wait(ticket) == DONE
    for offset, size, region in wanted:
        np.testing.assert_array_equal(
            shared_bench.landed(offset, size, region=region), data[offset : offset + size]
        )


# Order. One thread; a "hang" fault holds every read until released, so that nothing depends on time.


def start_blocker(bench: Bench) -> int:
    """Let the only thread take a read that hangs; what is submitted next stays queued."""
    bench.reader.inject("hang")
    ticket = bench.submit(0, 10)
    while bench.reader.state(ticket) == QUEUED:
        bench.reader.wait(ticket, 0.01)
    return ticket


def test_demand_overtakes_speculation(bench: Bench) -> None:
    blocker = start_blocker(bench)
    early = [bench.submit(PAGE * i, 10, region=PAGE * 2 * i, speculative=True) for i in (1, 2)]
    demand = bench.submit(PAGE * 3, 10, region=PAGE * 6)
    bench.reader.release(2)
    assert [bench.wait(blocker), bench.wait(demand)] == [DONE, DONE]
    assert all(bench.reader.state(ticket) in (QUEUED, READING) for ticket in early)


@pytest.mark.parametrize("speculative", [False, True])
def test_each_queue_is_first_in_first_out(bench: Bench, speculative: bool) -> None:
    start_blocker(bench)
    tickets = [bench.submit(PAGE * i, 10, region=PAGE * 2 * i, speculative=speculative) for i in range(4)]
    bench.reader.release(1)
    for i, ticket in enumerate(tickets):
        bench.reader.release(1)
        assert bench.wait(ticket) == DONE
        assert all(bench.reader.state(later) in (QUEUED, READING) for later in tickets[i + 1 :])


def test_a_demand_overtakes_the_rest_of_a_large_speculative_read(bench: Bench) -> None:
    bench.reader.inject("hang")
    large = bench.submit(0, 3 * 2**20, speculative=True)  # several pieces
    while bench.reader.state(large) == QUEUED:
        bench.reader.wait(large, 0.01)
    demand = bench.submit(0, 10, region=ARENA_BYTES - 2 * PAGE)
    bench.reader.release(2)
    assert bench.wait(demand) == DONE
    assert bench.reader.state(large) == READING


def test_a_promoted_ticket_goes_before_older_speculation_and_after_older_demands(bench: Bench) -> None:
    blocker = start_blocker(bench)
    older, promoted = (bench.submit(PAGE * i, 10, region=PAGE * 2 * i, speculative=True) for i in (1, 2))
    demand = bench.submit(PAGE * 3, 10, region=PAGE * 6)
    assert bench.reader.promote(promoted)
    assert not bench.reader.promote(promoted), "it is a demand already"
    bench.reader.release(2)
    assert [bench.wait(blocker), bench.wait(demand)] == [DONE, DONE]
    assert bench.reader.state(promoted) in (QUEUED, READING)
    bench.reader.release(1)
    assert bench.wait(promoted) == DONE
    assert bench.reader.state(older) in (QUEUED, READING)


@pytest.mark.parametrize("speculative", [False, True])
def test_a_cancelled_ticket_is_never_read(bench: Bench, speculative: bool) -> None:
    bench.memory[:] = SENTINEL
    blocker = start_blocker(bench)
    victim = bench.submit(PAGE, 10, region=8 * PAGE, speculative=speculative)
    later = bench.submit(2 * PAGE, 10, region=16 * PAGE, speculative=speculative)
    assert bench.reader.cancel(victim)
    assert bench.reader.cancel(victim), "cancelling twice is the same"
    assert bench.wait(victim) == CANCELLED
    bench.reader.release(2)
    assert [bench.wait(blocker), bench.wait(later)] == [DONE, DONE]
    assert (bench.memory[8 * PAGE : 16 * PAGE] == SENTINEL).all()
    assert bench.reader.error(victim) is None


def test_an_issued_read_cannot_be_cancelled(bench: Bench, data: np.ndarray) -> None:
    blocker = start_blocker(bench)
    assert not bench.reader.cancel(blocker)
    bench.reader.release(1)
    assert bench.wait(blocker) == DONE
    assert not bench.reader.cancel(blocker)
    np.testing.assert_array_equal(bench.landed(0, 10), data[:10])


def test_forget_drops_finished_tickets_only(bench: Bench) -> None:
    blocker = start_blocker(bench)
    assert not bench.reader.forget(blocker)
    bench.reader.release(1)
    bench.wait(blocker)
    assert bench.reader.forget(blocker)
    with pytest.raises(ConfigError, match=f"ticket {blocker} is unknown or forgotten"):
        bench.reader.state(blocker)


def test_wait_returns_false_when_the_time_is_over(bench: Bench) -> None:
    blocker = start_blocker(bench)
    assert not bench.reader.wait(blocker, 0.0)
    assert not bench.reader.wait(blocker, 0.15)
    assert bench.reader.state(blocker) == READING


# Faults.


@on_both
def test_a_read_error_is_kept_with_its_ticket_and_spares_the_next_read(
    bench: Bench, data: np.ndarray
) -> None:
    bench.reader.inject("error", after_reads=1, times=1, error_number=errno.EIO)
    tickets = [bench.submit(1 + PAGE * i, 100, region=PAGE * 2 * i) for i in range(3)]
    assert [bench.wait(ticket) for ticket in tickets] == [DONE, FAILED, DONE]
    file_id, offset, error_number, message = bench.reader.error(tickets[1])
    assert (file_id, offset, error_number) == (bench.file_id, 1 + PAGE, errno.EIO)
    assert "Input/output error" in message
    again = bench.submit(1 + PAGE, 100)
    assert bench.wait(again) == DONE
    np.testing.assert_array_equal(bench.landed(1 + PAGE, 100), data[1 + PAGE : 1 + PAGE + 100])


def test_a_failed_piece_ends_its_ticket_without_reading_the_rest(bench: Bench) -> None:
    bench.reader.inject("error", times=1)
    ticket = bench.submit(0, 3 * 2**20)
    assert bench.wait(ticket) == FAILED
    assert bench.reader.counters()["requests"] == 1


@pytest.mark.parametrize("error_number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_direct_reads_is_read_buffered(
    bench: Bench, data: np.ndarray, error_number: int
) -> None:
    if bench.reader.file_mode(bench.file_id)[0] != "direct":
        pytest.skip(f"no direct I/O here: {bench.reader.file_mode(bench.file_id)[1]}")
    bench.reader.inject("einval_direct", error_number=error_number)
    ticket = bench.submit(4097, 2_000_000)
    assert bench.wait(ticket) == DONE
    np.testing.assert_array_equal(bench.landed(4097, 2_000_000), data[4097 : 4097 + 2_000_000])
    mode, reason = bench.reader.file_mode(bench.file_id)
    assert mode == "buffered"
    assert reason == f"pread with O_DIRECT: {os.strerror(error_number)}"


def test_a_file_that_cannot_be_opened_direct_is_opened_buffered(
    path: Path, bench: Bench, data: np.ndarray
) -> None:
    bench.reader.inject("open_direct")
    file_id = bench.reader.add_file(str(path))
    assert bench.reader.file_mode(file_id) == ("buffered", "open with O_DIRECT: Invalid argument")
    out = np.zeros(1000, dtype=np.uint8)
    bench.reader.read_into(file_id, 3, 1000, out.ctypes.data)
    np.testing.assert_array_equal(out, data[3:1003])


@pytest.mark.parametrize("bench", ["buffered"], indirect=True)
def test_einval_without_direct_io_is_an_error_not_a_fallback(bench: Bench) -> None:
    bench.reader.inject("error", error_number=errno.EINVAL)
    ticket = bench.submit(0, 10)
    assert bench.wait(ticket) == FAILED
    assert bench.reader.error(ticket)[2] == errno.EINVAL


@on_both
@pytest.mark.parametrize("at_most", [100, PAGE, 5000, 70_000])
def test_short_reads_are_continued(bench: Bench, data: np.ndarray, at_most: int) -> None:
    """At most ``at_most`` bytes come back from a pread, as after a signal or on network file systems."""
    bench.reader.inject("short", num_bytes=at_most, times=-1)
    offset, num_bytes = 4000, 200_000
    assert bench.wait(bench.submit(offset, num_bytes)) == DONE
    np.testing.assert_array_equal(bench.landed(offset, num_bytes), data[offset : offset + num_bytes])


@on_both
def test_a_file_that_ends_too_early_is_told_with_wanted_and_found(bench: Bench) -> None:
    bench.reader.inject("eof", num_bytes=10_000)
    ticket = bench.submit(9_000, 5_000)
    assert bench.wait(ticket) == FAILED
    *_, error_number, message = bench.reader.error(ticket)
    assert error_number == 0
    assert message == (
        "read at offset 9000 wanted 5000 bytes, found 1000: the file ends at 10000, "
        f"it had {FILE_BYTES} bytes when it was opened"
    )


@both_modes
@pytest.mark.parametrize("new_bytes", [0, 100, PAGE, PAGE + 1])
def test_a_file_shortened_while_open_is_an_error_not_a_crash(
    tmp_path: Path, io_mode: str, new_bytes: int
) -> None:
    path = tmp_path / "shrinks.bin"
    path.write_bytes(bytes(3 * PAGE))
    bench = Bench(path, io_mode)
    os.truncate(path, new_bytes)
    ticket = bench.submit(50, 3 * PAGE - 50)
    assert bench.wait(ticket) == FAILED
    found = max(0, new_bytes - 50)
    assert f"wanted {3 * PAGE - 50} bytes, found {found}: the file ends at" in bench.reader.error(ticket)[3]
    with pytest.raises(OSError, match=f"it had {3 * PAGE} bytes when it was opened"):
        bench.reader.read_into(bench.file_id, 2 * PAGE, PAGE, bench.arena.address)
    bench.close()


@both_modes
def test_files_that_cannot_be_opened_are_oserrors(tmp_path: Path, io_mode: str) -> None:
    reader = DirectReader(1, io_mode)
    with pytest.raises(OSError, match="No such file") as missing:
        reader.add_file(str(tmp_path / "missing"))
    assert missing.value.errno == errno.ENOENT
    with pytest.raises(OSError, match="not a regular file") as folder:
        reader.add_file(str(tmp_path))
    assert folder.value.errno == errno.EISDIR
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        reader.add_file(str(tmp_path / "pipe"))
    (tmp_path / "secret").write_bytes(b"x")
    reader.inject("open_error", error_number=errno.EACCES, path_substring="secret")
    with pytest.raises(OSError, match="Permission denied"):
        reader.add_file(str(tmp_path / "secret"))
    reader.close()


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ([1, 0, 10, 0], "file_id 1 of 1 files"),
        ([-1, 0, 10, 0], "file_id -1 of 1 files"),
        ([0, -1, 10, 0], "10 bytes at offset -1"),
        ([0, 0, -10, 0], "-10 bytes at offset 0"),
        ([0, 2**63 - 10, 100, 0], "100 bytes at offset"),
        ([0, 0, 2**63 - 1, 0], "bytes at offset 0"),
        ([0, 0, 10, 8], "is not a multiple of 4096"),
    ],
)
def test_impossible_segments_are_refused(bench: Bench, row: list[int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        bench.reader.submit(np.array([row], dtype=np.int64), False, bench.arena.address)
    with pytest.raises(ConfigError, match="must be \\(n, 4\\)"):
        bench.reader.submit(np.array([[0, 0, 10]], dtype=np.int64), False, bench.arena.address)


def test_thread_counts_and_modes_are_checked() -> None:
    for num_threads in (0, -1, 65):
        with pytest.raises(ConfigError, match=f"num_threads must be from 1 to 64, got {num_threads}"):
            DirectReader(num_threads, "direct")
    with pytest.raises(ConfigError, match='io_mode must be "direct", "threads" or "buffered", got "mmap"'):
        DirectReader(1, "mmap")


# The page cache and the counters.


def cached_pages(path: Path) -> int:
    """Count the pages of a file that the page cache holds (mincore on a mapping of it)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        view = (ctypes.c_char * len(mapping)).from_buffer(mapping)
        vector = (ctypes.c_ubyte * -(-len(mapping) // PAGE))()
        result = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(mapping)), vector)
        del view
    assert result == 0, os.strerror(ctypes.get_errno())
    return sum(byte & 1 for byte in vector)


@on_both
def test_reading_leaves_nothing_in_the_page_cache(bench: Bench, path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(path):
        pytest.skip("this file system keeps its pages (tmpfs?)")
    assert bench.wait(bench.submit(777, 3_000_000)) == DONE
    out = np.zeros(5_000_000, dtype=np.uint8)
    bench.reader.read_into(bench.file_id, 3_000_001, out.size, out.ctypes.data)
    assert cached_pages(path) == 0


@pytest.mark.parametrize("bench", ["threads"], indirect=True)
def test_counters_count_span_bytes_and_whole_pages(bench: Bench) -> None:
    bench.wait(bench.submit(PAGE - 1, 2))
    bench.wait(bench.submit(0, PAGE))
    counters = bench.reader.counters()
    assert counters["bytes_read"] == 2 + PAGE
    assert counters["requests"] == 2
    assert counters["busy_seconds"] > 0 and counters["timed_bytes"] == 2 + PAGE
    if bench.reader.file_mode(bench.file_id)[0] == "direct":
        assert counters["disk_bytes"] == 3 * PAGE


# The system's ring.


@pytest.fixture
def ring_bench(path: Path) -> Iterator[Bench]:
    bench = Bench(path, "direct", num_threads=2)
    if bench.reader.why_no_ring():
        bench.close()
        pytest.skip(f"no ring here: {bench.reader.why_no_ring()}")
    yield bench
    bench.close()


def submit_many(bench: Bench, count: int, num_bytes: int = 100_000) -> list[tuple[int, int, int]]:
    """Queue demands and speculation in turns; returns (ticket, offset, region) of each."""
    step = region_bytes(num_bytes)
    places = [(i * 290_003, i * step) for i in range(count)]
    return [
        (bench.submit(offset, num_bytes, region=region, speculative=i % 3 > 0), offset, region)
        for i, (offset, region) in enumerate(places)
    ]


def test_more_reads_than_the_ring_takes_all_arrive_in_any_order_of_waiting(
    ring_bench: Bench, data: np.ndarray
) -> None:
    reads = submit_many(ring_bench, 30)
    for ticket, offset, region in reads[::-1]:
        assert ring_bench.wait(ticket) == DONE
        landed = ring_bench.landed(offset, 100_000, region=region)
        np.testing.assert_array_equal(landed, data[offset : offset + 100_000])
    assert ring_bench.reader.why_no_ring() == ""


def test_several_threads_wait_for_what_the_ring_reads(ring_bench: Bench) -> None:
    states: list[int] = []
    threads = [
        threading.Thread(target=lambda ticket: states.append(ring_bench.wait(ticket)), args=(ticket,))
        for ticket, *_ in submit_many(ring_bench, 24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_S)
    assert states == [DONE] * 24


def test_what_the_ring_does_not_read_whole_is_read_again_by_a_thread(tmp_path: Path) -> None:
    path = tmp_path / "shrinks"
    path.write_bytes(bytes(range(256)) * 4096)
    bench = Bench(path, "direct")
    try:
        os.truncate(path, 300_000)
        ticket = bench.submit(200_000, 200_000)
        assert bench.wait(ticket) == FAILED
        error = bench.reader.error(ticket)
        assert error is not None and "the file ends at 300000" in error[3]
        assert bench.wait(bench.submit(290_000, 10_000)) == DONE, "up to the last byte of the file"
    finally:
        bench.close()


def test_threads_take_over_from_the_ring_while_it_reads(ring_bench: Bench, data: np.ndarray) -> None:
    reads = submit_many(ring_bench, 20)
    ring_bench.reader.inject("delay", delay_s=0.001)
    assert ring_bench.reader.why_no_ring() == "faults were injected"
    for ticket, offset, region in reads:
        assert ring_bench.wait(ticket) == DONE
        landed = ring_bench.landed(offset, 100_000, region=region)
        np.testing.assert_array_equal(landed, data[offset : offset + 100_000])


def test_closing_waits_for_what_the_ring_was_given(ring_bench: Bench) -> None:
    tickets = [ticket for ticket, *_ in submit_many(ring_bench, 30)]
    ring_bench.reader.close()
    assert {ring_bench.reader.state(ticket) for ticket in tickets} <= {DONE, FAILED, CANCELLED}


# End of life.


def assert_threads_end(wanted: int) -> None:
    """A joined thread may stand in /proc for a moment longer; the ring's own end when the system likes."""
    deadline = time.monotonic() + GUARD_S
    while len(os.listdir("/proc/self/task")) > wanted and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(os.listdir("/proc/self/task")) <= wanted


def test_close_ends_hanging_and_queued_reads_and_joins_the_threads(path: Path) -> None:
    threads_before = len(os.listdir("/proc/self/task"))
    files_before = len(os.listdir("/proc/self/fd"))
    bench = Bench(path, "direct", num_threads=3)
    bench.reader.inject("hang")
    tickets = [bench.submit(PAGE * i, 10, region=2 * PAGE * i, speculative=i > 4) for i in range(10)]
    waiter = threading.Thread(target=bench.reader.wait, args=(tickets[0], 1000.0))
    waiter.start()
    closer = threading.Thread(target=bench.reader.close)
    closer.start()
    for thread in (closer, waiter):
        thread.join(GUARD_S)
        assert not thread.is_alive(), "close hangs"
    assert {bench.reader.state(ticket) for ticket in tickets} <= {FAILED, CANCELLED}
    assert_threads_end(threads_before)
    assert len(os.listdir("/proc/self/fd")) == files_before
    bench.reader.close()
    with pytest.raises(ConfigError, match="the reader is closed"):
        bench.submit(0, 10)
    with pytest.raises(ConfigError, match="the reader is closed"):
        bench.reader.add_file(str(path))
    with pytest.raises(ConfigError, match="the reader is closed"):
        bench.reader.read_into(bench.file_id, 0, 10, bench.arena.address)


def test_a_dropped_reader_closes_itself(path: Path) -> None:
    threads_before = len(os.listdir("/proc/self/task"))
    bench = Bench(path, "direct")
    start_blocker(bench)
    del bench.reader
    gc.collect()
    assert_threads_end(threads_before)


def run_hang_child(scenario: str, path: Path) -> str:
    command = [sys.executable, str(HANG_CHILD), scenario, str(path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # the package under test
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("scenario", ["wait", "read_into", "store_wait", "store_read_into"])
def test_ctrl_c_reaches_a_wait_for_a_read_that_never_returns(scenario: str, path: Path) -> None:
    assert run_hang_child(scenario, path) == "interrupted, threads joined, files closed\n"


def test_a_forked_child_is_told_instead_of_hanging(path: Path) -> None:
    assert "do not exist in the forked process" in run_hang_child("fork", path)
