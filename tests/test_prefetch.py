"""From routers to speculative reads: what is guessed, in which order, and that nothing else changes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from simulated_disk import FakeArena, SimulatedDisk, make_layouts, make_pool
from torch import Tensor, nn

from moe_offload.planning.eviction import LruPolicy
from moe_offload.predictors.cross_layer_gate import CrossLayerGate
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.prefetch import REST_AFTER_STEPS, Prefetcher
from moe_offload.stats import OffloadStats
from moe_offload.storage.expert_format import ExpertKey

HIDDEN_SIZE, NUM_EXPERTS, TOP_K = 16, 8, 2

# (transformers module, router class, configuration class, sizes that go by other names)
ROUTERS = [
    ("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", {"num_experts": NUM_EXPERTS}),
    ("mixtral", "MixtralTopKRouter", "MixtralConfig", {"num_local_experts": NUM_EXPERTS}),
    ("olmoe", "OlmoeTopKRouter", "OlmoeConfig", {"num_experts": NUM_EXPERTS}),
    (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        "DeepseekV2Config",
        {
            "num_experts": NUM_EXPERTS,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
    ),
    ("gpt_oss", "GptOssTopKRouter", "GptOssConfig", {"num_local_experts": NUM_EXPERTS}),
]


class Scripted:
    """A predictor that says what it was told."""

    def __init__(self, *keys: ExpertKey) -> None:
        self.keys, self.asked = keys, 0

    def predict(self, layer_idx: int, router_input: Any) -> tuple[ExpertKey, ...]:
        self.asked += 1
        return self.keys


def make_cache(num_slots: int) -> tuple[ExpertCache, SimulatedDisk, OffloadStats]:
    layouts = make_layouts(3, NUM_EXPERTS)
    disk, stats = SimulatedDisk(layouts), OffloadStats()
    pools = [make_pool(layouts, num_slots, TOP_K)]
    return ExpertCache(pools, layouts, disk, FakeArena(), LruPolicy, stats, top_k=TOP_K), disk, stats


def test_guesses_are_read_in_order_after_the_demands() -> None:
    cache, disk, _ = make_cache(10)
    prefetcher = Prefetcher(cache, Scripted(ExpertKey(1, 5), ExpertKey(1, 2)))
    step = cache.begin(0, [3])
    assert step is not None
    prefetcher.look_ahead(0, None)
    assert disk.submitted == [(0, 3), (1, 5), (1, 2)]
    assert [read.speculative for read in disk.reads.values()] == [False, True, True]
    cache.abort(step)


def test_what_the_router_contradicts_is_cancelled() -> None:
    cache, disk, stats = make_cache(10)
    prefetcher = Prefetcher(cache, Scripted(ExpertKey(1, 5), ExpertKey(1, 2)))
    prefetcher.look_ahead(0, None)
    prefetcher.routed(1, torch.tensor([2, 7]).numpy())
    assert disk.cancelled == [(1, 5)]
    assert stats.prefetch_cancelled == 1


@pytest.mark.parametrize(
    "off", [{"predictor": None}, {"predictor": Scripted(ExpertKey(1, 1)), "enabled": False}]
)
def test_a_prefetcher_that_is_off_reads_nothing(off: dict[str, Any]) -> None:
    cache, disk, _ = make_cache(10)
    prefetcher = Prefetcher(cache, **off)
    prefetcher.look_ahead(0, None)
    prefetcher.routed(1, [1])
    assert disk.submitted == []


def test_with_everything_resident_no_router_is_asked() -> None:
    cache, _, _ = make_cache(3 * NUM_EXPERTS)
    predictor = Scripted()
    prefetcher = Prefetcher(cache, predictor)
    prefetcher.look_ahead(0, None)
    for layer_idx in range(3):
        for _ in cache.stream(layer_idx, list(range(NUM_EXPERTS))):
            pass
    prefetcher.look_ahead(0, None)
    assert predictor.asked == 1


def test_prediction_rests_while_nothing_is_missed_and_wakes_with_a_miss() -> None:
    cache, _, _ = make_cache(10)
    predictor = Scripted()
    prefetcher = Prefetcher(cache, predictor)

    def run_step(expert_id: int) -> None:
        step = cache.begin(0, [expert_id])
        assert step is not None
        prefetcher.look_ahead(0, None)
        for pending in step.pending:
            cache.wait(step, pending)
        cache.end(step)

    for _ in range(3 * REST_AFTER_STEPS):
        run_step(4)
    assert predictor.asked == 1 + REST_AFTER_STEPS  # the first step missed
    run_step(5)
    assert predictor.asked == 2 + REST_AFTER_STEPS


def make_router(family: str, router_class: str, config_class: str, sizes: dict[str, Any]) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, config_class)(
        hidden_size=HIDDEN_SIZE, num_attention_heads=4, num_experts_per_tok=TOP_K, **sizes
    )
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    router: nn.Module = getattr(modeling, router_class)(config)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


@pytest.mark.parametrize("family", ROUTERS, ids=lambda family: family[0])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_the_guess_is_what_the_next_router_would_choose(family: tuple[Any, ...], num_tokens: int) -> None:
    torch.manual_seed(0)
    routers = {layer_idx: make_router(*family) for layer_idx in (1, 2, 4)}
    router_input = torch.randn(num_tokens, HIDDEN_SIZE)
    guesses = CrossLayerGate(routers).predict(2, router_input)
    _, weights, expert_ids = routers[4](router_input)
    assert {key.layer_idx for key in guesses} == {4}
    assert {key.expert_id for key in guesses} == set(expert_ids.reshape(-1).tolist())
    heaviest = expert_ids.reshape(-1)[weights.reshape(-1).argmax()]
    assert guesses[0] == (4, heaviest)


@pytest.mark.parametrize("family", ROUTERS, ids=lambda family: family[0])
def test_wider_guesses_leave_the_router_as_it_was(family: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    routers = {layer_idx: make_router(*family) for layer_idx in (0, 1)}
    router_input = torch.randn(1, HIDDEN_SIZE)
    before = [output.clone() for output in routers[1](router_input)]
    attributes = {name: value for name, value in vars(routers[1]).items() if not name.startswith("_")}
    wider = CrossLayerGate(routers, num_guesses=2 * TOP_K).predict(0, router_input)
    exact = CrossLayerGate(routers).predict(0, router_input)
    assert len(wider) == 2 * TOP_K and set(exact) <= set(wider)
    assert wider[:TOP_K] == exact
    assert all(map(torch.equal, before, routers[1](router_input)))
    assert attributes == {n: v for n, v in vars(routers[1]).items() if not n.startswith("_")}


def test_masked_out_groups_are_not_guessed() -> None:
    """DeepSeek-V2 chooses within topk_group groups: with more guesses asked, masked experts have weight 0."""
    torch.manual_seed(0)
    routers = {layer_idx: make_router(*ROUTERS[3]) for layer_idx in (0, 1)}
    guesses = CrossLayerGate(routers, num_guesses=NUM_EXPERTS).predict(0, torch.randn(1, HIDDEN_SIZE))
    assert len(guesses) == 4  # two groups of two experts


def test_depth_looks_further_and_the_last_layer_looks_nowhere() -> None:
    routers = {layer_idx: make_router(*ROUTERS[0]) for layer_idx in (0, 1, 2)}
    gate = CrossLayerGate(routers, depth=2)
    router_input = torch.randn(1, HIDDEN_SIZE)
    assert [key.layer_idx for key in gate.predict(0, router_input)] == [1, 1, 2, 2]
    assert [key.layer_idx for key in gate.predict(1, router_input)] == [2, 2]
    assert gate.predict(2, router_input) == []


def test_a_guess_needs_no_gradient_and_runs_no_hook() -> None:
    routers = {layer_idx: make_router(*ROUTERS[0]) for layer_idx in (0, 1)}
    calls: list[Tensor] = []
    routers[1].register_forward_hook(lambda module, args, output: calls.append(output))
    gate = CrossLayerGate(routers)
    with torch.enable_grad():
        gate.predict(0, torch.randn(1, HIDDEN_SIZE, requires_grad=True))
    assert calls == []


def test_a_guess_follows_a_router_whose_weights_change() -> None:
    routers = {layer_idx: make_router(*ROUTERS[0]) for layer_idx in (0, 1)}
    gate, router_input = CrossLayerGate(routers), torch.ones(1, HIDDEN_SIZE)
    with torch.no_grad():
        routers[1].get_parameter("weight").zero_()[6].fill_(1.0)
    assert gate.predict(0, router_input)[0] == (1, 6)
