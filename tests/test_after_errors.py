"""A call that fails, by the caller's own code or mistake, leaves a model that answers as before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import moe_offload
from moe_offload.errors import ConfigError
from moe_offload.planning.eviction import make_policy

PROMPT = torch.tensor([[11, 12, 13, 14]])
METHODS = ("on_route", "on_insert", "on_evict", "victims")


class RaisingPolicy:
    """LRU that raises at one call of one method."""

    name = "raising"
    raise_in: tuple[str, int] = ("", 0)
    calls: dict[str, int]

    def __init__(self) -> None:
        self._policy = make_policy("lru")

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        number = RaisingPolicy.calls[method] = RaisingPolicy.calls.get(method, 0) + 1
        if (method, number) == RaisingPolicy.raise_in:
            raise RuntimeError(f"in {method}")
        return getattr(self._policy, method)(*args, **kwargs)

    def on_route(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("on_route", *args, **kwargs)

    def on_insert(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("on_insert", *args, **kwargs)

    def on_evict(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("on_evict", *args, **kwargs)

    def victims(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("victims", *args, **kwargs)


def answer(model: PreTrainedModel) -> list[int]:
    tokens: list[int] = model.generate(PROMPT, max_new_tokens=12, do_sample=False)[0].tolist()
    return tokens


@pytest.fixture(scope="module")
def model(tiny_moe) -> Iterator[PreTrainedModel]:
    model = moe_offload.from_pretrained(tiny_moe, ram="4GiB", experts="40%", context=128)
    yield model
    model.offload.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prefetch", [True, False])
def test_a_policy_that_raises_leaves_a_model_that_runs(tiny_moe, model, method, prefetch) -> None:
    """on_insert raises in the middle of a step's end: the step stayed open and every later call failed."""
    wanted = answer(model)
    policy = f"{__name__}:RaisingPolicy"
    RaisingPolicy.raise_in, RaisingPolicy.calls = ("", 0), {}
    own = moe_offload.from_pretrained(
        tiny_moe, ram="4GiB", experts="40%", context=128, policy=policy, prefetch=prefetch
    )
    for number in (1, 2, 5):
        RaisingPolicy.raise_in, RaisingPolicy.calls = (method, number), {}
        with pytest.raises(RuntimeError, match=f"in {method}"):
            for _ in range(20):
                answer(own)
        assert answer(own) == wanted
    own.offload.close()


def experts_of(model: PreTrainedModel) -> Any:
    return model.model.layers[0].mlp.experts


@pytest.mark.parametrize(
    ("num_tokens", "expert_id", "num_rows", "message"),
    [
        (2, 8, 2, "has 8 experts and no expert 8"),
        (2, -1, 2, "has 8 experts and no expert -1"),
        (40, 99, 40, "has 8 experts and no expert 99"),
        (2, 0, 3, "are not"),
    ],
)
def test_experts_that_do_not_exist_are_refused(model, num_tokens, expert_id, num_rows, message) -> None:
    """A router of one's own may ask for them; the log took them, and failed for good when it was packed."""
    wanted = answer(model)
    hidden: Tensor = torch.zeros(num_tokens, model.config.hidden_size)
    ids, weights = torch.full((num_rows, 2), expert_id), torch.ones(num_rows, 2)
    with pytest.raises(ConfigError, match=message):
        experts_of(model)(hidden, ids, weights)
    assert answer(model) == wanted
    assert model.offload.stats(belady=True).hits > 0


def test_gradients_are_refused_and_not_left_out(model) -> None:
    wanted = answer(model)
    embeds = torch.zeros(1, 3, model.config.hidden_size, requires_grad=True)
    with pytest.raises(ConfigError, match="gradients are not possible"):
        model(inputs_embeds=embeds)
    with torch.no_grad():
        assert torch.isfinite(model(inputs_embeds=embeds).logits).all()
    for call in (model.requires_grad_, model.enable_input_require_grads):
        with pytest.raises(ConfigError, match="train with transformers"):
            call()
    assert model.requires_grad_(False) is model
    assert answer(model) == wanted


def test_a_closed_model_hands_out_no_cache(tiny_moe) -> None:
    closed = moe_offload.from_pretrained(tiny_moe, ram="4GiB", context=128)
    closed.offload.close()
    with pytest.raises(ConfigError, match="was closed"):
        closed.offload.new_cache(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"profile": 3}, "profile must be a name or a file, got 3"),
        ({"ram": float("nan")}, "nan is not an amount of memory"),
        ({"policy": "LRU"}, "did you mean 'lru'"),
        ({"policy": "horizn"}, "did you mean 'horizon'"),
        ({"predictor": "cross_layer_gat"}, "did you mean 'cross_layer_gate'"),
        ({"scheduler": "hybird"}, "did you mean 'hybrid'"),
    ],
)
def test_arguments_that_are_nearly_right_are_named(tiny_moe, arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        moe_offload.from_pretrained(tiny_moe, **{"ram": "4GiB", **arguments})
