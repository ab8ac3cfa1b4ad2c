"""Books of a token whose layers device and CPU share in one native call: who is told of it, and when."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from test_hybrid import fill_ram, loaded
from test_hybrid import steady_costs as steady_costs  # for every test here, too

from moe_offload.planning.expert_costs import RunningCosts
from moe_offload.planning.gain_switch import BLOCK_STEPS
from moe_offload.planning.scheduler import SCHEDULERS, Schedule
from moe_offload.residency.route_log import CHUNK_EVENTS
from moe_offload.residency.slot_pool import SlotPool
from moe_offload.runtime.hybrid_layers import SETTLED_STEPS
from moe_offload.runtime.hybrid_run import CPU_TOKENS
from moe_offload.storage.expert_format import ExpertKey

PROMPT = torch.tensor([[17, 900, 33, 1204]])


def one_token(model: Any, cache: Any, token_id: int = 5) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([[token_id]]), past_key_values=cache).logits
    return logits


@pytest.mark.parametrize("on_device", [False, True])
def test_costs_are_corrected_by_what_the_cpu_did_since(
    on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tokens that the CPU computes alone every so many; at once where the device has a share."""
    monkeypatch.setitem(
        SCHEDULERS, "all or none", lambda work: Schedule(work.on_gpu & np.bool_(on_device), 0)
    )
    seen: list[float] = []
    with loaded(scheduler="all or none", prefetch=False) as model:
        fill_ram(model)
        cache, counters = model.offload.new_cache(), model.offload.hybrid.counters
        model(PROMPT, past_key_values=cache)
        one_token(model, cache)
        run = model.offload.native_step._hybrid_run
        run._tokens_seen = 0
        for part in run._sums:
            part.seen_experts, part.seen_s = 0, 0.0
        monkeypatch.setattr(RunningCosts, "saw_cpu", lambda costs, expected_s, seconds: seen.append(seconds))
        before = counters.cpu_s
        for i in range(2 * CPU_TOKENS):
            one_token(model, cache, 5 + i)
        assert len(seen) == (2 * CPU_TOKENS if on_device else 2)
        assert sum(seen) == pytest.approx(counters.cpu_s - before)


def test_an_expert_that_arrives_beside_others_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that lie there the pool is asked once, of another one again."""
    monkeypatch.setitem(SCHEDULERS, "there", lambda work: Schedule(work.on_gpu.copy(), 0))
    asked: list[int] = []
    show = SlotPool.show_arrived
    with loaded(scheduler="there", prefetch=False) as model, torch.no_grad():
        fill_ram(model)
        hybrid, kv = model.offload.hybrid, model.offload.new_cache()
        hybrid.switch, hybrid.tier.replaces = None, False
        monkeypatch.setattr(hybrid.tier, "ran_on_cpu", lambda keys: None)  # nothing else comes
        model(PROMPT, past_key_values=kv)
        num_tokens = kv.get_seq_length()
        expected = one_token(model, kv)
        done = model.offload.native_step._hybrid_run._native.done()
        layer_idx, chosen, *_ = done[0]
        unused = next(i for i in range(32) if i not in chosen)
        cache = hybrid.tier.cache
        cache.keep_only([key for key in cache.residents() if key.layer_idx != layer_idx])

        def counted(pool: SlotPool, *, shown: bool) -> int:
            asked.append(1)
            return show(pool, shown=shown)

        monkeypatch.setattr(SlotPool, "show_arrived", counted)
        cache.prefetch([ExpertKey(layer_idx, unused)])
        cache.finish_reads()
        for _ in range(3):
            kv.crop_to(num_tokens)
            assert torch.equal(one_token(model, kv), expected)
        assert sum(asked) == 1
        hits = hybrid.tier.stats.prefetch_hits
        cache.prefetch([ExpertKey(layer_idx, chosen[0])])
        cache.finish_reads()
        kv.crop_to(num_tokens)
        assert torch.equal(one_token(model, kv), expected)
        assert hybrid.tier.stats.prefetch_hits == hits + 1 and sum(asked) == 2
        cache.check()


def test_memory_is_looked_at_after_a_run() -> None:
    """Once for the layers of a native call, which were all done before anybody could have acted."""
    with loaded(scheduler="static_split", prefetch=False) as model:
        fill_ram(model)
        cache, done = model.offload.new_cache(), list[int]()
        model(PROMPT, past_key_values=cache)
        for executor in model.offload.native_step._moe_executors:
            executor.on_layer_done = done.append
        one_token(model, cache)
        assert done == [11]


@pytest.mark.parametrize("policy", ["horizon", "lru"])
@pytest.mark.parametrize("scheduler", ["static_split", "every_second", "none"])
def test_a_token_told_in_one_go_leaves_what_its_layers_leave_one_by_one(
    scheduler: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log, counters and policies of both tiers, and what may be copied; over an end of the log's chunks."""
    monkeypatch.setitem(
        SCHEDULERS, "every_second", lambda work: Schedule(work.on_gpu & (np.cumsum(work.on_gpu) % 2 == 0), 0)
    )
    monkeypatch.setitem(SCHEDULERS, "none", lambda work: Schedule(np.zeros_like(work.on_gpu), 0))
    books = []
    for in_one_go in (False, True):
        with loaded(scheduler=scheduler, policy=policy, prefetch=False) as model:
            fill_ram(model)
            hybrid, cache, missed = model.offload.hybrid, model.offload.cache, list[Any]()
            hybrid.tier.hold_only(
                [ExpertKey(i, expert_id) for i in range(12) for expert_id in range(0, 32, 4)]
            )
            monkeypatch.setattr(hybrid.tier, "ran_on_cpu", missed.extend)
            kv = model.offload.new_cache()
            model(PROMPT, past_key_values=kv)
            one_token(model, kv)
            run = model.offload.native_step._hybrid_run
            run._are_alike = in_one_go
            told = ways_of_booking(run, monkeypatch)
            for i in range(NUM_BOOKED):
                one_token(model, kv, 5 + 7 * i)
            assert told["alone"] == (1 if in_one_go else NUM_BOOKED), "a chunk of the log ends in one token"
            states = [{name: value.tolist() for name, value in s.items()} for s in policy_states(model)]
            counts = hybrid.tier.stats.hits, hybrid.tier.stats.misses, cache.stats.hits, cache.stats.misses
            experts = hybrid.counters.device_experts, hybrid.counters.cpu_experts
            books.append((cache.log.events(), counts, experts, missed, states))
    assert books[0] == books[1]
    assert books[0][1][0] > 0 or scheduler == "none"
    assert len(books[0][3]) > 100 or scheduler == "static_split", "nothing missed"


