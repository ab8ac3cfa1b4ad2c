"""How long a prompt's chunks are: what there is memory for, the same bits for any length, and as planned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_native_step import FAMILIES, load
from toy_models import save_toy_model

import moe_offload
from moe_offload.config import DEMO_MODEL, MIB, ModelSpec
from moe_offload.planning.cost_model import workspace_bytes
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.prompt_chunks import (
    LONGEST_CHUNK_TOKENS,
    constant_chunks,
    even_chunks,
    first_needed,
    longest_chunk,
    native_prompt_bytes,
    prompt_room_bytes,
)
from moe_offload.prompt_outlook import chunk_sizes
from moe_offload.replay import replay
from moe_offload.runtime.expert_calls import CALL_MACS, EXPERT_PAIRS, expert_calls, in_pieces
from moe_offload.storage.checkpoint import open_checkpoint

SPEC = ModelSpec("qwen3_moe", 2048, 2, 1000, 40960, 128, 8, 768, (0, 1), (1024, 1024))
CONFIG = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144}
TOKENS = 1100


def test_chunks_are_even_and_as_few_as_possible() -> None:
    assert even_chunks(5000, 4096) == [2500, 2500]
    assert even_chunks(4096, 4096) == [4096] and even_chunks(4097, 4096) == [2048, 2049]
    assert even_chunks(10, 4) == [3, 3, 4] and even_chunks(1, 512) == [1]
    constant = [constant_chunks(n) for n in (1, 511, 512, 513, 1100)]
    assert constant == [[1], [511], [512], [512, 1], [512, 512, 76]]


def test_a_last_layer_is_computed_for_all_where_its_experts_are_still_to_come() -> None:
    assert first_needed(100, 1, num_newcomers=8, top_k=8) == 99
    assert first_needed(100, 1, num_newcomers=9, top_k=8) == 0
    assert first_needed(100, 100, num_newcomers=0, top_k=8) == 0


@given(num_tokens=st.integers(1, 10**5), longest=st.integers(200, 10**4))
def test_any_prompt_is_cut_evenly(num_tokens: int, longest: int) -> None:
    sizes = even_chunks(num_tokens, longest)
    assert sum(sizes) == num_tokens and len(sizes) == -(-num_tokens // longest)
    assert max(sizes) <= longest and max(sizes) - min(sizes) <= 1


def test_a_token_of_a_chunk_is_counted_by_hand() -> None:
    # Residual, router input and a copy of it, angles; quantized: 2 + 1/8 + 1/8 + 1.5 bytes a number.
    token_bytes = 4 * (3 * 2048 + 128) + 2048 * 15 // 4 + 8 * 64 + 64
    # A tile: query and context of 4096, key and value of 512, 128 scores; an expert's 6144 intermediates.
    tile_bytes = 512 * (4 * (2 * 4096 + 2 * 512 + 128) + 4096 * 15 // 4)
    expert_bytes = 512 * (4 * 6144 + 6144 * 15 // 4)
    assert native_prompt_bytes(SPEC, CONFIG) == (tile_bytes + expert_bytes + 4 * MIB, token_bytes)


def test_the_longest_chunk_fills_what_512_tokens_of_layers_would_take() -> None:
    longest = longest_chunk(SPEC, CONFIG, 4096)
    tile_bytes, token_bytes = native_prompt_bytes(SPEC, CONFIG)
    room_bytes = prompt_room_bytes(SPEC, CONFIG, 4096)
    assert tile_bytes + longest * token_bytes <= room_bytes < tile_bytes + (longest + 1) * token_bytes
    assert 4096 < longest < LONGEST_CHUNK_TOKENS
    assert room_bytes == workspace_bytes(SPEC, CONFIG, context_tokens=4096, stores_scores=False) - 32 * MIB
    assert longest_chunk(SPEC, CONFIG, 40960) == LONGEST_CHUNK_TOKENS


@given(
    hidden_size=st.sampled_from([64, 576, 2048, 4096, 7168]),
    intermediate=st.sampled_from([64, 768, 2880, 14336]),
    heads=st.sampled_from([(8, 8), (32, 4), (64, 8)]),
    context_tokens=st.integers(1, 131072),
)
def test_a_chunk_never_needs_more_than_the_budget_holds(
    hidden_size, intermediate, heads, context_tokens
) -> None:
    spec = replace(SPEC, hidden_size=hidden_size, moe_intermediate_size=intermediate)
    config = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 64}
    longest = longest_chunk(spec, config, context_tokens)
    tile_bytes, token_bytes = native_prompt_bytes(spec, config)
    fits = tile_bytes + longest * token_bytes <= prompt_room_bytes(spec, config, context_tokens)
    assert longest == 512 or (fits and 512 < longest <= LONGEST_CHUNK_TOKENS)
    assert longest <= longest_chunk(spec, config, context_tokens + 1)


@given(counts=st.lists(st.integers(1, 3000), min_size=1, max_size=20), first=st.integers(0, 99))
def test_experts_come_in_pieces_and_in_order(counts: list[int], first: int) -> None:
    offsets = (first + np.cumsum([0, *counts])).astype(np.int32)
    positions, cuts = in_pieces(offsets, EXPERT_PAIRS)
    assert cuts[0] == offsets[0] and cuts[-1] == offsets[-1]
    assert np.diff(cuts).min() > 0 and np.diff(cuts).max() <= EXPERT_PAIRS
    expert_of_pair = np.repeat(np.arange(len(counts)), counts)
    assert np.array_equal(np.repeat(positions, np.diff(cuts)), expert_of_pair)
    calls = list(expert_calls(offsets, CALL_MACS // 1000))
    assert np.array_equal(np.concatenate([which for which, _ in calls]), positions)
    assert [int(part[-1] - part[0]) <= 1000 for _, part in calls] == [True] * len(calls)
    assert [int(part[0]) for _, part in calls[1:]] == [int(part[-1]) for _, part in calls[:-1]]


def last_logits(model, ids, longest):
    """The logits of a prompt's last tokens, in chunks of at most ``longest``, and the sizes of its chunks."""
    sizes = []
    model.offload.native_step._longest_chunk = longest
    begin = model.offload.begin_chunk
    model.offload.begin_chunk = lambda start, size, total: (sizes.append(size), begin(start, size, total))
    logits = model(ids, logits_to_keep=30).logits
    del model.offload.begin_chunk
    return logits, sizes[1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_length_of_chunk_gives_the_same_bits(family, tmp_path):
    """Windows, sinks and dense layers included; with every expert in memory, and with as few as can be."""
    folder = save_toy_model(family, tmp_path, max_position_embeddings=2048)
    ids = torch.randint(3, 97, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model = load(folder, context=TOKENS, experts="all", prefetch=False)
        expected, sizes = last_logits(model, ids, 512)
        assert sizes == [366, 367, 367]
        model.offload.close()
        model = load(folder, context=TOKENS, experts=4, prefetch=False)
        read = [0]
        for longest in (1024, 1021, 400, TOKENS):
            logits, sizes = last_logits(model, ids, longest)
            assert torch.equal(logits, expected) and sizes == even_chunks(TOKENS, longest)
            read.append(model.offload.stats().stream_bytes)
        model.offload.cache.check()
        model.offload.close()
    whole, thirds = read[4] - read[3], read[3] - read[2]
    assert whole < thirds / 2, "experts are read once for a chunk, and one chunk is a third of three"


def test_an_interrupt_does_not_wait_for_a_chunk_and_leaves_nothing_of_it(tmp_path, monkeypatch):
    model = load(
        save_toy_model("qwen3_moe", tmp_path, max_position_embeddings=2048),
        context=TOKENS,
        experts=4,
        prefetch=False,
    )
    ids, cache = torch.arange(TOKENS)[None] % 90 + 3, model.offload.new_cache(TOKENS)
    prompt = model.offload.native_step._prompt
    step, tiles = prompt.step, []

    class Interrupted:
        """Ctrl-C in the second tile of a layer, with experts of the layers before in the slots."""

        def __getattr__(self, name):
            return getattr(step, name)

        def attend(self, layer, *rest):
            step.attend(layer, *rest)
            tiles.append((layer, *rest[-3:-1]))
            if tiles[-1][:2] == (2, 512):
                raise KeyboardInterrupt

    with torch.no_grad():
        expected = model(ids, logits_to_keep=1).logits
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(prompt, "step", Interrupted())
            model(ids, past_key_values=cache, logits_to_keep=1)
        assert tiles[:4] == [(0, 0, 512), (0, 512, 512), (0, 1024, 76), (1, 0, 512)]
        assert cache.get_seq_length() == 0
        model.offload.cache.check()
        assert torch.equal(model(ids, past_key_values=cache, logits_to_keep=1).logits, expected)
    model.offload.close()


def test_replaying_a_long_prompt_gives_the_runs_counters_and_plans_cut_it_alike():
    model = moe_offload.from_pretrained(
        ram="8GiB", experts="12%", policy="ewma", prefetch=False, context=950, warm_start=False
    )
    ids = torch.randint(5, 8000, (1, 900), generator=torch.Generator().manual_seed(1))
    with model.offload.trace() as recorder:
        model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    trace, stats = recorder.trace(), model.offload.stats()
    checkpoint = open_checkpoint(DEMO_MODEL)
    planned = chunk_sizes(checkpoint, 900, context_tokens=950, is_native=True, has_device=False)
    assert trace.step_tokens.tolist()[:-5] == planned == [900]
    expert_bytes = {int(i): n for i, n in trace.metadata["expert_bytes"].items()}
    replayed = replay(trace, model.offload.plan.pools, lambda: make_policy("ewma"), expert_bytes)
    for name in ("hits", "misses", "demand_bytes", "stream_bytes", "evictions"):
        assert getattr(replayed, name) == getattr(stats, name), name
    layers = chunk_sizes(checkpoint, 900, context_tokens=950, is_native=False, has_device=False)
    assert layers == [512, 388]
    assert layers == chunk_sizes(checkpoint, 900, context_tokens=950, is_native=True, has_device=True)
    model.offload.close()
