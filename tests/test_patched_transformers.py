"""Code that replaces transformers' own for everybody counts: native layers would answer as if it had not."""

from __future__ import annotations

import functools

import pytest
import torch
from test_native_step import PROMPT
from toy_models import save_toy_model
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

import moe_offload


def doubled(function):
    """Twice what ``function`` returns, under its name and module."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

    return call


def patch_a_class(patch):
    patch.setattr(modeling.Qwen3MoeAttention, "forward", doubled(modeling.Qwen3MoeAttention.forward))


def patch_under_a_decorator_of_torch(patch):
    patch.setattr(
        modeling.Qwen3MoeAttention, "forward", torch.no_grad()(doubled(modeling.Qwen3MoeAttention.forward))
    )


def patch_the_model(patch):
    own = modeling.Qwen3MoeForCausalLM.forward

    @functools.wraps(own)
    def forward(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        output.logits = 2 * output.logits
        return output

    patch.setattr(modeling.Qwen3MoeForCausalLM, "forward", forward)


def patch_rotary_positions(patch):
    patch.setattr(modeling, "apply_rotary_pos_emb", doubled(modeling.apply_rotary_pos_emb))


def patch_attention_under_its_name(patch):
    patch.setitem(AttentionInterface._global_mapping, "sdpa", doubled(ALL_ATTENTION_FUNCTIONS["sdpa"]))


class OwnNorm(modeling.Qwen3MoeRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


PATCHES = (
    patch_a_class,
    patch_under_a_decorator_of_torch,
    patch_the_model,
    patch_rotary_positions,
    patch_attention_under_its_name,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_toy_model("qwen3_moe", tmp_path_factory.mktemp("patched"))


def logits_of(model):
    return model(PROMPT).logits, model(PROMPT, labels=PROMPT).logits  # the second by transformers' layers


@pytest.mark.parametrize("patch_code", PATCHES)
def test_what_is_patched_for_everybody_counts_whenever_it_was(folder, patch_code, monkeypatch):
    loaded_before = moe_offload.from_pretrained(folder, ram="8GiB", context=64)
    as_shipped, by_layers = logits_of(loaded_before)
    torch.testing.assert_close(as_shipped, by_layers, rtol=1e-3, atol=1e-3)
    with monkeypatch.context() as patch:
        patch_code(patch)
        loaded_after = moe_offload.from_pretrained(folder, ram="8GiB", context=64)
        for model in (loaded_before, loaded_after):
            patched, by_layers = logits_of(model)
            assert torch.equal(patched, by_layers)
            assert not torch.allclose(patched, as_shipped, atol=1e-2)
    for model in (loaded_before, loaded_after):
        assert torch.equal(model(PROMPT).logits, as_shipped), "what was taken back counts, too"
        model.offload.close()


def test_a_class_of_ones_own_in_transformers_file_is_called(folder, monkeypatch):
    monkeypatch.setattr(modeling, "Qwen3MoeRMSNorm", OwnNorm)
    model = moe_offload.from_pretrained(folder, ram="8GiB", context=64)
    natural, by_layers = logits_of(model)
    assert torch.equal(natural, by_layers)
    model.offload.close()
