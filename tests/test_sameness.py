"""Placement changes time, never tokens: one sequence under every budget, policy, prefetch and thread count.

The trained demo model is used, because random routing would hardly stress a cache.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from three_way import read_dense, read_experts
from transformers import AutoConfig, AutoModelForCausalLM

import moe_offload
from moe_offload import ops
from moe_offload.config import DEMO_MODEL
from moe_offload.storage.checkpoint import open_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "bench" / "demo_model"))  # not before tests/reference.py
from dequantize_gguf import dequantize_gguf

PROMPT = "In the spring of that year the engineers began to measure the old bridge, and"
NUM_TOKENS = 20
TOP_K = 4

# (experts, policy, prefetch, threads): from one token's experts of one layer to all of them
PLACEMENTS = [
    (TOP_K, "ewma", True, 2),
    (TOP_K, "lru", False, 1),
    (TOP_K + 1, "horizon", True, 2),
    (11, "lru", True, 2),
    ("12%", "ewma", False, 2),
    ("25%", "horizon", True, 2),
    ("25%", "lru", False, 1),
    ("50%", "lru", True, 3),
    ("all", "ewma", False, 2),
    ("all", "ewma", True, 1),
]


def run(model, prompt_ids):
    """Return the greedy continuation and the logits of every step."""
    out = model.generate(
        prompt_ids,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits)


@pytest.fixture(scope="module")
def prompt_ids():
    return moe_offload.load_tokenizer(DEMO_MODEL)(PROMPT, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def whole(prompt_ids):
    """What the model gives with everything in memory."""
    model = moe_offload.from_pretrained(ram="8GiB", experts="all", prefetch=False, context=128)
    result = run(model, prompt_ids)
    model.offload.close()
    return result


@pytest.mark.parametrize(("experts", "policy", "prefetch", "threads"), PLACEMENTS)
def test_every_placement_gives_the_same_tokens_and_logits(
    whole, prompt_ids, experts, policy, prefetch, threads
):
    before = ops.num_threads()
    try:
        model = moe_offload.from_pretrained(
            ram="8GiB", experts=experts, policy=policy, prefetch=prefetch, num_threads=threads, context=128
        )
        tokens, logits = run(model, prompt_ids)
        model.offload.cache.check()
        stats = model.offload.stats()
        model.offload.close()
    finally:
        ops.set_num_threads(before)
    assert torch.equal(tokens, whole[0])
    assert torch.equal(logits, whole[1]), "the tokens agree but their logits do not, to the bit"
    assert stats.misses or experts == "all", "the budget was meant to be too small"


def test_a_continued_cache_gives_the_same_tokens(whole, prompt_ids):
    model = moe_offload.from_pretrained(ram="8GiB", experts="25%", context=128)
    cache = model.offload.new_cache(100)
    kwargs = {"do_sample": False, "eos_token_id": None, "past_key_values": cache}
    tokens = model.generate(prompt_ids[:, :7], max_new_tokens=1, **kwargs)  # fills the cache
    cache.crop_to(7)
    tokens = model.generate(prompt_ids, max_new_tokens=8, **kwargs)
    tokens = model.generate(tokens, max_new_tokens=NUM_TOKENS - 8, **kwargs)
    model.offload.close()
    assert torch.equal(tokens, whole[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The demo model's weights as a float32 folder and as an F32 GGUF of the same numbers."""
    folder = tmp_path_factory.mktemp("trained")
    dequantize_gguf(DEMO_MODEL, folder / "model-f32.gguf")
    checkpoint = open_checkpoint(DEMO_MODEL)
    weights = {name: read_dense(checkpoint, info) for name, info in checkpoint.dense.items()}
    (folder / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    save_file(weights | read_experts(checkpoint, model), folder / "model.safetensors")
    return folder


def test_safetensors_and_gguf_of_the_same_weights_give_the_same_bits(exported, prompt_ids):
    results = []
    for path in (exported, exported / "model-f32.gguf"):
        model = moe_offload.from_pretrained(path, ram="8GiB", experts="25%", context=128)
        results.append(run(model, prompt_ids))
        model.offload.close()
    (folder_tokens, folder_logits), (gguf_tokens, gguf_logits) = results
    assert torch.equal(folder_tokens, gguf_tokens)
    assert torch.equal(folder_logits, gguf_logits)
