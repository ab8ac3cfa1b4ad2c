"""Where a router speaks: no family that loads asks one before an attention, or by token id."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch import nn
from toy_models import save_toy_model
from transformers import AutoModelForCausalLM
from transformers.models.qwen2_moe import modeling_qwen2_moe
from walk_families import described, discover, text_configs, tiny_config

import moe_offload
from moe_offload.planning.prediction import StatelessPredictor
from moe_offload.predictors.exact import TokenLookahead
from moe_offload.runtime import skeleton
from moe_offload.storage.families import MOE_FAMILIES, MOE_FAMILIES_BY_TRIAL

PROMPT = torch.tensor([[11, 12, 13, 14]])
MIXERS = ("attention", "attn", "mamba", "mixer", "deltanet", "conv")  # what mixes tokens, by class names


def calls_of_a_forward(model: nn.Module) -> list[tuple[str, int]]:
    """Return ("router" | "mixer" | "experts", layer) in the order in which a prompt's forward begins them."""
    calls: list[tuple[str, int]] = []

    def note(module: nn.Module, kind: str, layer_idx: int) -> None:
        module.register_forward_pre_hook(lambda *args: calls.append((kind, layer_idx)))

    experts = skeleton.experts_modules(model)
    for layer_idx, layer in enumerate(skeleton.decoder_layers(model)):
        if layer_idx in experts:
            note(experts[layer_idx], "experts", layer_idx)
            note(router_of(layer), "router", layer_idx)
        for child in layer.modules():
            if any(word in type(child).__name__.lower() for word in MIXERS) and not isinstance(
                child, nn.Conv1d
            ):
                note(child, "mixer", layer_idx)
    with torch.no_grad():
        model(torch.arange(5)[None] + 11)
    return calls


def router_of(layer: nn.Module) -> nn.Module:
    """The sibling of the experts that is named as routers are."""
    for module in layer.modules():
        children = dict(module.named_children())
        if any(hasattr(child, "_apply_gate") for child in children.values()):
            return next(child for name, child in children.items() if name in ("gate", "router"))
    raise AssertionError("experts without a router")


def early_layers(calls: list[tuple[str, int]]) -> list[int]:
    """Return the layers with a mixer, of whatever layer, between their router and their experts."""
    early = []
    for position, (kind, layer_idx) in enumerate(calls):
        if kind == "router":
            until = calls.index(("experts", layer_idx), position)
            if any(between == "mixer" for between, _ in calls[position:until]):
                early.append(layer_idx)
    return early


def test_a_router_before_its_attention_would_be_seen():
    order = ["mixer", "router", "experts"], ["router", "mixer", "experts"]
    calls = [(kind, layer_idx) for layer_idx, kinds in enumerate(order) for kind in kinds]
    assert early_layers(calls) == [1]


@pytest.mark.slow
def test_no_family_that_loads_routes_before_an_attention_or_by_token_id():
    loads, by_token = {*MOE_FAMILIES, *MOE_FAMILIES_BY_TRIAL}, set()
    seen = set()
    for module, _ in discover():
        for config_class in text_configs(module):
            if config_class.model_type not in loads or config_class.model_type in seen:
                continue
            seen.add(config_class.model_type)
            with described(config_class.model_type):
                model = AutoModelForCausalLM.from_config(tiny_config(config_class)).eval()
                assert early_layers(calls_of_a_forward(model)) == [], config_class.model_type
                if "tid2eid" in inspect.getsource(module):
                    by_token.add(config_class.model_type)
    assert seen == loads
    assert by_token == set()  # deepseek_v4 has such layers, and is refused for the type of their table


class Counting(StatelessPredictor):
    """Says nothing, and counts the texts that it was told begin."""

    texts = 0

    def __init__(self, routers, *, depth):
        """As every predictor at an import path is made."""

    def new_sequence(self):
        Counting.texts += 1

    def predict(self, layer_idx, router_input, expert_ids, expert_weights):
        return ()


def test_every_text_of_a_run_is_announced(tmp_path, monkeypatch):
    monkeypatch.setattr(Counting, "texts", 0)
    save_toy_model("qwen3_moe", tmp_path)
    model = moe_offload.from_pretrained(
        tmp_path, experts="50%", ram="8GiB", context=64, predictor="test_early_routers:Counting"
    )
    for text in range(1, 3):
        model.generate(PROMPT, max_new_tokens=4, do_sample=False)
        assert Counting.texts == text
    model.offload.close()


class HashRouter(modeling_qwen2_moe.Qwen2MoeTopKRouter):
    """DeepSeek-V4's first layers in small: a table says which experts, the weights how much of each."""

    token_ids = torch.zeros(0, dtype=torch.long)  # of the forward pass that runs

    def __init__(self, config):
        super().__init__(config)
        generator = torch.Generator().manual_seed(1)
        table = torch.rand(config.vocab_size, config.num_experts, generator=generator)
        self.tid2eid = nn.Buffer(table.argsort(dim=1)[:, : config.num_experts_per_tok].contiguous())

    def forward(self, hidden_states):
        logits, _, _ = super().forward(hidden_states)
        expert_ids = self.tid2eid[HashRouter.token_ids.reshape(-1)[-len(logits) :]].long()
        return logits, logits.softmax(dim=-1).gather(1, expert_ids), expert_ids


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """A saved Qwen2-MoE whose first MoE layer of two routes by token id, and its class as long as needed."""
    block, embed, made = modeling_qwen2_moe.Qwen2MoeSparseMoeBlock, nn.Embedding.forward, []
    begin = block.__init__

    def begin_hashed(self, config):
        begin(self, config)
        if len(made) % 2 == 0:
            self.gate = HashRouter(config)
        made.append(self)

    def keep_ids(self, token_ids):
        HashRouter.token_ids = token_ids
        return embed(self, token_ids)

    monkeypatch.setattr(block, "__init__", begin_hashed)
    monkeypatch.setattr(nn.Embedding, "forward", keep_ids)
    save_toy_model("qwen2_moe", tmp_path)
    return tmp_path


@pytest.mark.parametrize("others", ["auto", "test_early_routers:Counting"])
def test_layers_that_route_by_token_id_are_read_with_certainty(hashed, others):
    """Where the other layers' predictor says nothing, no byte that is read ahead is wasted."""
    tokens = set()
    for experts, prefetch in (("all", False), ("50%", False), ("50%", True)):
        model = moe_offload.from_pretrained(
            hashed, experts=experts, ram="8GiB", context=64, prefetch=prefetch, predictor=others
        )
        tokens.add(str(model.generate(PROMPT, max_new_tokens=24, do_sample=False).tolist()))
        stats, predictor = model.offload.stats(), model.offload.prefetcher._predictor
        model.offload.close()
    assert len(tokens) == 1
    assert isinstance(predictor, TokenLookahead) and list(predictor._tables) == [1]
    (forecast,) = (f for f in predictor.begin_step(np.array([7])) if f.layer_idx == 1)
    assert set(np.flatnonzero(forecast.probabilities)) == set(predictor._tables[1][7])
    assert stats.prefetch_useful_bytes + stats.prefetch_late_bytes > 0
    assert others == "auto" or stats.prefetch_wasted_bytes == 0
