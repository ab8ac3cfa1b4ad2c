"""Looking ahead and reading natively: the decisions are those of planning/, and the books stay exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_offload
from moe_offload import _native
from moe_offload.planning import layer_pace, prefetch_plan
from moe_offload.planning.next_token import NextToken
from moe_offload.predictors.one_token import FIRST, router_rows
from moe_offload.predictors.routers import DEFAULT_CURVE
from moe_offload.runtime import skeleton
from moe_offload.storage.expert_format import ExpertKey

PROMPT = torch.tensor([[5, 300, 17, 42]])
SECONDS = st.floats(0.0, 1e-2)

GUESSES = st.lists(
    st.tuples(
        st.integers(1, 3), st.integers(0, 4), st.integers(0, 9), st.floats(0.0, 1.0), st.integers(0, 9)
    ),
    max_size=12,
)


@given(GUESSES, st.floats(-9.0, 20.0), st.floats(0.0, 20.0) | st.just(np.inf), st.floats(0.0, 1.0))
def test_what_is_read_natively_is_what_the_plan_says(guesses, queued, window, threshold) -> None:
    plan = prefetch_plan.plan_reads(
        [
            prefetch_plan.Guess(ExpertKey(layer_idx, expert_id), probability, num_bytes, windows)
            for windows, layer_idx, expert_id, probability, num_bytes in guesses
        ],
        queued_bytes=queued,
        window_bytes=window,
        threshold=threshold,
    )
    natively = _native.plan_reads(guesses, queued, window, threshold)
    assert natively == [(key.layer_idx, key.expert_id) for key in plan]


CALLS = st.one_of(
    st.tuples(st.just("begin_step")),
    st.tuples(st.just("rests"), st.integers(0, 3), st.integers(0, 2)),
    st.tuples(st.just("look"), SECONDS, SECONDS),
    st.tuples(st.just("is_worth_predicting"), st.integers(0, 3)),
    st.tuples(st.just("predicted"), SECONDS),
    st.tuples(st.just("submitted"), SECONDS, st.integers(1, 4)),
    st.tuples(st.just("mean_needs")),
)


@settings(max_examples=60)
@given(st.sampled_from([np.inf, 1e-3]), SECONDS, st.lists(CALLS, max_size=120))
def test_the_native_pace_is_the_reference_to_the_bit(window_s, read_s, calls) -> None:
    one, other = layer_pace.LayerPace(window_s, 2e-5), _native.LayerPace(window_s, 2e-5)
    one.read_s = other.read_s = read_s
    for name, *arguments in calls:
        assert getattr(one, name)(*arguments) == getattr(other, name)(*arguments), (name, arguments)
        for figure in ("window_s", "submit_s", "predict_s", "num_steps"):
            assert getattr(one, figure) == getattr(other, figure), figure


def load(experts: int = 96, **kwargs: Any) -> Any:
    return moe_offload.from_pretrained(experts=experts, context=64, warm_start=False, **kwargs)


def generate(model: Any) -> list[int]:
    tokens: torch.Tensor = model.generate(PROMPT, max_new_tokens=24, do_sample=False, eos_token_id=None)
    return tokens.tolist()


def always_on(model: Any) -> Any:
    """Let the prefetcher of a model read whatever is likely, however slow this machine is.

    It forecasts the first layer, too: by its own router on a token's embedding.
    """
    prefetcher = model.offload.prefetcher
    router = skeleton.router_of(model, 0)
    rows = router_rows(router.weight.detach())
    prefetcher._one_token.add(FIRST, 0, rows, None, router.top_k, DEFAULT_CURVE)
    prefetcher.use(prefetcher._predictor, switch=None)
    prefetcher.threshold.value, prefetcher.threshold.update = 0.3, lambda *known: None
    return prefetcher


@pytest.mark.parametrize("experts", [40, 96, 200])
def test_native_look_aheads_change_neither_tokens_nor_residents_nor_any_sum(experts, monkeypatch) -> None:
    """Beside going layer by layer through Python, and not prefetching at all."""
    seen = {}
    for way in ("natively", "through Python", "not at all"):
        model = load(experts, prefetch=way != "not at all")
        loaded_bytes = model.offload.reader.counters()["bytes_read"]
        if way != "not at all":
            prefetcher = always_on(model)
            assert prefetcher.looks_natively
            used = note_used(prefetcher)
        if way == "through Python":
            monkeypatch.setattr(model.offload.native_step, "_tables", lambda: None)
        tokens = generate(model)
        cache, stats = model.offload.cache, model.offload.stats()
        cache.finish_reads()
        cache.check()
        assert not any(pool.lent for pool in cache._pools)
        needs = stats.misses + stats.prefetch_hits
        seen[way] = tokens, stats.hits, needs, stats.evictions, cache.residents(), cache.log.events()[0]
        if way == "natively":
            early = stats.prefetch_useful_bytes + stats.prefetch_late_bytes + stats.prefetch_wasted_bytes
            left = sum(entry.num_bytes for pool in cache._pools for entry in pool.unclaimed())
            read = model.offload.reader.counters()["bytes_read"] - loaded_bytes
            assert early > 0, "nothing was read early"
            assert used, "no run went on with what had arrived"
            assert read == stats.stream_bytes + stats.demand_bytes + early + left
        model.offload.close()
    assert seen["natively"] == seen["through Python"] == seen["not at all"]


def note_used(prefetcher: Any) -> list[tuple[int, int]]:
    """Return a list that gets what runs use of guesses that have arrived."""
    used: list[tuple[int, int]] = []
    end_run = prefetcher.end_run

    def noting() -> list[tuple[int, int]]:
        arrived: list[tuple[int, int]] = end_run()
        used.extend(arrived)
        return arrived

    prefetcher.end_run = noting
    return used


def test_many_guesses_in_few_slots_change_no_token() -> None:
    """Each gives way to others, in the run that it might have been used in, too."""
    expected = None
    for experts, threshold in ((30, 0.01), (60, 0.05), (120, 0.02), (240, 0.01)):
        model = load(experts)
        expected = expected or generate(model)
        prefetcher = always_on(model)
        prefetcher.threshold.value = threshold
        used = note_used(prefetcher)
        assert generate(model) == expected
        assert used or experts < 200
        model.offload.cache.finish_reads()
        model.offload.cache.check()
        model.offload.close()


def test_a_guess_is_used_from_its_own_slot_and_not_once_it_has_none_or_another() -> None:
    """Nobody knows what is in a slot that was given away."""
    model = load()
    early, cache = always_on(model)._early, model.offload.cache
    generate(model)
    (pool,) = cache._pools
    early.native.set(0.1, 1, 1e12, 0.0, 0.0)

    def lend() -> None:
        early.native.lend(cache.lend_for_guesses(8, -1, 1))
        early.has_lent = True

    def used_at(key: ExpertKey) -> tuple[int, ...] | None:
        lend()
        addresses = early.native.has_arrived(key.layer_idx, [key.expert_id], 3)
        assert early.end() == ([] if addresses is None else [tuple(key)])
        return None if addresses is None else tuple(addresses)

    for entry in pool.unclaimed():
        pool.wait(entry)
        pool.discard(entry)
    lend()
    beginning = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    early.native.begins(beginning.data_ptr())
    assert early.end() == [], "nobody came to a layer"
    guesses = pool.unclaimed()
    assert guesses
    for entry in guesses:
        pool.wait(entry)
        assert used_at(entry.key) == entry.addresses
        pool.discard(entry)
        assert used_at(entry.key) is None
        pool.free.insert(0, pool.free.pop())
        again = pool.read(entry.key, speculative=True)
        pool.wait(again)
        assert again.slot != entry.slot
        assert used_at(entry.key) is None, "it was not begun natively"
    cache.check()
    model.offload.close()


def test_an_interrupt_after_a_run_loses_no_slot(monkeypatch) -> None:
    """Ctrl-C is noticed when native code has returned, before anything of it is booked."""
    model = load()
    always_on(model)
    expected = generate(model)
    step, cache, calls = model.offload.native_step, model.offload.cache, []
    num_slots = [pool.num_slots for pool in cache._pools]

    class Interrupted:
        """The native step, whose runs end in an interrupt once something was read."""

        def __getattr__(self, name: str) -> Any:
            return getattr(native, name)

        def run(self, *arguments: Any) -> int:
            stopped: int = native.run(*arguments)
            calls.append(len(arguments[-1].events()))
            if calls[-1]:
                raise KeyboardInterrupt
            return stopped

    native = step._step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(step, "_step", Interrupted())
        generate(model)
    assert calls[-1], "no run has read anything"
    assert [pool.num_slots for pool in cache._pools] == num_slots
    cache.finish_reads()
    cache.check()
    assert generate(model) == expected
    model.offload.close()


def test_the_next_token_is_looked_at_before_it_is_chosen() -> None:
    """What the first layer probably needs is on its way when a token's forward is over."""
    model = load()
    prefetcher, seen = always_on(model), []
    step_done = prefetcher.step_done

    def at_the_end(seconds: float) -> None:
        guesses = [entry for pool in model.offload.cache._pools for entry in pool.unclaimed()]
        seen.append(sum(entry.key.layer_idx == 0 for entry in guesses))
        step_done(seconds)

    prefetcher.step_done = at_the_end
    generate(model)
    assert sum(seen) > len(seen) / 2, f"guesses of the first layer by token: {seen}"
    assert prefetcher._next_token.share > 0.9, "greedy tokens are the likeliest"
    model.offload.close()


