"""The transfer engine on the emulated accelerator: order, cancelling, faults, and the link's speed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
import pytest

from moe_offload import _native
from moe_offload.errors import ConfigError, DeviceError

QUEUED, COPYING, DONE, FAILED, CANCELLED = range(5)
MIB = 1 << 20
sources: list[np.ndarray] = []  # of a test; they outlive its device, whose copies read them


@pytest.fixture
def device() -> Iterator[_native.EmulatedDevice]:
    """1 MiB takes 10 ms: long enough to look at what waits."""
    device = _native.EmulatedDevice(16 * MIB, 100 * MIB, 1e-4)
    yield device
    device.close()
    sources.clear()


def spans(device: _native.EmulatedDevice, source: np.ndarray, offset: int) -> np.ndarray:
    return np.array([[source.ctypes.data, device.address + offset, source.nbytes]], np.int64)


def on_device(device: _native.EmulatedDevice, offset: int, num_bytes: int) -> bytes:
    import ctypes

    return ctypes.string_at(device.address + offset, num_bytes)


def source_of(num_bytes: int, seed: int = 0) -> np.ndarray:
    sources.append(np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8))
    return sources[-1]


def test_bytes_arrive_whole_and_in_their_place(device: _native.EmulatedDevice) -> None:
    first, second = source_of(2 * MIB + 77, 1), source_of(1234, 2)
    both = np.concatenate([spans(device, first, 0), spans(device, second, 8 * MIB + 1)])
    ticket = device.submit(both, False)
    assert device.wait(ticket, 10) and device.state(ticket) == DONE
    assert on_device(device, 0, len(first)) == first.tobytes()
    assert on_device(device, 8 * MIB + 1, len(second)) == second.tobytes()
    counters = device.counters()
    assert counters["bytes_copied"] == first.nbytes + second.nbytes and counters["chunks"] == 4
    assert device.forget(ticket)
    with pytest.raises(ConfigError, match="unknown"):
        device.state(ticket)


def test_the_link_is_as_slow_as_it_was_told(device: _native.EmulatedDevice) -> None:
    """A lower bound only: a busy machine may be later, never earlier."""
    source, started = source_of(4 * MIB), time.perf_counter()
    assert device.wait(device.submit(spans(device, source, 0), False), 10)
    assert time.perf_counter() - started >= 0.04


def test_bytes_come_back_over_a_link_of_its_own() -> None:
    """While the way there is taken for a second; and no faster than that link is."""
    device = _native.EmulatedDevice(16 * MIB, 4 * MIB, 1e-4, to_host_bytes_per_s=100 * MIB)
    try:
        source, back = source_of(MIB), np.zeros(2 * MIB, np.uint8)
        assert device.wait(device.submit(spans(device, source[:1000], 0), False), 10)
        busy = [
            device.submit(spans(device, source, i * MIB), False) for i in range(2, 6)
        ]  # not what comes back
        took_s = device.copy_to_host(spans(device, back, 0))
        assert took_s >= 0.02 and device.state(busy[-1]) == QUEUED, "waited for the other direction"
        assert back[:1000].tobytes() == source[:1000].tobytes()
        with pytest.raises(ConfigError, match="outside of its memory"):
            device.copy_to_host(spans(device, back, 15 * MIB))
        device.inject(after=0, to_host=True)
        with pytest.raises(DeviceError, match="a copy to the emulated device failed"):
            device.copy_to_host(spans(device, back, 0))
        device.copy_to_host(spans(device, back, 0))
    finally:
        device.close()


def test_demand_overtakes_speculation_that_was_not_issued(device: _native.EmulatedDevice) -> None:
    source = source_of(MIB)
    guesses = [device.submit(spans(device, source, i * MIB), True) for i in range(6)]
    demand = device.submit(spans(device, source, 8 * MIB), False)
    assert device.wait(demand, 10)
    assert [device.state(guess) for guess in guesses].count(DONE) <= 3  # two in hand, one just taken
    assert device.wait(guesses[-1], 10)


def test_two_chunks_are_in_the_links_hands_never_three(device: _native.EmulatedDevice) -> None:
    """Of an expert of several chunks, and of several experts; each direction has two of its own."""
    device.record_events(1000)
    large, small, back = source_of(4 * MIB), source_of(MIB // 2), np.zeros(3 * MIB, np.uint8)
    tickets = [device.submit(spans(device, large, 0), False)]
    tickets += [device.submit(spans(device, small, (5 + i) * MIB), i % 2 == 0) for i in range(6)]
    device.copy_to_host(spans(device, back, 12 * MIB))  # what nothing is being copied to
    assert all(device.wait(ticket, 10) for ticket in tickets)
    events = device.take_events()
    lanes = {lane for lane, *_ in events}
    assert len(lanes) == 2
    for lane in lanes:
        marks = [
            (at, step)
            for of, _, _, begin, end in events
            if of == lane
            for at, step in ((begin, 1), (end, -1))
        ]
        at_once = list(itertools.accumulate(step for _, step in sorted(marks)))
        assert max(at_once) == 2 and at_once[-1] == 0


def test_only_what_is_not_issued_can_be_cancelled(device: _native.EmulatedDevice) -> None:
    source = source_of(MIB)
    tickets = [device.submit(spans(device, source, i * MIB), True) for i in range(5)]
    assert device.cancel(tickets[-1]) and device.state(tickets[-1]) == CANCELLED
    assert device.wait(tickets[0], 10) and not device.cancel(tickets[0])
    assert device.wait(tickets[3], 10)
    assert on_device(device, 4 * MIB, MIB) == bytes(MIB), "a cancelled copy wrote"


def test_a_promoted_guess_goes_before_the_others(device: _native.EmulatedDevice) -> None:
    source = source_of(MIB)
    tickets = [device.submit(spans(device, source, i * MIB), True) for i in range(7)]
    assert device.promote(tickets[-1])
    assert device.wait(tickets[-1], 10)
    assert device.state(tickets[-2]) != DONE
    assert not device.promote(tickets[-1])


def test_a_failed_copy_fails_its_ticket_and_no_other(device: _native.EmulatedDevice) -> None:
    device.inject(after=1, times=1)
    source = source_of(1000)
    tickets = []
    for i in range(3):
        tickets.append(device.submit(spans(device, source, i * MIB), False))
        assert device.wait(tickets[-1], 10)
    assert [device.state(ticket) for ticket in tickets] == [DONE, FAILED, DONE]
    assert device.error(tickets[1]) == (
        "a copy to the emulated device failed",
        _native.DeviceFault.FAILED,
    )
    assert device.error(tickets[2]) is None


def test_a_lost_device_fails_everything_from_then_on(device: _native.EmulatedDevice) -> None:
    device.inject(after=0, lost=True)
    source = source_of(1000)
    for _ in range(2):
        ticket = device.submit(spans(device, source, 0), False)
        assert device.wait(ticket, 10) and device.state(ticket) == FAILED
        message, fault = device.error(ticket) or ("", _native.DeviceFault.FAILED)
        assert fault == _native.DeviceFault.LOST and "lost" in message


def test_closing_cancels_what_waits(device: _native.EmulatedDevice) -> None:
    source = source_of(MIB)
    tickets = [device.submit(spans(device, source, i * MIB), False) for i in range(8)]
    device.close()
    states = [device.state(ticket) for ticket in tickets]
    assert set(states) <= {DONE, FAILED, CANCELLED} and CANCELLED in states
    with pytest.raises(ConfigError, match="closed"):
        device.submit(np.empty((0, 3), np.int64), False)


def test_nothing_is_written_outside_of_its_memory(device: _native.EmulatedDevice) -> None:
    source = source_of(100)
    for offset in (-1, 16 * MIB - 99):
        with pytest.raises(ConfigError, match="outside of its memory"):
            device.submit(spans(device, source, offset), False)
    with pytest.raises(ConfigError, match=r"spans must be \(n, 3\)"):
        device.submit(np.zeros((1, 4), np.int64), False)


def test_impossible_links_are_refused() -> None:
    with pytest.raises(ConfigError, match="bandwidth must be positive"):
        _native.EmulatedDevice(4096, 0, 0)
    with pytest.raises(ConfigError, match="latency must be from 0 to 10 s"):
        _native.EmulatedDevice(4096, 1, -1)
