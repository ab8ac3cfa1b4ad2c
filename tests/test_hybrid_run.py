"""Books of a token whose layers device and CPU share in one native call: who is told of it, and when."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_hybrid import fill_ram, loaded
from test_hybrid import steady_costs as steady_costs  # for every test here, too

from moe_offload.planning.expert_costs import RunningCosts
from moe_offload.planning.scheduler import SCHEDULERS, Schedule
from moe_offload.residency.slot_pool import SlotPool
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
