"""What `inspect` and `plan` say from headers is what the runtime plans, part by part."""

from __future__ import annotations

import json

import pytest
import torch
from toy_models import FAMILIES, OTHER_FAMILIES, model_on_meta, save_model, save_toy_model
from transformers import CONFIG_MAPPING
from walk_families import tiny_config

import moe_offload.runtime.model as runtime
from moe_offload.cli import main
from moe_offload.cli_inspect import open_measured
from moe_offload.config import DEMO_MODEL, GIB, RuntimeConfig
from moe_offload.errors import BudgetError
from moe_offload.header_costs import EAGER_FAMILIES, fixed_costs, place
from moe_offload.header_sizes import element_bytes
from moe_offload.planning.cost_model import state_bytes
from moe_offload.planning.placement import smallest_ram_bytes
from moe_offload.runtime import skeleton
from moe_offload.storage.families import DENSE_FAMILIES, MOE_FAMILIES, MOE_FAMILIES_BY_TRIAL

CONTEXT_TOKENS = 300


def header_plan(checkpoint, ram_bytes, kv):
    return place(checkpoint, RuntimeConfig(context_tokens=CONTEXT_TOKENS, kv=kv), ram_bytes=ram_bytes)


def runtime_plan(checkpoint, ram_bytes, kv):
    """The runtime's division of a budget, in a process whose libraries take what headers estimate."""
    dtype = {4: torch.float32, 2: torch.bfloat16}[element_bytes(checkpoint)]
    model = skeleton.build_skeleton(checkpoint, dtype)
    config = RuntimeConfig(ram_bytes=ram_bytes, context_tokens=CONTEXT_TOKENS, kv=kv)
    return runtime._plan(model, skeleton.measure_cache(model, checkpoint), config)


def check_against_the_runtime(path, monkeypatch, kv=None):
    checkpoint = open_measured(path, allow_dense=False)
    fixed = fixed_costs(checkpoint, CONTEXT_TOKENS, kv=kv)
    monkeypatch.setattr(runtime, "base_bytes", lambda: fixed.base_bytes)
    monkeypatch.setattr(runtime, "tokenizer_was_loaded", lambda path: False)  # as in a new process
    least = smallest_ram_bytes(fixed, checkpoint.experts.layouts, checkpoint.spec.top_k)
    for ram_bytes in (least, 4 * GIB):
        planned = runtime_plan(checkpoint, ram_bytes, kv)
        assert planned == header_plan(checkpoint, ram_bytes, kv)
        assert (planned.dense_bytes, planned.kv_bytes, planned.workspace_bytes) == (
            fixed.dense_bytes, fixed.kv_bytes, fixed.workspace_bytes,
        )  # fmt: skip
    for plan in (runtime_plan, header_plan):
        with pytest.raises(BudgetError, match=f"{least} bytes"):
            plan(checkpoint, least - 1, kv)
    return checkpoint


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_headers_plan_what_the_runtime_plans(family, tmp_path, monkeypatch):
    check_against_the_runtime(save_toy_model(family, tmp_path), monkeypatch)


def test_of_sixteen_bits_too(tmp_path, monkeypatch):
    check_against_the_runtime(save_toy_model("gpt_oss", tmp_path, torch.bfloat16), monkeypatch)


def test_of_a_gguf_too(monkeypatch):
    check_against_the_runtime(DEMO_MODEL, monkeypatch)


@pytest.mark.parametrize("model_type", ["kimi_linear", "granitemoe_swa"])
def test_of_a_family_known_by_trial_too(model_type, tmp_path, monkeypatch):
    checkpoint = check_against_the_runtime(
        save_model(tiny_config(CONFIG_MAPPING[model_type]), tmp_path), monkeypatch
    )
    assert (state_bytes(checkpoint.spec) > 0) == (model_type == "kimi_linear")


def test_a_running_state_is_in_every_budget(tmp_path, capsys):
    folder = save_toy_model("qwen3_next", tmp_path)
    assert main(["inspect", "--model", str(folder), "--context", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    state = state_bytes(open_measured(folder, allow_dense=False).spec)
    assert report["fixed"]["kv_bytes"] == report["kv_bytes_per_1000_tokens"] // 1000 + state > state > 0


@pytest.mark.parametrize("model_type", [*MOE_FAMILIES, *MOE_FAMILIES_BY_TRIAL, *DENSE_FAMILIES])
def test_the_families_that_store_their_scores_are_known(model_type):
    model = model_on_meta(tiny_config(CONFIG_MAPPING[model_type]))
    assert (model.config._attn_implementation == "eager") == (model_type in EAGER_FAMILIES)
