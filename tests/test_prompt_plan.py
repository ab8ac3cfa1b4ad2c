"""What a prompt would cost: chunk by chunk, what its experts are expected or traced to be, and measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import moe_offload
from moe_offload.config import DEMO_MODEL, RuntimeConfig
from moe_offload.expert_bench import expert_bench
from moe_offload.measure_experts import LayerExperts
from moe_offload.outlook import Planner
from moe_offload.planning.hit_curves import TOKENS_LIKE_INDEPENDENT, expected_used
from moe_offload.planning.machine_speed import DecoderShape, MachineSpeed, Overheads, PromptSpeed
from moe_offload.planning.plans import PoolPlan
from moe_offload.planning.prompt_roofline import Chunk, PromptWork, prefill_speed, value_at
from moe_offload.prompt_outlook import (
    expected_chunks,
    prompt_work,
    skips_last_layer,
    traced_chunks,
    with_fresh_slots,
)
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.trace import make_trace

WORK = PromptWork(dense_macs=1000, expert_macs=100, expert_bytes=50, head_bytes=200)
SHAPE = DecoderShape(num_layers=2, moe_layers=2, top_k=2, num_experts=8, hidden_size=10, attention_heads=3)
PROMPT = PromptSpeed(
    dense_macs_per_s=((16, 1000.0), (64, 2000.0)), expert_s=((1, 1.0), (4, 2.0), (8, 4.0)), read_s=5.0
)
MACHINE = MachineSpeed(ram_bytes_per_s=100.0, disk_bytes_per_s=10.0, macs_per_s=1e3, prompt=PROMPT)


def seconds(machine: MachineSpeed, *chunks: Chunk) -> float:
    speed = prefill_speed(machine, SHAPE, WORK, chunks)
    assert speed is not None
    return sum(chunk.num_tokens for chunk in chunks) / speed.tokens_per_s


def test_a_resident_prompt_is_products_and_the_head() -> None:
    chunk = Chunk(num_tokens=16, cached_tokens=0, used=4, read=0)
    # 16 tokens' dense products, two layers of four experts with eight tokens each, the head.
    assert seconds(MACHINE, chunk) == pytest.approx(16.0 + 2 * 4 * 4.0 + 2.0)
    longer = replace(chunk, num_tokens=40, used=8)  # halfway between the rates, ten tokens an expert
    assert seconds(MACHINE, longer) == pytest.approx(40 * 1000 / 1500 + 2 * 8 * 5.0 + 2.0)


def test_reads_hide_behind_products_or_products_behind_reads() -> None:
    chunk = Chunk(num_tokens=16, cached_tokens=0, used=4, read=4)
    assert seconds(MACHINE, chunk) == pytest.approx(16.0 + 2 * 4 * 5.0 + 2.0)  # 5 s a read, 4 s to compute
    late = replace(MACHINE, disk_latency_s=3.0)
    assert seconds(late, chunk) == pytest.approx(16.0 + 2 * (4 * 5.0 + 3.0) + 2.0)
    handled = replace(MACHINE, prompt=replace(PROMPT, handling_s=((4, 1.0), (12, 3.0), (16, 4.0))))
    assert seconds(handled, chunk) == pytest.approx(16.0 + 2 * 4 * (5.0 + 2.0) + 2.0)  # eight tokens each
    assert seconds(handled, replace(chunk, read=1)) == pytest.approx(16.0 + 2 * (4 * 4.0 + 2.0) + 2.0)
    many = replace(chunk, num_tokens=64)  # 32 each, 16 s to compute; handling goes no further than measured
    assert seconds(handled, many) == pytest.approx(64 / 2 + 2 * 4 * (16.0 + 4.0) + 2.0)


def test_pages_are_made_for_slots_that_nothing_was_in() -> None:
    first, second, third = (Chunk(num_tokens=16, cached_tokens=0, used=4, read=read) for read in (4, 3, 2))
    fresh = [chunk.fresh for chunk in with_fresh_slots([first, second, third], 5.5)]
    assert fresh == [4, 1.5, 0]
    machine = replace(MACHINE, prompt=replace(PROMPT, fresh_s=((4, 0.0), (12, 1.0))))  # eight tokens each
    assert seconds(machine, first) == seconds(MACHINE, first)
    assert seconds(machine, replace(first, fresh=3)) == pytest.approx(seconds(MACHINE, first) + 2 * 3 * 0.5)


def test_each_chunk_pays_for_its_layers_elements_and_attention() -> None:
    chunk = Chunk(num_tokens=16, cached_tokens=0, used=4, read=0)
    overheads = Overheads(chunk_layer_s=7.0, chunk_element_s=0.5)
    machine = replace(MACHINE, overheads=overheads, prompt=replace(PROMPT, score_s=0.01))
    plain_s = seconds(MACHINE, chunk)
    first_s = seconds(machine, chunk)
    assert first_s == pytest.approx(plain_s + 2 * 7.0 + 2 * 16 * 10 * 0.5 + 3 * 16 * 16 * 0.01)
    both_s = seconds(machine, chunk, replace(chunk, cached_tokens=16))
    assert both_s == pytest.approx(2 * first_s - 2.0 + 3 * 16 * 16 * 0.01)  # the head once, more to look at
    half = replace(machine, prompt=replace(PROMPT, score_s=0.02, own_share=0.5))
    assert seconds(half, chunk) == pytest.approx(first_s)
    later_s = seconds(half, chunk, replace(chunk, cached_tokens=16))
    assert later_s == pytest.approx(2 * first_s - 2.0 + 3 * 16 * 16 * 0.02), (
        "all of the cache, half of its own"
    )


def test_a_profile_tells_of_bandwidths_and_products_only() -> None:
    machine = replace(MACHINE, prompt=None)
    chunk = Chunk(num_tokens=16, cached_tokens=0, used=4, read=4)
    # Eight tokens of an expert take 0.8 s to multiply, its bytes 0.5 s from memory and 5 s from disk.
    assert seconds(machine, replace(chunk, read=0)) == pytest.approx(16.0 + 2 * 4 * 0.8 + 2.0)
    assert seconds(machine, chunk) == pytest.approx(16.0 + 2 * 4 * 5.0 + 2.0)
    one = Chunk(num_tokens=1, cached_tokens=0, used=2, read=0)
    assert seconds(machine, one) == pytest.approx(1.0 + 2 * 2 * 0.5 + 2.0)
    assert prefill_speed(replace(machine, macs_per_s=None), SHAPE, WORK, [chunk]) is None


def test_the_slowest_wall_binds() -> None:
    chunk = Chunk(num_tokens=16, cached_tokens=0, used=4, read=4)
    for machine, wall in (
        (MACHINE, "compute"),
        (replace(MACHINE, prompt=replace(PROMPT, read_s=50.0)), "disk"),
        (replace(MACHINE, overheads=Overheads(chunk_layer_s=90.0)), "overhead"),
    ):
        speed = prefill_speed(machine, SHAPE, WORK, [chunk])
        assert speed is not None and speed.binding == wall
        assert set(speed.walls_s) == {"RAM", "disk", "compute", "overhead"}


def test_curves_go_on_from_their_last_two_points() -> None:
    curve = ((1.0, 1.0), (4.0, 2.0), (8.0, 4.0))
    assert [value_at(curve, x) for x in (0.5, 1, 2.5, 4, 6, 8, 16)] == [1, 1, 1.5, 2, 3, 4, 8]
    assert value_at(((1.0, 5.0),), 99) == 5


def test_a_dense_product_is_as_fast_as_a_tile_makes_it() -> None:
    faster = replace(MACHINE, prompt=replace(PROMPT, dense_macs_per_s=((1.0, 100.0), (512.0, 1000.0))))
    long, tiles = Chunk(4096, 0, 0, 0), [Chunk(512, 512 * i, 0, 0) for i in range(8)]
    free = replace(faster, prompt=replace(faster.prompt, score_s=0.0), overheads=Overheads())
    assert seconds(free, long) == pytest.approx(seconds(free, *tiles))


@pytest.mark.parametrize("family", sorted(TOKENS_LIKE_INDEPENDENT))
def test_more_tokens_use_more_experts_and_fewer_than_independent_ones(family: str) -> None:
    used = [expected_used(family, 32, 4, tokens) for tokens in (1, 2, 7, 16, 100, 512)]
    assert used[0] == pytest.approx(4.0) and used == sorted(used) and used[-1] < 32
    assert all(
        value <= 32 * (1 - (28 / 32) ** n) * 1.001 for n, value in zip((1, 2, 7, 16), used, strict=False)
    )
    assert expected_used(family, 2, 2, 5) == 2.0


def test_without_a_trace_the_first_chunk_reads_what_it_uses() -> None:
    spec = open_checkpoint(DEMO_MODEL).spec
    first, second = expected_chunks(spec, 0.25, [512, 128])
    assert first.read == first.used and second.read == pytest.approx(0.75 * second.used)
    assert (first.num_tokens, second.num_tokens, second.cached_tokens) == (512, 128, 512)


def test_a_traced_prompt_reads_what_the_replay_reads() -> None:
    # Two layers of eight experts: even tokens use 0 and 1, odd ones 2 and 3; those after 512 use 4 and 5.
    pairs = np.array([[0, 1], [2, 3]] * 256 + [[4, 5]] * 88, np.uint8)
    trace = make_trace(np.stack([pairs, pairs], axis=1), num_experts=8)
    sizes = {0: 10, 1: 10}
    few = (PoolPlan(10, (0, 1), 16, num_slots=8, num_staging=4),)
    chunks = traced_chunks(trace, few, "ewma", [512, 88], sizes)
    assert chunks == [Chunk(512, 0, used=4, read=4), Chunk(88, 512, used=2, read=2)]
    again = np.concatenate([pairs[:512], pairs[:88]])
    trace = make_trace(np.stack([again, again], axis=1), num_experts=8)
    every = (PoolPlan(10, (0, 1), 16, num_slots=16, num_staging=0),)
    chunks = traced_chunks(trace, every, "ewma", [512, 88], sizes)
    assert chunks == [Chunk(512, 0, used=4, read=4), Chunk(88, 512, used=4, read=0)]
    assert traced_chunks(trace, every, "ewma", [512, 89], sizes) is None


def test_a_planner_takes_its_chunks_from_the_trace() -> None:
    checkpoint = open_checkpoint(DEMO_MODEL)
    ids = np.tile(np.arange(4, dtype=np.uint8), (64, 12, 1))  # four experts, always
    machine = MachineSpeed(20e9, 1e9, 1e11)
    config = RuntimeConfig(context_tokens=64)
    few = Planner(checkpoint, machine, config, trace=make_trace(ids, num_experts=32), prompt_tokens=64)
    any_text = Planner(checkpoint, machine, config, prompt_tokens=64)
    found = [planner.outlook(few.whole_ram_bytes).prefill for planner in (few, any_text)]
    assert found[0] and found[1] and found[0].tokens_per_s > 2 * found[1].tokens_per_s


def test_the_work_of_a_prompt_is_that_of_the_file() -> None:
    checkpoint = open_checkpoint(DEMO_MODEL)
    work, spec = prompt_work(checkpoint), checkpoint.spec
    assert work.expert_macs == 3 * spec.hidden_size * spec.moe_intermediate_size
    assert work.expert_bytes == next(iter(checkpoint.experts.layouts.values())).expert_bytes


def test_a_layer_is_rehearsed_with_as_many_misses_as_asked() -> None:
    checkpoint = open_checkpoint(DEMO_MODEL)
    with expert_bench(checkpoint) as bench:
        layer = LayerExperts(bench, 0)
        stats = layer.cache.stats
        for misses in range(layer.most_misses + 1):
            before = stats.misses
            layer._step(misses)
            assert stats.misses - before == misses
        assert layer.most_misses == layer.top_k == 4
        before = stats.stream_bytes
        assert layer.streamed_s(2) > 0 and stats.stream_bytes > before
        assert layer.resident_s(64) > 0
        layer.cache.check()


def test_the_last_layer_is_paid_for_the_tokens_that_it_computes() -> None:
    work = replace(WORK, skipped_macs=300)
    whole = Chunk(num_tokens=16, cached_tokens=8, used=4, read=0)
    ends = replace(whole, last=Chunk(num_tokens=1, cached_tokens=23, used=2, read=1))
    machine = replace(MACHINE, prompt=replace(PROMPT, score_s=0.01), overheads=Overheads(chunk_element_s=0.5))

    def seconds_of(chunk: Chunk) -> float:
        speed = prefill_speed(machine, SHAPE, work, [chunk])
        assert speed is not None
        return 16 / speed.tokens_per_s

    scores_s = 3 * 0.01 * (16 * (8 + 16) - 15 * (8 + 15) / 2)  # of two layers, the last without 15 tokens
    elements_s = (2 * 16 - 15) * 10 * 0.5
    experts_s = 4 * 4.0 + max(2 * 1.0, 5.0)  # eight tokens each; one of two experts is read
    assert seconds_of(ends) == pytest.approx(16.0 - 15 * 0.3 + scores_s + elements_s + experts_s + 2.0)
    assert seconds_of(replace(whole, last=replace(whole))) == pytest.approx(seconds_of(whole))


def test_a_first_prompt_computes_its_last_layer_whole_where_that_fills_the_memory() -> None:
    spec = open_checkpoint(DEMO_MODEL).spec  # 12 layers of 32 experts, 4 a token
    assert skips_last_layer(spec, is_native=True, has_device=False)
    assert not skips_last_layer(spec, is_native=False, has_device=False)
    assert not skips_last_layer(spec, is_native=True, has_device=True)
    first, second = expected_chunks(spec, 0.5, [512, 100], skips_last=True)
    assert first.last is None, "sixteen of its experts find room"
    assert second.last == Chunk(1, 611, 4.0, 2.0) and second.num_skipped == 99
    (only,) = expected_chunks(spec, 0.125, [512], skips_last=True)
    assert only.last == Chunk(1, 511, 4.0, 4.0), "no more than a token brings find room"


@pytest.mark.parametrize(("experts", "is_whole"), [(56, False), (160, True)])
def test_a_trace_says_what_a_prompt_reads_of_its_last_layer(experts: int, is_whole: bool) -> None:
    """As the runtime reads it: the demo's own choices, replayed."""
    ids = torch.arange(7, 107)[None]
    how = {"experts": experts, "context": 128, "prefetch": False, "profile": "none", "warm_start": False}
    model = moe_offload.from_pretrained(**how)
    with model.offload.trace() as recorder:
        model.generate(ids, max_new_tokens=1, do_sample=False)
    trace, checkpoint = recorder.trace(), open_checkpoint(DEMO_MODEL)
    model.offload.close()
    model = moe_offload.from_pretrained(**how)
    try:
        model.generate(ids, max_new_tokens=1, do_sample=False)
        stats, pools = model.offload.stats(), model.offload.plan.pools
    finally:
        model.offload.close()
    expert_bytes = {i: layout.expert_bytes for i, layout in checkpoint.experts.layouts.items()}
    (chunk,) = traced_chunks(trace, pools, "horizon", [100], expert_bytes, skips_last=True) or [None]
    assert chunk is not None and (chunk.last is None) is is_whole
    last = chunk.last or chunk
    assert stats.stream_bytes + stats.demand_bytes == round(11 * chunk.read + last.read) * expert_bytes[0]


def test_what_a_skipped_token_saves_of_the_last_layer() -> None:
    checkpoint = open_checkpoint(DEMO_MODEL)
    last = {name: info for name, info in checkpoint.dense.items() if "layers.11." in name}
    keys_and_values = sum(
        info.num_elements for name, info in last.items() if name[:-7].endswith(("k_proj", "v_proj"))
    )
    whole = sum(info.num_elements for info in last.values())
    assert 0 < keys_and_values < prompt_work(checkpoint).skipped_macs == whole - keys_and_values
