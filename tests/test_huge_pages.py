"""Huge pages under slots: where, how many at a time, and when no more."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

import moe_offload
from moe_offload.residency import huge_pages
from moe_offload.residency.huge_pages import MOST_REFUSALS, MOST_TRIES, HugePages, why_no_huge_pages
from moe_offload.storage.io import HUGE_PAGE_BYTES, NOT_FILLED

KIB = 1024
FIRST = 3 * HUGE_PAGE_BYTES - 4 * KIB  # of the memory: its first whole place is 4 KiB further on
PLACES = [n * HUGE_PAGE_BYTES for n in (3, 4, 5, 6)]


class Memory:
    """Answers as it is told; each answer takes ``cost_s`` of its clock."""

    def __init__(self, answer: Callable[[int], int] = lambda place: 0, cost_s: float = 0.001) -> None:
        self.address, self.num_bytes = FIRST, 4 * HUGE_PAGE_BYTES + 8 * KIB
        self.asked: list[int] = []
        self.now, self._answer, self._cost_s = 0.0, answer, cost_s

    def gather(self, offset: int) -> int:
        self.asked.append(self.address + offset)
        self.now += self._cost_s
        return self._answer(self.address + offset)


def pages_under(memory: Memory, slots: list[tuple[int, int]]) -> HugePages:
    return HugePages(memory, lambda: slots, lambda: memory.now)


EVERYWHERE = [(FIRST, 4 * HUGE_PAGE_BYTES + 8 * KIB)]


def test_they_take_their_share_of_decoding_and_no_more() -> None:
    memory = Memory(cost_s=0.0045)
    pages = pages_under(memory, EVERYWHERE)
    counts, taken_s = [], 0.0
    for _ in range(8):
        taken_s += pages.step_done(0.1)  # 2 ms of it
        counts.append(len(memory.asked))
    assert counts == [1, 1, 2, 2, 3, 3, 4, 4]  # two and a quarter steps pay for one
    assert memory.asked == PLACES and pages.num_made == 4
    assert taken_s == pytest.approx(4 * 0.0045)


def test_no_share_is_saved_up_for_a_long_halt() -> None:
    memory, slots = Memory(cost_s=0.006), []
    pages = pages_under(memory, slots)
    for _ in range(100):
        pages.step_done(1.0)
    slots += EVERYWHERE
    pages.step_done(0.02)
    assert len(memory.asked) == 2


def test_the_slot_read_into_next_comes_first_and_each_place_once() -> None:
    memory = Memory()
    slot_bytes = 300 * KIB
    slots = [
        (PLACES[2] - KIB, slot_bytes),
        (PLACES[2] + 500 * KIB, slot_bytes),
        (PLACES[3] + 8 * KIB, slot_bytes),
    ]
    pages = pages_under(memory, slots)
    for _ in range(9):
        pages.step_done(0.1)
    # The last slot begins in the memory's last 4 KiB, which are no huge page's.
    assert memory.asked == [PLACES[1], PLACES[2], PLACES[3]]


def test_what_is_not_filled_is_asked_again_and_what_is_busy_a_few_times() -> None:
    answers = {PLACES[0]: NOT_FILLED, PLACES[1]: errno.EAGAIN, PLACES[2]: 0, PLACES[3]: 0}
    memory = Memory(answers.__getitem__, cost_s=0.0)
    pages = pages_under(memory, EVERYWHERE)
    for _ in range(20):
        pages.step_done(0.1)
    assert [memory.asked.count(place) for place in PLACES] == [20, MOST_TRIES, 1, 1]
    assert pages.why_not == "" and pages.num_made == 2


def test_a_system_that_refuses_is_left_alone() -> None:
    memory = Memory(lambda place: errno.ENOMEM, cost_s=0.0)
    pages = pages_under(memory, EVERYWHERE)
    for _ in range(20):
        pages.step_done(0.1)
    assert len(memory.asked) == MOST_REFUSALS
    assert "Cannot allocate memory" in pages.why_not and pages.num_made == 0


def test_a_system_that_wants_none_is_believed(tmp_path: Path) -> None:
    assert why_no_huge_pages(tmp_path) == "this kernel has none"
    switch = tmp_path / "sys/kernel/mm/transparent_hugepage/enabled"
    switch.parent.mkdir(parents=True)
    for text, is_refused in (
        ("always madvise [never]\n", True),
        ("always [madvise] never\n", False),
        ("[always] madvise never\n", False),
    ):
        switch.write_text(text)
        assert bool(why_no_huge_pages(tmp_path)) == is_refused


def test_pages_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := huge_pages.try_huge_page():
        pytest.skip(f"no huge pages here: {reason}")
    monkeypatch.setattr(huge_pages, "TIME_SHARE", 50.0)
    monkeypatch.setattr(huge_pages, "MOST_SAVED_S", 1.0)
    texts = []
    for with_pages in (True, False):
        model = moe_offload.from_pretrained(experts="25%", context=64, warm_start=False)
        inputs = moe_offload.load_tokenizer(None)("A treaty between the two kingdoms", return_tensors="pt")
        pages = model.offload.huge_pages
        assert pages is not None
        if not with_pages:
            model.offload.huge_pages = None
        texts.append(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist())
        assert (pages.num_made > 0) == with_pages
        model.offload.close()
    assert texts[0] == texts[1]


def test_free_slots_without_a_place_are_not_looked_through_at_each_token() -> None:
    memory, looked, slots = Memory(), [], []
    pages = HugePages(memory, lambda: looked.append(1) or slots, lambda: memory.now)
    for _ in range(100):
        pages.step_done(0.001)  # 20 us of it
    assert 4 <= len(looked) <= 6
    slots += EVERYWHERE
    for _ in range(21):
        pages.step_done(0.001)
    assert memory.asked[:2] == PLACES[:2], "two milliseconds were saved meanwhile"
