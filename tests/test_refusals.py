"""Misuse of the model object is refused by name, with what to do instead."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle

import pytest
import torch
from toy_models import save_toy_model
from transformers import GenerationConfig

import moe_offload
from moe_offload import CheckpointError, ConfigError

PROMPT = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_toy_model("qwen3_moe", tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def model(folder):
    model = moe_offload.from_pretrained(folder, experts="50%", ram="8GiB", context=64)
    yield model
    model.offload.close()


MISUSES = {
    "to a GPU": (lambda m: m.to("cuda"), "from_pretrained"),
    "to another dtype": (lambda m: m.to(torch.float16), r"dtype=torch\.float16"),
    "cuda": (lambda m: m.cuda(), "from_pretrained"),
    "half": (lambda m: m.half(), r"dtype=torch\.float16"),
    "bfloat16": (lambda m: m.bfloat16(), r"dtype=torch\.bfloat16"),
    "type": (lambda m: m.type(torch.float16), r"from_pretrained\(\.\.\., dtype=\)"),
    "to_empty": (lambda m: m.to_empty(device="cpu"), "moving or converting"),
    "share_memory": (lambda m: m.share_memory(), "moving or converting"),
    "double": (lambda m: m.double(), r"dtype=torch\.float64"),
    "save_pretrained": (lambda m: m.save_pretrained("x"), "copy the checkpoint files"),
    "train": (lambda m: m.train(), "train with transformers"),
    "deepcopy": (copy.deepcopy, "from_pretrained again"),
    "copy": (copy.copy, "send the path"),
    "pickle": (pickle.dumps, "send the path"),
    "add_adapter": (lambda m: m.add_adapter(None), "merge the adapter"),
    "load_adapter": (lambda m: m.load_adapter("x"), "merge the adapter"),
    "set_adapter": (lambda m: m.set_adapter("x"), "merge the adapter"),
    "push_to_hub": (lambda m: m.push_to_hub("x"), "upload the checkpoint files"),
    "checkpointing": (lambda m: m.gradient_checkpointing_enable(), "train with transformers"),
    "empty prompt": (lambda m: m.generate(PROMPT[:, :0]), r"prompt is empty.*\(1, 0\)"),
    "resize": (lambda m: m.resize_token_embeddings(10), "resize with transformers"),
    "set_experts_implementation": (lambda m: m.set_experts_implementation("eager"), "on demand"),
    "generate_batch": (lambda m: m.generate_batch([[5, 6]]), "a padded batch"),
    "compile": (lambda m: m.compile(fullgraph=True), "compiled graph"),
    "compile_config": (lambda m: m.generate(PROMPT, compile_config=object()), "generate without it"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_raises_config_error_with_the_remedy(model, name):
    misuse, remedy = MISUSES[name]
    with pytest.raises(ConfigError, match=remedy):
        misuse(model)


def test_moves_to_where_the_model_is_are_accepted(model):
    assert (
        model.to("cpu") is model.cpu() is model
        and model.to(torch.float32) is model
        and model.float() is model
    )
    assert model.eval() is model and not model.training


def test_fullgraph_compilation_names_the_remedy(model):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="without fullgraph=True"):
        compiled(PROMPT)
    torch._dynamo.reset()


def test_plain_compilation_still_answers(model):
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(PROMPT).logits, model(PROMPT).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"device_map": "cuda"}, "device_map='cuda'"),
        ({"device": "cuda"}, "device='cuda'"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"policy": "nonsense"}, "nonsense"),
        ({"policy": object()}, "policy must be a name or an import path"),
        ({"policy": ""}, "policy '' is unknown"),
        ({"predictor": 3}, "predictor must be a name or an import path, got 3"),
        ({"predictor": "nonsense"}, "nonsense"),
        ({"context": 5000}, "1024 positions"),
        ({"context": 0}, "positive"),
        ({"num_threads": 0}, "num_threads"),
        ({"ram": "lots"}, "lots"),
        ({"experts": "0%"}, "0%"),
    ],
)
def test_bad_arguments_are_named(folder, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        moe_offload.from_pretrained(folder, **{"ram": "8GiB", **kwargs})


def test_a_closed_model_says_so(folder):
    model = moe_offload.from_pretrained(folder, ram="8GiB", context=64)
    model.offload.close()
    model.offload.close()
    parts = [model, model.model, model.model.embed_tokens, model.model.layers[0].self_attn.q_proj]
    for part in parts:
        with pytest.raises(ConfigError, match=r"closed by offload\.close"):
            part(PROMPT)


def _generate_in_fork(model, queue):
    try:
        model.generate(PROMPT, max_new_tokens=1)
        queue.put("generated")
    except ConfigError as error:
        queue.put(str(error))


def _load_in_fork(folder, queue):
    try:
        moe_offload.from_pretrained(folder, ram="8GiB", context=64)
        queue.put("loaded")
    except ConfigError as error:
        queue.put(str(error))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_use_after_fork_is_refused(model):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_generate_in_fork, args=(model, queue))
    child.start()
    assert "start the child with 'spawn'" in queue.get(timeout=60)
    child.join()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_of_a_process_that_has_loaded_a_model_cannot_load_one(model, folder):
    """torch's own threads did not come along either, and its first parallel loop waited for them."""
    model.generate(PROMPT, max_new_tokens=1)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_load_in_fork, args=(folder, queue))
    child.start()
    try:
        assert "is its fork, without its threads: start it with 'spawn'" in queue.get(timeout=60)
        child.join()
    finally:
        child.kill()


def test_generation_config_with_compilation_is_refused(model):
    config = GenerationConfig(max_new_tokens=2)
    config.compile_config = object()
    with pytest.raises(ConfigError, match="compile_config"):
        model.generate(PROMPT, generation_config=config)


@pytest.mark.parametrize("ends", ["x", [2, None], 2.5, [True]])
def test_an_end_that_is_no_token_id_names_the_file(ends, tmp_path):
    folder = save_toy_model("qwen3_moe", tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(CheckpointError, match=r"generation_config's eos_token_id is .*; a token id or"):
        moe_offload.from_pretrained(folder, ram="8GiB")


@pytest.mark.parametrize("path", [b"model.gguf", 7, ["a", "b"]])
def test_what_is_no_path_is_refused_by_its_type(path):
    with pytest.raises(ConfigError, match=f"path or org/name, got .*{type(path).__name__}"):
        moe_offload.from_pretrained(path)
    with pytest.raises(ConfigError, match="a path or a model from from_pretrained is wanted"):
        moe_offload.generate(path, "hello")