def test_a_beginning_that_was_expected_is_looked_at_once() -> None:
    """Unless something was left to read, as here while no slot is lent."""
    model = load()
    early, cache = always_on(model)._early, model.offload.cache
    generate(model)
    token, other = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    early.native.set(0.2, 1, 1e12, 0.0, 0.0)

    def forget_guesses() -> None:
        for pool in cache._pools:
            for entry in pool.unclaimed():
                pool.wait(entry)
                pool.discard(entry)

    def read_of(hidden: torch.Tensor, num_slots: int) -> int:
        early.native.lend(cache.lend_for_guesses(num_slots, -1, 1))
        early.has_lent = True
        early.native.begins(hidden.data_ptr())
        count = len(early.native.events())
        early.end()
        forget_guesses()  # so that what was read has no slot again
        return count

    forget_guesses()
    assert read_of(token, 0) == 0
    assert 0 < read_of(token, 96) < 5, "what is likely has a slot to be read into"
    assert read_of(token, 96) == 0
    assert read_of(other, 96) > 0
    model.offload.close()


def test_who_watches_hears_of_the_likeliest_token() -> None:
    model = load()
    step, logits = model.offload.native_step._step, torch.randn(1, 1, model.config.vocab_size)
    assert step.expect_next(logits.data_ptr()) == int(logits.argmax())
    logits[0, 0, [7, 400]] = 50.0
    assert step.expect_next(logits.data_ptr()) == 7, "the lowest of several"
    logits[:] = torch.nan
    assert step.expect_next(logits.data_ptr()) == 0
    model.offload.close()


def test_tokens_that_come_otherwise_are_not_expected_any_more() -> None:
    next_token = NextToken()
    for number in range(5):
        assert next_token.asks()
        next_token.expect(number, 10.0 * number)
        next_token.came(number + 1, 10.0 * number + 2.0)
    assert not next_token.is_trusted
    asked = sum(next_token.asks() for _ in range(160))
    assert asked == 10, "now and then, to see whether they come again"
    assert 0.5 < next_token.gap_s < 2.0, "smoothed"
    share = next_token.share
    next_token.expect(1, 0.0)
    next_token.came(None, 0.0)  # a prompt
    next_token.came(1, 0.0)  # nobody was expected
    assert next_token.share == share
