"""From routers to speculative reads: what is guessed, in which order, and that nothing else changes."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from simulated_disk import FakeArena, SimulatedDisk, make_layouts, make_pool
from torch import Tensor, nn

from moe_offload._native import gate_chances
from moe_offload.planning.eviction import LruPolicy
from moe_offload.planning.layer_pace import REST_AFTER_STEPS
from moe_offload.planning.prediction import Forecast, StatelessPredictor, expected_keys, used_by_any
from moe_offload.predictors.cross_layer_gate import CrossLayerGate
from moe_offload.predictors.native_gate import NativeGate
from moe_offload.predictors.routers import Curve, RouterScores, probabilities
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.residency.prefetch import Prefetcher
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


NOTHING = np.zeros((1, 0), np.int64), np.zeros((1, 0), np.float32)  # ids and weights of a made-up step


class Scripted(StatelessPredictor):
    """A predictor that is sure of what it was told, the first the surest."""

    def __init__(self, *keys: ExpertKey) -> None:
        self.keys, self.asked = keys, 0
        self.observed: list[list[int]] = []

    def observe(self, layer_idx: int, expert_ids: Any, expert_weights: Any) -> None:
        self.observed.append([layer_idx, *expert_ids.reshape(-1).tolist()])

    def predict(
        self, layer_idx: int, router_input: Any, expert_ids: Any, expert_weights: Any
    ) -> list[Forecast]:
        self.asked += 1
        forecasts = {key.layer_idx: np.zeros(NUM_EXPERTS, np.float32) for key in self.keys}
        for rank, key in enumerate(self.keys):
            forecasts[key.layer_idx][key.expert_id] = 1.0 - 0.01 * rank
        return [Forecast(layer_idx, forecasts[layer_idx]) for layer_idx in sorted(forecasts)]


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
    prefetcher.look_ahead(0, None, *NOTHING)
    assert disk.submitted == [(0, 3), (1, 5), (1, 2)]
    assert [read.speculative for read in disk.reads.values()] == [False, True, True]
    cache.abort(step)


def test_what_the_router_contradicts_is_cancelled() -> None:
    cache, disk, stats = make_cache(10)
    prefetcher = Prefetcher(cache, Scripted(ExpertKey(1, 5), ExpertKey(1, 2)))
    prefetcher.look_ahead(0, None, *NOTHING)
    prefetcher.routed(1, [2, 7], np.array([[7, 2]]), np.array([[0.6, 0.4]], np.float32))
    assert disk.cancelled == [(1, 5)]
    assert stats.prefetch_cancelled == 1


@pytest.mark.parametrize(
    "off", [{"predictor": None}, {"predictor": Scripted(ExpertKey(1, 1)), "enabled": False}]
)
def test_a_prefetcher_that_is_off_reads_nothing(off: dict[str, Any]) -> None:
    cache, disk, _ = make_cache(10)
    prefetcher = Prefetcher(cache, **off)
    prefetcher.look_ahead(0, None, *NOTHING)
    prefetcher.routed(1, [1], np.array([[1]]), np.ones((1, 1), np.float32))
    assert disk.submitted == []


def test_with_everything_resident_no_router_is_asked() -> None:
    cache, _, _ = make_cache(3 * NUM_EXPERTS)
    predictor = Scripted()
    prefetcher = Prefetcher(cache, predictor)
    prefetcher.look_ahead(0, None, *NOTHING)
    for layer_idx in range(3):
        for _ in cache.stream(layer_idx, list(range(NUM_EXPERTS))):
            pass
    prefetcher.look_ahead(0, None, *NOTHING)
    assert predictor.asked == 1


def test_prediction_rests_while_nothing_is_missed_and_wakes_with_a_miss() -> None:
    cache, _, _ = make_cache(10)
    predictor = Scripted()
    prefetcher = Prefetcher(cache, predictor)

    def run_step(expert_id: int) -> None:
        step = cache.begin(0, [expert_id])
        assert step is not None
        prefetcher.look_ahead(0, None, *NOTHING)
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


def guesses(gate: CrossLayerGate, layer_idx: int, router_input: Tensor) -> list[ExpertKey]:
    return expected_keys(gate.predict(layer_idx, router_input, *NOTHING))


@pytest.mark.parametrize("family", ROUTERS, ids=lambda family: family[0])
def test_the_most_probable_are_what_the_next_router_would_choose(family: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    routers = {layer_idx: make_router(*family) for layer_idx in (1, 2, 4)}
    gate = CrossLayerGate(routers)
    for router_input in torch.randn(20, 1, HIDDEN_SIZE):
        forecasts = gate.predict(2, router_input, *NOTHING)
        assert [forecast.layer_idx for forecast in forecasts] == [4]
        best = np.argsort(-forecasts[0].probabilities)[:TOP_K]
        assert set(best.tolist()) == set(routers[4](router_input)[2][0].tolist())


@pytest.mark.parametrize("family", ROUTERS, ids=lambda family: family[0])
def test_asking_leaves_the_router_as_it_was(family: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    routers = {layer_idx: make_router(*family) for layer_idx in (0, 1)}
    router_input = torch.randn(1, HIDDEN_SIZE)
    before = [output.clone() for output in routers[1](router_input)]
    attributes = {name: value for name, value in vars(routers[1]).items() if not name.startswith("_")}
    guesses(CrossLayerGate(routers), 0, router_input)
    assert all(map(torch.equal, before, routers[1](router_input)))
    assert attributes == {n: v for n, v in vars(routers[1]).items() if not n.startswith("_")}


def test_a_batch_uses_an_expert_where_any_token_does() -> None:
    chances = np.array([[0.5, 0.0, 1.0], [0.5, 0.25, 0.0]], np.float32)
    assert used_by_any(chances).tolist() == [0.75, 0.25, 1.0]
    routers = {layer_idx: make_router(*ROUTERS[0]) for layer_idx in (0, 1)}
    gate, router_input = CrossLayerGate(routers), torch.randn(3, HIDDEN_SIZE)
    together = gate.predict(0, router_input, *NOTHING)[0].probabilities
    for row in router_input:
        alone = gate.predict(0, row[None], *NOTHING)[0].probabilities
        assert (together >= alone - 1e-6).all()


def test_depth_looks_further_and_the_last_layer_looks_nowhere() -> None:
    routers = {layer_idx: make_router(*ROUTERS[0]) for layer_idx in (0, 1, 2)}
    gate = CrossLayerGate(routers, depth=2)
    router_input = torch.randn(1, HIDDEN_SIZE)
    assert [forecast.layer_idx for forecast in gate.predict(0, router_input, *NOTHING)] == [1, 2]
    assert [forecast.layer_idx for forecast in gate.predict(1, router_input, *NOTHING)] == [2]
    assert gate.predict(2, router_input, *NOTHING) == []


def test_a_guess_needs_no_gradient_and_runs_no_hook() -> None:
    routers = {layer_idx: make_router(*ROUTERS[0]) for layer_idx in (0, 1)}
    calls: list[Tensor] = []
    routers[1].register_forward_hook(lambda module, args, output: calls.append(output))
    gate = CrossLayerGate(routers)
    with torch.enable_grad():
        guesses(gate, 0, torch.randn(1, HIDDEN_SIZE, requires_grad=True))
    assert calls == []


def test_a_guess_follows_a_router_whose_weights_change() -> None:
    routers = {layer_idx: make_router(*ROUTERS[0]) for layer_idx in (0, 1)}
    gate, router_input = CrossLayerGate(routers), torch.ones(1, HIDDEN_SIZE)
    with torch.no_grad():
        routers[1].get_parameter("weight").zero_()[6].fill_(1.0)
    assert gate.predict(0, router_input, *NOTHING)[0].probabilities.argmax() == 6


def test_the_predictor_sees_what_routers_chose_also_while_it_rests() -> None:
    cache, _, _ = make_cache(10)
    predictor = Scripted()
    prefetcher = Prefetcher(cache, predictor)
    for _ in range(2 * REST_AFTER_STEPS):
        prefetcher.routed(1, [2, 7], np.array([[7, 2]]), np.array([[0.6, 0.4]], np.float32))
    assert predictor.observed == [[1, 7, 2]] * (2 * REST_AFTER_STEPS)


@pytest.mark.parametrize("family", ROUTERS, ids=lambda family: family[0])
def test_one_token_natively_is_what_the_formula_says(family: tuple[Any, ...]) -> None:
    """Routers that rank by float32 logits are asked in native code; numpy's way is the oracle."""
    torch.manual_seed(0)
    router = RouterScores(make_router(*family))
    curve = Curve(3.0, -0.25)
    if not NativeGate.serves(router):
        assert family[0] == "deepseek_v2", "only groups keep a router from being asked natively"
        return
    native = NativeGate(router, curve)
    for router_input in torch.randn(20, 1, HIDDEN_SIZE):
        expected = probabilities(router(router_input), router.top_k, curve)[0]
        assert np.allclose(native(router_input), expected, atol=1e-5)
        assert np.allclose(native(router_input.bfloat16()), native(router_input.bfloat16().float()))
    narrow = RouterScores(make_router(*family).bfloat16())
    if NativeGate.serves(
        narrow
    ):  # a choice among bfloat16 logits has ties, which the quick way need not break
        native = NativeGate(narrow, curve)
        for router_input in torch.randn(20, 1, HIDDEN_SIZE):
            expected = probabilities(narrow(router_input), narrow.top_k, curve)[0]
            assert np.allclose(native(router_input), expected, atol=1e-5)


def test_a_native_question_of_wrong_shapes_is_refused() -> None:
    weight = np.zeros((4, HIDDEN_SIZE), np.float32)
    for bad in ({"top_k": 4}, {"top_k": 0}, {"bias": np.zeros(3, np.float32)}, {"weight": weight[0]}):
        arguments = {"hidden": 0, "weight": weight, "bias": None, "top_k": 1, "slope": 1.0, "offset": 0.0}
        with pytest.raises(ValueError, match="gate_chances"):
            gate_chances(**{**arguments, **bad})
