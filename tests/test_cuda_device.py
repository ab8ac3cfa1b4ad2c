"""The CUDA device: the CPU's bits, copies from memory of any kind. On a card, and without one over stand-ins.

The same work as on the emulated device (test_device_launches.py). What only a card can show is marked cuda:
``pytest -m cuda``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from op_cases import EXPERT_CASES, FORMAT_EXPERT_CASES, ExpertCase
from test_device_launches import SLOT, OnDevice
from test_expert_ops import Layer

from moe_offload import _native, cuda
from moe_offload.errors import DeviceError
from moe_offload.storage.expert_format import FAST_TYPES, GgmlType

MIB = 1 << 20
CPU_ONLY = set(GgmlType) - FAST_TYPES  # without a kernel of their own there, too


def card() -> str:
    """Return the library's path; skips, with the reason, where there is no card."""
    report = cuda.describe()
    if not report["on"]:
        pytest.skip(f"no card: {report['reason']}")
    return str(cuda.LIBRARY)


@pytest.fixture(params=["stand-in", pytest.param("card", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[_native.Device]:
    library = card() if request.param == "card" else request.getfixturevalue("stand_in")
    device = _native.CudaDevice(library, 0, 4 * SLOT)
    yield device
    device.close()


def cases() -> list[object]:
    """Every layout always; every format in the slow tier, for the stand-in takes seconds of each."""
    return [*EXPERT_CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in FORMAT_EXPERT_CASES)]


@pytest.mark.parametrize("num_tokens", [1, 12], ids=lambda n: f"{n}tokens")
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_rows_have_the_cpus_bits(device: _native.Device, case: ExpertCase, num_tokens: int) -> None:
    layer = Layer(case)
    if not device.has_kernel(layer.kernel().native):
        assert set(case.types) & CPU_ONLY, "a format that should run on the GPU"
        return
    assert not set(case.types) & CPU_ONLY, "a format that should stay on the CPU"
    work = OnDevice(device, layer, num_tokens)
    for _ in range(2):  # the second time in buffers that were used
        launch = work.launch([work.copy(expert_id) for expert_id in work.ids])
        assert torch.equal(work.collect(launch).flip(0), work.cpu_rows())


@pytest.mark.cuda
@pytest.mark.parametrize("ggml_type", list(GgmlType), ids=lambda t: t.name)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 9, 33, 200], ids=lambda n: f"{n}tokens")
def test_real_sizes_have_the_cpus_bits(ggml_type: GgmlType, num_tokens: int) -> None:
    """Rows and columns of Qwen3-30B-A3B's experts, tiles of every kind."""
    from moe_offload.expert_ops import ActivationKind
    from moe_offload.storage.expert_format import RowOrder

    case = ExpertCase("real", RowOrder.SPLIT, (ggml_type,) * 3, ActivationKind.SILU, 2048, 768)
    layer = Layer(case)
    library = card()
    slot = sum(part.nbytes for part in layer.memory[0]) + 4096
    device = _native.CudaDevice(library, 0, layer.num_experts * max(slot, SLOT))
    try:
        if not device.has_kernel(layer.kernel().native):
            pytest.skip(f"{ggml_type.name} stays on the CPU")
        work = OnDevice(device, layer, num_tokens)
        work.slot_bytes = max(slot, SLOT)
        launch = work.launch([work.copy(expert_id) for expert_id in work.ids])
        assert torch.equal(work.collect(launch).flip(0), work.cpu_rows())
    finally:
        device.close()


def test_copies_cross_pieces_of_pinned_memory_and_what_is_not_pinned(device: _native.Device) -> None:
    """Pinned in pieces as far as the system goes; the rest through a bounce buffer; bytes as they were."""
    source = np.random.default_rng(1).integers(0, 256, 12 * MIB + 5, np.uint8)
    granted = device.pin(source.ctypes.data, 5 * MIB)
    assert 0 <= granted <= 5 * MIB
    rest = device.pin(source.ctypes.data + 5 * MIB, 2 * MIB)
    assert 0 <= rest <= 2 * MIB
    ticket = device.submit(np.array([[source.ctypes.data, device.address + 3, len(source)]], np.int64), False)
    assert device.wait(ticket, 30) and device.error(ticket) is None
    if device.name == "stand-in":  # its memory is the host's
        assert ctypes.string_at(device.address + 3, len(source)) == source.tobytes()


@pytest.mark.parametrize("pinned_bytes", [0, MIB])
def test_what_was_copied_there_comes_back(device: _native.Device, pinned_bytes: int) -> None:
    """To memory that is pinned in part or not at all, in chunks that cross the border."""
    source = np.random.default_rng(1).integers(0, 256, 3 * MIB + 5, np.uint8)
    back = np.zeros_like(source)
    if pinned_bytes:
        assert device.pin(back.ctypes.data, pinned_bytes) == pinned_bytes
    rows = [[array.ctypes.data, device.address + 3, len(source)] for array in (source, back)]
    assert device.wait(device.submit(np.array(rows[:1], np.int64), False), 30)
    assert device.copy_to_host(np.array(rows[1:], np.int64)) > 0
    assert np.array_equal(back, source)


