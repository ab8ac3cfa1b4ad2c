"""`moe-offload plan`: the arithmetic of the walls, and that it promises only what the runtime would run."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moe_offload
from moe_offload import cli, cli_plan
from moe_offload.config import DEMO_MODEL, MIB
from moe_offload.errors import BudgetError
from moe_offload.header_costs import dense_read_bytes, dense_weights
from moe_offload.planning.cost_model import TokenBytes
from moe_offload.planning.hit_curves import CURVES, expected_hit_rate, interpolate
from moe_offload.planning.roofline import MachineSpeed, decode_speed, prefill_speed
from moe_offload.storage.checkpoint import open_checkpoint

TOKEN = TokenBytes(dense_bytes=200, expert_bytes=600, kv_bytes=200)
MACHINE = MachineSpeed(ram_bytes_per_s=1000.0, disk_bytes_per_s=100.0, macs_per_s=1e6)


def test_with_everything_resident_ram_is_the_wall() -> None:
    speed = decode_speed(TOKEN, MACHINE, hit_rate=1.0)
    assert speed.tokens_per_s == pytest.approx(1.0)  # 1000 bytes at 1000 bytes/s
    assert speed.binding == "RAM"


def test_misses_overlap_with_the_experts_at_hand() -> None:
    speed = decode_speed(TOKEN, MACHINE, hit_rate=0.5)
    # 300 bytes at 100 bytes/s are 3 s, of which the 300 bytes at hand hide 0.3.
    assert speed.tokens_per_s == pytest.approx(1 / (1.0 + 3.0 - 0.3))
    assert speed.binding == "disk"


def test_predicted_misses_hide_behind_everything_but_the_disk_itself() -> None:
    speed = decode_speed(TOKEN, MACHINE, hit_rate=0.5, predicted_share=1.0)
    assert speed.tokens_per_s == pytest.approx(1 / 3.0)


@given(
    st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(1, 1e4), st.floats(1, 1e4), st.floats(0, 10)
)
def test_more_hits_or_more_foresight_are_never_slower_and_no_wall_is_passed(
    hit_rate: float, more: float, predicted: float, ram: float, disk: float, overhead: float
) -> None:
    machine = MachineSpeed(ram, disk, token_overhead_s=overhead)
    speed = decode_speed(TOKEN, machine, hit_rate=hit_rate, predicted_share=predicted)
    assert 1 / speed.tokens_per_s >= max(speed.walls_s.values()) * (1 - 1e-9)
    better = decode_speed(TOKEN, machine, hit_rate=max(hit_rate, more), predicted_share=predicted)
    assert better.tokens_per_s >= speed.tokens_per_s * (1 - 1e-9)
    foreseen = decode_speed(TOKEN, machine, hit_rate=hit_rate, predicted_share=1.0)
    assert foreseen.tokens_per_s >= speed.tokens_per_s * (1 - 1e-9)


def test_a_prompt_is_bound_by_its_slowest_wall() -> None:
    speed = prefill_speed(
        MACHINE, macs_per_token=1000, dense_bytes=200, expert_bytes=1000, resident_share=0.5, num_tokens=512
    )
    assert speed is not None and speed.binding == "disk"
    assert speed.tokens_per_s == pytest.approx(512 / 5.0)
    assert (
        prefill_speed(MachineSpeed(1, 1), macs_per_token=1, dense_bytes=1, expert_bytes=1, resident_share=0)
        is None
    )


@pytest.mark.parametrize("name", sorted(CURVES))
def test_hit_curves_rise_from_nothing_to_everything(name: str) -> None:
    curve = CURVES[name]
    assert curve[0] == (0.0, 0.0) and curve[-1] == (1.0, 1.0)
    assert list(curve) == sorted(curve) and [y for _, y in curve] == sorted(y for _, y in curve)


def test_a_curve_is_straight_between_its_points_and_flat_beyond() -> None:
    curve = ((0.0, 0.0), (0.5, 0.8), (1.0, 1.0))
    assert [interpolate(curve, x) for x in (-1, 0, 0.25, 0.5, 0.75, 1, 2)] == pytest.approx(
        [0, 0, 0.4, 0.8, 0.9, 1, 1]
    )
    assert expected_hit_rate("gpt_oss", 0.25) == (0.701, "gpt_oss")
    assert expected_hit_rate("qwen3_moe", 1.0) == (1.0, "default")


def test_the_input_embedding_is_not_read_unless_it_is_the_head() -> None:
    checkpoint = open_checkpoint(DEMO_MODEL)
    embedding = checkpoint.dense["model.embed_tokens.weight"]
    is_tied = "lm_head.weight" not in checkpoint.dense
    apart = 0 if is_tied else embedding.span.num_bytes
    assert dense_read_bytes(checkpoint) == checkpoint.dense_bytes - apart
    assert dense_weights(checkpoint) > 0


def planner() -> cli_plan.Planner:
    return cli_plan.Planner(open_checkpoint(DEMO_MODEL), MachineSpeed(20e9, 1e9, 1e11), 1024)


def test_what_does_not_fit_says_why_and_what_would() -> None:
    plan = planner()
    refused = plan.outlook(plan.smallest_ram_bytes - 1)
    assert not refused.fits and refused.decode is None and str(plan.smallest_ram_bytes) in refused.reason
    assert plan.outlook(plan.smallest_ram_bytes).fits


def test_more_memory_is_never_slower_and_all_of_it_hits() -> None:
    plan = planner()
    budgets = range(plan.smallest_ram_bytes, plan.whole_ram_bytes + MIB, MIB)
    rates = [outlook.decode.tokens_per_s for b in budgets if (outlook := plan.outlook(b)).decode]
    assert rates == sorted(rates) and len(rates) == len(budgets)
    assert plan.outlook(plan.whole_ram_bytes).hit_rate == 1.0


def test_what_would_change_it_gains_at_least_five_percent_each() -> None:
    plan = planner()
    now = plan.outlook(plan.smallest_ram_bytes)
    changes = cli_plan.what_would_change_it(plan, now)
    assert changes and now.decode
    rates = [now.decode.tokens_per_s, *(change.decode.tokens_per_s for change in changes if change.decode)]
    assert all(later >= 1.05 * earlier for earlier, later in itertools.pairwise(rates))


def test_plan_for_another_machine(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(DEMO_MODEL)
    assert cli.main(["plan", "--model", model, "--model", model, "--profile", "cpu-laptop-16gb"]) == 0
    shown = capsys.readouterr().out
    assert "38.4 GB/s" in shown  # three quarters of the data sheet's 51.2
    assert "binds" in shown and "fastest first" in shown


def test_plan_as_json_measures_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["fits"] and model["machine"]["disk_bytes_per_s"] > 0
    assert model["decode"]["tokens_per_s"] > 0 and model["prefill"]["binding"] in ("RAM", "disk", "compute")


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "plan.png"
    assert cli.main(["plan", "--profile", "cpu-laptop-16gb", "--plot", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")


def test_without_measuring_no_torch_is_imported() -> None:
    code = (
        "import sys; from moe_offload import cli;"
        "cli.main(['plan', '--profile', 'cpu-laptop-16gb', '--json']);"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"


def test_the_runtime_runs_the_least_budget_that_plan_names() -> None:
    """The estimate of the libraries may be off either way; the division of the rest is the same code."""
    plan = planner()
    model = moe_offload.from_pretrained(DEMO_MODEL, context=1024, ram="4GiB")
    try:
        placement = model.offload.plan
        room = placement.base_bytes - plan.fixed.base_bytes
        assert (
            placement.dense_bytes + placement.kv_bytes <= plan.fixed.dense_bytes + plan.fixed.kv_bytes + MIB
        )
    finally:
        model.offload.close()
    with pytest.raises(BudgetError):
        moe_offload.from_pretrained(DEMO_MODEL, context=1024, ram=plan.smallest_ram_bytes + room - 64 * MIB)
