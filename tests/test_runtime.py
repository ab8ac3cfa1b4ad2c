"""The loaded model: what it holds, and what it does when the disk fails underneath it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading

import pytest
import torch
from toy_models import save_toy_model

import moe_offload
from moe_offload import CheckpointError, ConfigError
from moe_offload.config import DEMO_MODEL
from moe_offload.header_sizes import dense_resident_bytes
from moe_offload.residency.expert_cache import ExpertCache
from moe_offload.runtime import skeleton
from moe_offload.runtime.executor import ExpertExecutor
from moe_offload.runtime.quant_modules import QuantEmbedding, QuantLinear
from moe_offload.storage.checkpoint import open_checkpoint

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def demo_copy(tmp_path):
    return shutil.copy(DEMO_MODEL, tmp_path / "copy.gguf")


@pytest.mark.parametrize("source", ["gguf", "safetensors"])
def test_no_expert_byte_is_part_of_the_model(source, tmp_path):
    """Canary for transformers' private loading calls: absent experts must not be made up."""
    path = DEMO_MODEL if source == "gguf" else save_toy_model("qwen3_moe", tmp_path)
    model = moe_offload.from_pretrained(path, ram="8GiB", experts=4, context=64)
    held = {p.data_ptr(): p.nbytes for p in model.parameters()}
    assert not any(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    assert all(not list(experts.parameters()) for experts in skeleton.experts_modules(model).values())
    checkpoint = open_checkpoint(path)
    assert sum(held.values()) == dense_resident_bytes(checkpoint, model.config.dtype.itemsize)
    model.offload.close()


def test_quantized_dense_layers_stay_packed_and_tied():
    model = moe_offload.from_pretrained(ram="8GiB", experts=4, context=64)
    assert isinstance(model.lm_head, QuantLinear)
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    attention = model.model.layers[0].self_attn
    assert all(isinstance(getattr(attention, f"{name}_proj"), QuantLinear) for name in "qkvo")
    model.offload.close()


def test_a_file_shortened_while_running_is_an_error_and_then_forgotten(demo_copy):
    model = moe_offload.from_pretrained(demo_copy, ram="8GiB", experts=8, context=64)
    expected = model.generate(PROMPT, **GREEDY)
    whole, content = os.stat(demo_copy), demo_copy.read_bytes()

    def shorten(input_ids, scores):
        os.truncate(demo_copy, 1 << 20)
        return scores

    with pytest.raises(CheckpointError, match=r"copy\.gguf.*wanted.*found"):
        model.generate(PROMPT, logits_processor=[shorten], **GREEDY)
    model.offload.cache.check()
    with open(demo_copy, "rb+") as file:
        file.write(content)
    os.utime(demo_copy, ns=(whole.st_atime_ns, whole.st_mtime_ns))
    assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
    model.offload.close()


@pytest.mark.parametrize("num_prompt_tokens", [3, 40])  # through the decode cache, and streamed
def test_a_read_error_while_running_names_file_and_expert(demo_copy, num_prompt_tokens):
    model = moe_offload.from_pretrained(demo_copy, ram="8GiB", experts=8, context=64)
    prompt = torch.arange(5, 5 + num_prompt_tokens)[None]
    model.offload.reader.inject("error", times=1)
    with pytest.raises(CheckpointError, match=r"copy\.gguf: expert \d+ of layer \d+.*Input/output error"):
        model(prompt)
    model.offload.cache.check()
    assert torch.isfinite(model(prompt).logits).all()
    model.offload.close()


@pytest.mark.parametrize("where", [(ExpertCache, "step_addresses"), (ExpertExecutor, "_decode")])
def test_an_interrupt_between_lookup_and_use_leaves_the_model_usable(where, monkeypatch):
    model = moe_offload.from_pretrained(ram="8GiB", experts=8, context=64)
    if where[0] is ExpertExecutor:
        model.offload.native_step = None
    expected = model.generate(PROMPT, **GREEDY)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*where, interrupted)
        model.generate(PROMPT, **GREEDY)
    model.offload.cache.check()
    assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
    model.offload.close()


def test_a_tensor_missing_in_the_checkpoint_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_toy_model("qwen3_moe", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing.*model\.layers\.1\.self_attn\.q_proj\.weight"):
        moe_offload.from_pretrained(folder, ram="8GiB")


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_toy_model("qwen3_moe", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(65)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(65,\).*\(64,\)"):
        moe_offload.from_pretrained(folder, ram="8GiB")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_act": "banana"}, CheckpointError, r"transformers refuses config\.json: 'banana'"),
        ({"rope_scaling": {"type": "yarn"}}, CheckpointError, r"refuses config\.json: .*factor"),
        ({"dtype": "banana"}, ConfigError, r"dtype='banana' \(of .*\) is not supported; pass float32"),
    ],
)
def test_a_configuration_that_cannot_be_names_the_checkpoint(tmp_path, change, error, message):
    folder = save_toy_model("qwen3_moe", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    if "rope_scaling" in change:
        config.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(error, match=message):
        moe_offload.from_pretrained(folder, ram="8GiB")


def test_a_process_that_may_start_no_threads_is_told_where_to_look(monkeypatch):
    def refuse(*_):
        raise RuntimeError("Resource temporarily unavailable")

    monkeypatch.setattr("moe_offload.storage.io.DirectReader", refuse)
    with pytest.raises(ConfigError, match=r"cannot be started \(Resource .*pids\.max"):
        moe_offload.from_pretrained(ram="8GiB")


def test_a_failed_load_leaves_no_threads_and_no_files(tmp_path):
    folder = save_toy_model("qwen3_moe", tmp_path)
    moe_offload.from_pretrained(folder, ram="8GiB").offload.close()
    gc.collect()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    tasks = len(os.listdir("/proc/self/task"))
    (folder / "generation_config.json").write_text('{"max_new_tokens": -1}')
    with pytest.raises(moe_offload.ConfigError, match=r"generation_config.*max_new_tokens"):
        moe_offload.from_pretrained(folder, ram="8GiB")
    gc.collect()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files and len(os.listdir("/proc/self/task")) == tasks


def test_what_ends_a_generation_comes_from_generation_config_then_config(tmp_path):
    folder = save_toy_model("qwen3_moe", tmp_path)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for text, expected in ((None, 2), ('{"eos_token_id": [5, 6]}', [5, 6])):
        if text is not None:
            (folder / "generation_config.json").write_text(text)
        model = moe_offload.from_pretrained(folder, ram="8GiB", context=64)
        assert model.generation_config.eos_token_id == expected
        model.offload.close()


def test_a_model_that_goes_out_of_scope_closes_itself(tmp_path):
    folder = save_toy_model("qwen3_moe", tmp_path)
    warm = moe_offload.from_pretrained(folder, ram="8GiB")
    warm.offload.close()
    del warm
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    model = moe_offload.from_pretrained(folder, ram="8GiB")
    assert len(os.listdir("/proc/self/fd")) > files
    del model
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_dense_model_runs_where_it_is_allowed(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    plain = LlamaForCausalLM(config).eval()
    plain.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="allow_dense=True"):
        moe_offload.from_pretrained(tmp_path, ram="8GiB")
    model = moe_offload.from_pretrained(tmp_path, ram="8GiB", allow_dense=True)
    assert torch.equal(model.generate(PROMPT, **GREEDY), plain.generate(PROMPT, **GREEDY))
    model.offload.close()
