"""Families without a description of their own: the odd ones, quickly; test_family_walk.py tries all."""

from __future__ import annotations

import pytest
from toy_models import plain_model, save_model
from transformers import CONFIG_MAPPING
from walk_families import compare, tiny_config

from moe_offload.errors import CheckpointError
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.hf_config import model_spec


def save_tiny(model_type, folder):
    return save_model(tiny_config(CONFIG_MAPPING[model_type]), folder)


def test_a_router_that_cannot_be_asked_costs_reading_ahead_only(tmp_path, capsys):
    folder = save_tiny("afmoe", tmp_path)
    compare(plain_model(folder), folder)
    said = capsys.readouterr().err
    assert "nothing is read ahead: " in said and "of layer 1 cannot be asked about (T, H)" in said


def test_experts_stored_the_other_way_round_under_names_of_their_own(tmp_path):
    folder = save_tiny("aria_text", tmp_path)  # transposed matrices, moe_topk
    compare(plain_model(folder), folder)


def test_the_longest_context_goes_by_either_name(tmp_path):
    assert open_checkpoint(save_tiny("kimi_linear", tmp_path)).spec.max_position_embeddings == 1024
    config = {**open_checkpoint(tmp_path).config, "model_max_length": 0}
    with pytest.raises(CheckpointError, match="model_max_length must be an integer from 1"):
        model_spec(config, "config.json")
    del config["model_max_length"]
    with pytest.raises(CheckpointError, match="max_position_embeddings is missing"):
        model_spec(config, "config.json")
