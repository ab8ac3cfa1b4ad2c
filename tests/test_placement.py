"""Budget arithmetic: it adds up, it is monotone, and the named smallest budget is the smallest."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_disk import make_layouts

from moe_offload.config import GIB, MIB, ModelSpec, parse_bytes
from moe_offload.errors import BudgetError
from moe_offload.planning.cost_model import activation_bytes, attention_bytes, kv_bytes
from moe_offload.planning.placement import (
    FixedCosts,
    budgets_table,
    cold_cache_warning,
    plan_placement,
    smallest_ram_bytes,
)
from moe_offload.planning.plans import PlacementPlan, PoolPlan
from moe_offload.planning.slots import staging_slots, with_staging
from moe_offload.storage.expert_format import ExpertLayout, GgmlType, MatrixFormat, RowOrder


def make_spec(num_layers: int = 4, num_experts: int = 8, top_k: int = 2) -> ModelSpec:
    return ModelSpec(
        model_type="qwen3_moe",
        hidden_size=32,
        num_hidden_layers=num_layers,
        vocab_size=100,
        max_position_embeddings=1024,
        num_experts=num_experts,
        top_k=top_k,
        moe_intermediate_size=16,
        moe_layers=tuple(range(num_layers)),
        kv_elements_per_token=(64,) * num_layers,
    )


FIXED = {"base_bytes": 300_000, "dense_bytes": 100_000, "context_tokens": 128, "kv_bytes_per_element": 2}


def plan(
    ram_bytes: int,
    *,
    spec: ModelSpec | None = None,
    layouts: dict[int, ExpertLayout] | None = None,
    expert_cap: int | None = None,
) -> PlacementPlan:
    spec = spec or make_spec()
    return plan_placement(
        spec,
        layouts if layouts is not None else make_layouts(4, 8, (16, 96)),
        ram_bytes=ram_bytes,
        expert_cap=expert_cap,
        reader_bytes=1000,
        activation_bytes=2000,
        **FIXED,
    )


def smallest_named(error: BudgetError) -> int:
    match = re.search(r"the smallest ram that would do is ([0-9.]+) GiB \((\d+) bytes\)", str(error))
    assert match is not None, error
    assert parse_bytes(f"{match[1]}GiB") >= int(match[2])  # typed back, the rounded figure is enough
    return int(match[2])


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelSpec, dict[int, ExpertLayout]]:
    num_layers, num_experts = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    sizes = draw(st.lists(st.sampled_from([16, 64, 256, 1024]), min_size=1, max_size=3))
    spec = make_spec(num_layers, num_experts, draw(st.integers(1, num_experts)))
    return spec, make_layouts(num_layers, num_experts, tuple(sizes))


@given(models())
def test_the_smallest_named_budget_works_and_one_byte_less_does_not(
    model: tuple[ModelSpec, dict[int, ExpertLayout]],
) -> None:
    spec, layouts = model
    with pytest.raises(BudgetError) as refusal:
        plan(1, spec=spec, layouts=layouts)
    smallest = smallest_named(refusal.value)
    least = plan(smallest, spec=spec, layouts=layouts)
    assert least.total_bytes == smallest
    assert all(pool.num_slots >= spec.top_k for pool in least.pools)
    with pytest.raises(BudgetError) as refusal:
        plan(smallest - 1, spec=spec, layouts=layouts)
    assert smallest_named(refusal.value) == smallest


@given(models(), st.integers(0, 4_000_000), st.integers(0, 200_000), st.none() | st.integers(1, 72))
def test_a_plan_stays_within_its_budget_and_more_memory_is_never_less_anywhere(
    model: tuple[ModelSpec, dict[int, ExpertLayout]], extra: int, more: int, cap: int | None
) -> None:
    spec, layouts = model
    with pytest.raises(BudgetError) as refusal:
        plan(1, spec=spec, layouts=layouts)
    ram_bytes = smallest_named(refusal.value) + extra
    least_experts = sum(pool.num_slots for pool in plan(ram_bytes - extra, spec=spec, layouts=layouts).pools)
    cap = None if cap is None else max(cap, least_experts)
    small = plan(ram_bytes, spec=spec, layouts=layouts, expert_cap=cap)
    large = plan(ram_bytes + more, spec=spec, layouts=layouts, expert_cap=cap)
    assert small.total_bytes <= ram_bytes
    for pool, larger in zip(small.pools, large.pools, strict=True):
        assert pool.num_slots <= larger.num_slots <= pool.num_experts
        assert pool.num_slots - pool.num_staging <= larger.num_slots - larger.num_staging
        assert 0 <= pool.num_staging <= pool.num_slots
    if cap is not None:
        assert sum(pool.num_slots for pool in large.pools) <= cap
    slots, experts = (
        sum(pool.num_slots for pool in small.pools),
        sum(pool.num_experts for pool in small.pools),
    )
    if slots < min(experts, cap or experts):  # what is left would not hold another expert of the largest size
        assert ram_bytes - small.total_bytes < max(pool.slot_bytes for pool in small.pools)


def test_every_layer_is_in_the_pool_of_its_slot_size() -> None:
    layouts = make_layouts(4, 8, (16, 96))
    pools = plan(1 << 30, layouts=layouts).pools
    assert [pool.layers for pool in pools] == [(0, 2), (1, 3)]
    assert [pool.slot_bytes for pool in pools] == [layouts[0].slot_bytes, layouts[1].slot_bytes]
    assert [(pool.num_slots, pool.num_staging) for pool in pools] == [(16, 0), (16, 0)]


def test_pools_get_the_same_share_of_their_experts() -> None:
    least = plan(1 << 30, expert_cap=4).total_bytes
    pools = plan(least + 10 * (4096 * 4 + 4096 * 8)).pools
    assert abs(pools[0].num_slots - pools[1].num_slots) <= 1


def test_a_cap_counts_every_expert_in_memory_staging_included() -> None:
    pools = plan(1 << 30, expert_cap=10).pools
    assert [pool.num_slots for pool in pools] == [5, 5]
    with pytest.raises(BudgetError, match=r"experts=3 is fewer .* the least is 4 \(2 sizes of experts\)"):
        plan(1 << 30, expert_cap=3)


@pytest.mark.parametrize(
    ("num_slots", "staging"),
    [(4, 4), (8, 8), (9, 8), (12, 10), (24, 16), (100, 16), (127, 16), (128, 0), (200, 0)],
)
def test_staging_leaves_half_of_what_a_step_does_not_need(num_slots: int, staging: int) -> None:
    assert staging_slots(num_slots, num_experts=128, top_k=8) == staging


def test_another_division_keeps_a_steps_misses_and_the_bytes() -> None:
    pool = PoolPlan(10, (0, 1), 128, 64, staging_slots(64, 128, 8))
    for per_top_k, staging in ((1.0, 8), (1.5, 12), (4.0, 32), (16.0, 36)):
        (divided,) = with_staging([pool], per_top_k, 8)
        assert (divided.num_staging, divided.num_bytes) == (staging, pool.num_bytes)
    (whole,) = with_staging([replace(pool, num_slots=128)], 4.0, 8)
    assert whole.num_staging == 0, "every expert has a slot"


def test_a_refusal_shows_every_part_of_the_sum() -> None:
    with pytest.raises(BudgetError) as refusal:
        plan_placement(
            make_spec(),
            make_layouts(4, 8),
            ram_bytes=GIB,
            base_bytes=350 * MIB,
            dense_bytes=600 * MIB,
            context_tokens=4096,
            kv_bytes_per_element=2,
            batch_size=200,
            activation_bytes=50 * MIB,
        )
    assert str(refusal.value).startswith(
        f"ram=1.00 GiB ({GIB} bytes) cannot hold the model: libraries 0.34 + dense weights 0.59 + "
        "KV cache (4096 tokens) 0.39 + workspace 0.05 + at least 2 experts 0.00 = 1.37 GiB; "
        "the smallest ram that would do is 1.37 GiB"
    )
    assert "lower context" in str(refusal.value)


def test_a_dense_model_needs_no_slots() -> None:
    dense = plan(1 << 30, layouts={})
    assert dense.pools == () and dense.expert_bytes == 0


def test_lru_below_one_tokens_experts_is_told_to_hit_nothing() -> None:
    spec = make_spec()
    cold, warm = plan(1 << 30, expert_cap=8), plan(1 << 30, expert_cap=20)
    assert "hits almost nothing with 2 resident experts: one token uses 8" in (
        cold_cache_warning(cold, spec, "lru") or ""
    )
    assert cold_cache_warning(cold, spec, "ewma") is None
    assert cold_cache_warning(warm, spec, "lru") is None


def test_the_table_of_budgets_agrees_with_the_plans() -> None:
    spec, layouts = make_spec(), make_layouts(4, 8, (16, 96))
    kv = kv_bytes(spec, context_tokens=128, batch_size=1, bytes_per_element=2)
    fixed = FixedCosts(300_000, 100_000, kv, 3000, 128)
    smallest = smallest_ram_bytes(fixed, layouts, spec.top_k)
    rows = budgets_table(spec, layouts, [smallest - 1, smallest, 1_000_000, 1 << 30], fixed)
    assert [row.fits for row in rows] == [False, True, True, True]
    assert [row.num_slots for row in rows[1:]] == [
        sum(pool.num_slots for pool in plan(row.ram_bytes).pools) for row in rows[1:]
    ]
    assert (rows[0].num_slots, rows[0].smallest_ram_bytes) == (0, smallest)
    assert (rows[1].expert_share, rows[3].expert_share) == (4 / 32, 1.0)


def test_a_kv_cache_holds_every_token_of_every_sequence() -> None:
    assert kv_bytes(make_spec(), context_tokens=10, batch_size=3, bytes_per_element=2) == 4 * 64 * 10 * 3 * 2


def test_activations_cover_the_widest_tensors_of_a_chunk() -> None:
    spec = make_spec()
    one = activation_bytes(spec, context_tokens=4096)
    assert one >= 4 * (512 * 4096 + 512 * 32 * 10 + 100)  # mask, ten hidden states, logits
    wide = activation_bytes(spec, context_tokens=4096, dense_intermediate_size=1000)
    assert wide - one >= 4 * 512 * 2 * 1000


def test_eager_attention_is_charged_for_its_scores() -> None:
    shape = {"num_heads": 4, "head_dim": 8, "context_tokens": 100}
    fused = attention_bytes(**shape, stores_scores=False)
    assert fused == 4 * 2 * 4 * 8 * 100  # keys and values, repeated for every head
    assert attention_bytes(**shape, stores_scores=True) - fused == 4 * 3 * 4 * 512 * 100


def test_experts_of_mixed_formats_have_one_pool_per_size() -> None:
    """Q4_K_M files store `down` of some layers in Q6_K."""
    gate_up = MatrixFormat(GgmlType.Q4_K, 512, 256)
    downs = [MatrixFormat(GgmlType.Q6_K if layer % 2 else GgmlType.Q4_K, 256, 256) for layer in range(4)]
    layouts = {i: ExpertLayout(i, 8, RowOrder.GATE_UP, (gate_up, down)) for i, down in enumerate(downs)}
    pools = plan(1 << 30, layouts=layouts).pools
    assert len(pools) == 2 and sum(pool.num_experts for pool in pools) == 32