def test_a_copy_that_fails_half_way_waits_for_its_first_half(stand_in: str) -> None:
    """Who hears of the failure uses the slot, or what was copied from, again."""
    device, source = _native.CudaDevice(stand_in, 0, SLOT), np.full(1 << 16, 7, np.uint8)
    half, native = len(source) // 2, ctypes.CDLL(stand_in)
    for begin in (0, half):
        assert device.pin(source.ctypes.data + begin, half) == half
    native.cuda_fail_copy(ctypes.c_int64(1))
    ticket = device.submit(np.array([[source.ctypes.data, device.address, len(source)]], np.int64), False)
    assert device.wait(ticket, 30) and device.error(ticket) is not None
    there = ctypes.string_at(device.address, len(source))
    assert there[:half] == bytes([7]) * half, "still on its way"
    assert there[half:] != bytes([7]) * half
    device.close()


def test_a_card_without_room_for_the_rest_keeps_no_slots(stand_in: str) -> None:
    """Else a second try with less would find no memory either."""
    held = ctypes.CDLL(stand_in).cuda_fail_streams
    before = held(1)
    try:
        with pytest.raises(DeviceError, match="a stream: out of memory"):
            _native.CudaDevice(stand_in, 0, SLOT)
        assert held(1) == before
    finally:
        held(0)


def test_rows_come_back_in_a_time_of_their_own(device: _native.Device) -> None:
    work = OnDevice(device, Layer(EXPERT_CASES[0]), num_tokens=4)
    work.collect(work.launch([work.copy(expert_id) for expert_id in work.ids]))
    counters = device.counters()
    assert counters["returned_bytes"] == 4 * len(work.tokens) * work.layer.case.hidden_size
    assert counters["return_seconds"] > 0


def test_a_system_that_pins_little_grants_what_it_has(stand_in: str) -> None:
    device = _native.CudaDevice(stand_in, 0, SLOT)
    source = np.zeros(200 * MIB, np.uint8)
    granted = device.pin(source.ctypes.data, len(source))
    assert 32 * MIB <= granted <= 48 * MIB, "found by trying in pieces of 16 MiB"
    device.close()
    again = _native.CudaDevice(stand_in, 0, SLOT)
    assert again.pin(source.ctypes.data, 16 * MIB) == 16 * MIB, "closing gave it back"
    again.close()


def test_pages_are_let_go_of_and_what_was_pinned_with_them_is_not(stand_in: str) -> None:
    """Slots that RAM gives back: while the driver held their pages the system would get nothing."""
    device, other = (_native.CudaDevice(stand_in, 0, 8 * MIB) for _ in range(2))
    source, another = (
        np.random.default_rng(1).integers(0, 256, 50 * MIB, np.uint8),
        np.zeros(20 * MIB, np.uint8),
    )
    begin = source.ctypes.data + 4096 - source.ctypes.data % 4096
    assert device.pin(begin, 48 * MIB) == 48 * MIB and other.pin(another.ctypes.data, MIB) == 0
    device.unpin(begin + 14 * MIB + 5, 20 * MIB)  # parts of two pieces and all of one, in whole pages
    assert other.pin(another.ctypes.data, 20 * MIB - 4096) == 20 * MIB - 4096
    assert other.pin(another.ctypes.data, 1) == 0, "a page was let go of in part"
    for first in (12 * MIB, 33 * MIB):  # across the borders
        ticket = device.submit(np.array([[begin + first, device.address, 4 * MIB]], np.int64), False)
        assert device.wait(ticket, 30) and device.error(ticket) is None
        first += begin - source.ctypes.data
        assert ctypes.string_at(device.address, 4 * MIB) == source[first : first + 4 * MIB].tobytes()
    device.close(), other.close()


def test_too_much_memory_is_refused_with_the_numbers(stand_in: str) -> None:
    with pytest.raises(DeviceError, match=f"GPU 0 with {1 << 40} bytes for experts: .*out of memory"):
        _native.CudaDevice(stand_in, 0, 1 << 40)


def test_a_library_that_is_no_library_is_named(tmp_path: Path) -> None:
    from moe_offload.errors import ConfigError

    with pytest.raises(ConfigError, match="does not load"):
        _native.CudaDevice(str(tmp_path / "none.so"), 0, SLOT)


def test_inputs_live_as_long_as_they_are_held(device: _native.Device) -> None:
    """Uploads alive together do not share memory; of one that is gone it is used again."""
    work = OnDevice(device, Layer(EXPERT_CASES[0]), num_tokens=4)
    for expert_id in work.ids:
        assert device.wait(work.copy(expert_id), 30)
    expected = work.cpu_rows()
    first = work.launch([0] * len(work.ids))
    work.hidden *= 2
    doubled = work.cpu_rows()
    second = work.launch([0] * len(work.ids))
    work.hidden.zero_()
    assert torch.equal(work.collect(second).flip(0), doubled)
    assert torch.equal(work.collect(first).flip(0), expected)


def test_a_limited_link_is_no_faster(stand_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bench/gpu.py makes a laptop of a larger card."""
    import time

    monkeypatch.setenv("MOE_OFFLOAD_LINK_LIMIT", str(100 * MIB))
    device = _native.CudaDevice(stand_in, 0, SLOT)
    source, started = np.ones(2 * MIB, np.uint8), time.perf_counter()
    ticket = device.submit(np.array([[source.ctypes.data, device.address, 2 * MIB]], np.int64), False)
    assert device.wait(ticket, 30)
    assert time.perf_counter() - started >= 0.02
    device.close()