NUM_BOOKED = 1 + CHUNK_EVENTS // 12


def ways_of_booking(run: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """From now on, how many tokens were told layer by layer."""
    told, by_layer = {"alone": 0}, run._booked_by_layer

    def counted() -> int:
        told["alone"] += 1
        return int(by_layer())

    monkeypatch.setattr(run, "_booked_by_layer", counted)
    return told


def policy_states(model: Any) -> list[dict[str, Any]]:
    return [*model.offload.cache.policy_states(), *model.offload.hybrid.tier.cache.policy_states()]


def test_what_launches_take_beside_computing_is_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers that the host waited for; none where the CPU computes alone, as once they are dear."""
    seen: list[tuple[float, float]] = []
    monkeypatch.setattr(RunningCosts, "saw_start", lambda costs, *pair: seen.append(pair))
    with loaded("64MiB", scheduler="hybrid", prefetch=False) as model:
        fill_ram(model)
        hybrid, kv = model.offload.hybrid, model.offload.new_cache()
        hybrid.tier.hold_only([ExpertKey(i, expert_id) for i in range(12) for expert_id in range(32)])
        (costs,) = set(hybrid.costs.values())
        costs.measured = dataclasses.replace(costs.measured, gpu_start_s=1e-9)
        model(PROMPT, past_key_values=kv)
        num_tokens = kv.get_seq_length()
        expected = one_token(model, kv)
        native = model.offload.native_step._hybrid_run._native
        assert 0 < native.num_starts <= 12 and native.start_s > 0
        assert seen[-1] == (native.num_starts * costs.gpu_start_s, native.start_s)
        costs.measured = dataclasses.replace(costs.measured, gpu_start_s=1.0)
        on_device = []
        for _ in range(2):
            kv.crop_to(num_tokens)
            on_device.append(hybrid.counters.device_experts)
            assert torch.equal(one_token(model, kv), expected)
        assert on_device[1] == hybrid.counters.device_experts and native.num_starts == 0


def test_a_device_with_room_that_nobody_asks_for_is_judged_like_a_full_one() -> None:
    """A text does not use all experts, so a device with a slot for each of them is never full."""
    with loaded("64MiB", scheduler="hybrid", prefetch=False, shares=False) as model:
        fill_ram(model)
        hybrid, kv, begun = model.offload.hybrid, model.offload.new_cache(), list[bool]()
        model(PROMPT, past_key_values=kv)
        num_tokens = kv.get_seq_length()
        one_token(model, kv)
        hybrid.tier.cache.finish_reads()  # what those tokens use is there: nothing comes any more
        for _ in range(2 * SETTLED_STEPS + 2 * BLOCK_STEPS):
            kv.crop_to(num_tokens)
            one_token(model, kv)
            begun.append(hybrid.switch.is_on)
        assert not hybrid.tier.is_filled and hybrid.tier.is_on
        assert not any(begun[:SETTLED_STEPS]) and any(begun), "sharing was not tried, or too early"
