"""Layers with a running state: counted in the budget, reordered with beams, never cropped."""

from __future__ import annotations

import pytest
import torch
from toy_models import plain_model, save_toy_model

import moe_offload
from moe_offload import BudgetError, ConfigError
from moe_offload.planning.cost_model import state_bytes, state_tokens
from moe_offload.planning.placement import plan_placement
from moe_offload.runtime.state_layer import StateLayer

PROMPT = torch.tensor([[21, 22, 23, 24, 25, 26, 27]])
GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module", params=["qwen3_next", "lfm2_moe", "granitemoehybrid"])
def pair(request, tmp_path_factory):
    folder = save_toy_model(request.param, tmp_path_factory.mktemp(request.param))
    offloaded = moe_offload.from_pretrained(folder, experts="50%", ram="8GiB", context=512)
    yield plain_model(folder), offloaded
    offloaded.offload.close()


def test_the_state_is_what_the_plan_says(pair):
    """The plan counts float32; the toy models are float32."""
    _, offloaded = pair
    cache = offloaded.offload.new_cache()
    with torch.no_grad():
        offloaded(PROMPT, past_key_values=cache)
    held = sum(
        state.nbytes
        for layer in cache.layers
        if isinstance(layer, StateLayer)
        for state in (*layer.conv_states.values(), *layer.recurrent_states.values())
        if state is not None
    )
    assert held == state_bytes(offloaded.offload.spec) > 0


def test_the_plan_has_room_for_the_state(pair):
    _, offloaded = pair
    spec = offloaded.offload.spec
    costs = {"ram_bytes": 1 << 30, "base_bytes": 0, "dense_bytes": 0, "kv_bytes_per_element": 4}
    plans = [plan_placement(spec, {}, context_tokens=tokens, **costs).kv_bytes for tokens in (100, 200)]
    assert plans[0] - (plans[1] - plans[0]) == state_bytes(spec)


def test_beams_equal_plain_transformers(pair):
    plain, offloaded = pair
    kwargs = {"num_beams": 3, "max_new_tokens": 12, **GREEDY}
    assert torch.equal(offloaded.generate(PROMPT, **kwargs), plain.generate(PROMPT, **kwargs))


def test_more_sequences_take_the_place_of_tokens(pair):
    _, offloaded = pair
    handle = offloaded.offload
    one_state = state_tokens(handle.spec, bytes_per_element=4)
    assert one_state > 0
    handle.new_cache(512, 1)
    handle.new_cache((512 - one_state) // 2, 2)
    with pytest.raises(BudgetError, match=rf"each sequence's running state counts as {one_state} of them"):
        handle.new_cache((512 - one_state) // 2 + 1, 2)


def test_a_running_state_is_not_cropped(pair):
    _, offloaded = pair
    cache = offloaded.offload.new_cache()
    with torch.no_grad():
        offloaded(PROMPT, past_key_values=cache)
    assert not cache.can_forget
    cache.crop_to(PROMPT.shape[1])
    with pytest.raises(ConfigError, match="keeps a running state, which cannot forget tokens"):
        cache.crop_to(3)
    with pytest.raises(ValueError, match=r"keeps a running state|stateful models"):
        offloaded.generate(PROMPT, prompt_lookup_num_tokens=2, max_new_tokens=12, **GREEDY)
    cache.reset()
    with torch.no_grad():
        again = offloaded(PROMPT, past_key_values=cache).logits
        assert torch.equal(again, offloaded(PROMPT, use_cache=False).logits)
