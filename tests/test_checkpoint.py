"""From a path to a Checkpoint: every family's experts by byte offset, every bad input by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_headers
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_models import FAMILIES, cached_elements, experts_by_layer, model_on_meta, save_toy_model
from transformers import AutoConfig, AutoModelForCausalLM

from moe_offload import CheckpointError
from moe_offload.runtime.dense_tensors import read_float
from moe_offload.storage.checkpoint import Checkpoint, open_checkpoint
from moe_offload.storage.expert_format import ExpertKey, GgmlType, IntegerType, RowOrder, Span
from moe_offload.storage.expert_store import ExpertStore
from moe_offload.storage.hf_config import DENSE_FAMILIES, MOE_FAMILIES, model_spec
from moe_offload.storage.io import open_reader

TORCH_TYPES = {GgmlType.F32: torch.float32, GgmlType.F16: torch.float16, GgmlType.BF16: torch.bfloat16}


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            folders[family] = save_toy_model(family, tmp_path_factory.mktemp(family), dtype=torch.bfloat16)
        return folders[family]

    return make


def read_span(checkpoint: Checkpoint, span: Span, kind: GgmlType, shape: tuple[int, ...]) -> torch.Tensor:
    with checkpoint.files[span.file_id].open("rb") as file:
        file.seek(span.offset)
        return torch.frombuffer(bytearray(file.read(span.num_bytes)), dtype=TORCH_TYPES[kind]).reshape(shape)


def fused_expert(checkpoint: Checkpoint, key: ExpertKey) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate_up, down) of one expert as transformers holds it, put together from the index alone."""
    layout = checkpoint.experts.layouts[key.layer_idx]
    matrices = [
        read_span(
            checkpoint,
            span,
            form.ggml_type,
            (form.cols, form.rows) if form.transposed else (form.rows, form.cols),
        )
        for span, form in zip(checkpoint.experts.spans[key], layout.matrices, strict=True)
    ]
    return (torch.cat(matrices[:2]), matrices[2]) if layout.row_order is RowOrder.SPLIT else tuple(matrices)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_index_gives_the_bytes_that_transformers_loads(family: str, toy_folder: Any) -> None:
    folder = toy_folder(family)
    checkpoint = open_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    modules = {
        layer_idx: layer.mlp.experts
        for layer_idx, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "experts")
    }
    assert tuple(modules) == checkpoint.spec.moe_layers == tuple(checkpoint.experts.layouts)
    for layer_idx, experts in modules.items():
        for expert_id in range(checkpoint.spec.num_experts):
            gate_up, down = fused_expert(checkpoint, ExpertKey(layer_idx, expert_id))
            assert torch.equal(gate_up, experts.gate_up_proj[expert_id])
            assert torch.equal(down, experts.down_proj[expert_id])
    expert_elements = sum(e.gate_up_proj.numel() + e.down_proj.numel() for e in modules.values())
    assert 2 * expert_elements == checkpoint.experts.total_bytes
    assert sum(checkpoint.bytes_by_type().values()) == checkpoint.dense_bytes + checkpoint.experts.total_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_the_spec_is_that_of_the_transformers_model(family: str, toy_folder: Any) -> None:
    folder = toy_folder(family)
    spec, config = open_checkpoint(folder).spec, AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert spec.hidden_size == config.hidden_size and spec.vocab_size == config.vocab_size
    assert spec.num_experts == config.num_experts and spec.top_k == config.num_experts_per_tok
    assert spec.max_position_embeddings == config.max_position_embeddings
    cache = model(torch.tensor([[1, 2, 3, 4, 5]]), use_cache=True).past_key_values
    elements = tuple((layer.keys.numel() + layer.values.numel()) // 5 for layer in cache.layers)
    assert spec.kv_elements_per_token == elements


REQUIRED_KEYS: dict[str, dict[str, Any]] = {  # transformers has no default that works
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 3},
}


@pytest.mark.parametrize("model_type", [*MOE_FAMILIES, *DENSE_FAMILIES])
def test_absent_keys_mean_what_transformers_takes_them_for(model_type: str) -> None:
    extra = {"num_hidden_layers": 6, **REQUIRED_KEYS.get(model_type, {})}
    spec = model_spec({"model_type": model_type, **extra}, "config.json")
    config = AutoConfig.for_model(model_type, **extra)
    model = model_on_meta(config)
    experts = experts_by_layer(model)
    assert spec.hidden_size == config.hidden_size and spec.vocab_size == config.vocab_size
    assert spec.max_position_embeddings == config.max_position_embeddings
    assert (spec.kv_elements_per_token, spec.state_elements_per_sequence) == cached_elements(model)
    assert spec.moe_layers == tuple(experts)
    for module in experts.values():
        assert module.down_proj.numel() == spec.num_experts * spec.moe_intermediate_size * spec.hidden_size
        assert module.num_experts == spec.num_experts
    if experts:
        assert spec.top_k == (getattr(config, "top_k_experts", None) or config.num_experts_per_tok)


@pytest.mark.parametrize("model_type", [*MOE_FAMILIES, *DENSE_FAMILIES])
def test_the_number_of_layers_has_transformers_default(model_type: str) -> None:
    defaults = {**MOE_FAMILIES, **DENSE_FAMILIES}[model_type].defaults
    assert defaults["num_hidden_layers"] == AutoConfig.for_model(model_type).num_hidden_layers


def test_shards_of_a_model_are_one_checkpoint(tmp_path: Path) -> None:
    whole = open_checkpoint(save_toy_model("mixtral", tmp_path / "whole"))
    parts = open_checkpoint(save_toy_model("mixtral", tmp_path / "parts", shard_size="100KB"))
    assert len(parts.files) > 2 and len(whole.files) == 1
    assert whole.spec == parts.spec and whole.dense.keys() == parts.dense.keys()
    for key in whole.experts.spans:
        for one, other in zip(fused_expert(whole, key), fused_expert(parts, key), strict=True):
            assert torch.equal(one, other)


def test_fused_experts_are_read_as_gate_rows_then_up_rows(tmp_path: Path) -> None:
    """A state dict of transformers 5 saved as it is: (E, 2I, H) and (E, H, I)."""
    folder = save_toy_model("qwen3_moe", tmp_path)
    split = open_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    save_file(
        {name: weight.contiguous() for name, weight in model.state_dict().items()},
        folder / "model.safetensors",
    )
    fused = open_checkpoint(folder)
    assert {layout.row_order for layout in fused.experts.layouts.values()} == {RowOrder.GATE_UP}
    gate_up, down = fused_expert(fused, ExpertKey(1, 3))
    experts = model.model.layers[1].mlp.experts
    assert torch.equal(gate_up, experts.gate_up_proj[3]) and torch.equal(down, experts.down_proj[3])
    assert fused.dense.keys() == split.dense.keys()


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({name: item for name, item in config.items() if item != "drop"})
    )


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_table_from_token_ids_to_experts_is_read_as_integers(dtype: torch.dtype, tmp_path: Path) -> None:
    folder, name = save_toy_model("qwen3_moe", tmp_path), "model.layers.0.mlp.gate.tid2eid"
    table = torch.randint(0, 1 << 30, (300, 2), dtype=dtype)
    change_tensors(folder, lambda tensors: tensors.update({name: table}))
    checkpoint = open_checkpoint(folder)
    info = checkpoint.dense[name]
    assert info.ggml_type is (IntegerType.I64 if dtype == torch.int64 else IntegerType.I32)
    store = ExpertStore(checkpoint.experts, checkpoint.files, open_reader())
    try:
        read = read_float(info, store, torch.bfloat16)  # the model's dtype is of numbers
    finally:
        store.close()
    assert read.dtype == dtype and torch.equal(read, table)


def test_integers_of_any_other_name_are_refused(tmp_path: Path) -> None:
    folder = save_toy_model("qwen3_moe", tmp_path)
    change_tensors(
        folder, lambda tensors: tensors.update({"model.norm.bits": torch.ones(3, dtype=torch.int64)})
    )
    with pytest.raises(
        CheckpointError, match=r"'model\.norm\.bits' has dtype I64; F32, F16, BF16 are supported"
    ):
        open_checkpoint(folder)


UP = "model.layers.1.mlp.experts.3.up_proj.weight"


def half_an_expert(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP].half()


BAD_CONFIGS = {
    "unknown family": (
        {"model_type": "switch"},
        r"model_type 'switch' .*supported are qwen3_moe, mixtral, olmoe",
    ),
    "no family": ({"model_type": "drop"}, r"model_type None is not supported"),
    "fp8": (
        {"quantization_config": {"quant_method": "fp8"}},
        r"fp8 is read with one scale for 128 x 128 weights, .* is None: "
        r"use the unquantized \(bf16\) checkpoint",
    ),
    "mxfp4": (
        {"quantization_config": {"quant_method": "mxfp4"}},
        r"mxfp4 is read for gpt_oss only, not for 'qwen3_moe'",
    ),
    "size as text": ({"hidden_size": "64"}, r"hidden_size must be an integer from 1 to \d+, found '64'"),
    "size 0": ({"hidden_size": 0}, r"hidden_size must be .*found 0"),
    "2^60 layers": ({"num_hidden_layers": 1 << 60}, rf"num_hidden_layers must be .*found {1 << 60}"),
    "2^60 experts": ({"num_local_experts": 1 << 60}, r"num_local_experts must be an integer from 0 to 65536"),
    "two counts": ({"num_local_experts": 8, "num_experts": 9}, r"names of one number and disagree"),
    "top_k beyond experts": (
        {"num_experts_per_tok": 9},
        r"num_experts_per_tok must be an integer from 1 to 8, found 9",
    ),
    "heads do not divide": ({"num_key_value_heads": 3}, r"num_key_value_heads=3 .*do not fit"),
    "dense layer beyond the last": (
        {"mlp_only_layers": [99]},
        r"mlp_only_layers must be a list of layer indices below 3",
    ),
    "more experts than in the file": (
        {"num_local_experts": 9},
        r"layer 0 lacks 3 of 27 .*gate projection of expert 8",
    ),
    "fewer experts than in the file": (
        {"num_local_experts": 7},
        r"is of expert 7, but config.json has 7 experts",
    ),
    "other expert width": (
        {"moe_intermediate_size": 25},
        r"has shape \(64, 24\), but .*must have \(64, 25\)",
    ),
    "layers without experts": (
        {"mlp_only_layers": [1]},
        r"holds experts, but by config.json layer 1 has none",
    ),
    "fewer layers than in the file": ({"num_hidden_layers": 2}, r"layers.2.*by config.json layer 2 has none"),
}
BAD_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "one matrix missing": (
        lambda t: t.pop(UP),
        r"layer 1 lacks 1 of 24 .*first the up projection of expert 3",
    ),
    "one of another dtype": (half_an_expert, rf"tensor '{UP}' is F16, the layer's others are F32"),
    "one of another shape": (lambda t: t.update({UP: torch.ones(24, 65)}), r"has shape \(24, 65\), but"),
    "experts in int8": (
        lambda t: t.update({name: w.to(torch.int8) for name, w in t.items() if "experts" in name}),
        r"has dtype I8; experts must be F32, F16, BF16",
    ),
    "dense in float8": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
        r"tensor 'lm_head.weight' has dtype F8_E4M3; F32, F16, BF16 are supported",
    ),
    "scales of some quantization": (
        lambda t: t.update({UP + "_scale_inv": torch.ones(1)}),
        r"up_proj.weight_scale_inv' is no expert weight that can be read here",
    ),
    "a matrix under two names": (
        lambda t: t.update({UP.replace("up_proj", "w3"): t[UP].clone()}),
        r"are one matrix under two names",
    ),
    "half of a fused layer": (
        lambda t: t.update({"model.layers.1.mlp.experts.down_proj": torch.ones(8, 64, 24)}),
        r"stands beside fused experts of layer 1",
    ),
}


@pytest.mark.parametrize("name", [*BAD_CONFIGS, *BAD_TENSORS])
def test_a_bad_folder_is_refused_with_file_place_and_remedy(name: str, tmp_path: Path) -> None:
    folder = save_toy_model("qwen3_moe", tmp_path)
    if name in BAD_CONFIGS:
        changes, message = BAD_CONFIGS[name]
        change_config(folder, **changes)
    else:
        change, message = BAD_TENSORS[name]
        change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


def test_mxfp4_tensors_without_a_quantization_config_are_refused(tmp_path: Path) -> None:
    folder = save_toy_model("gpt_oss", tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    change_tensors(folder, lambda t: t.update({name: torch.zeros(6, 80, 2, 16, dtype=torch.uint8)}))
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' is no expert weight"):
        open_checkpoint(folder)


def test_the_biases_of_gpt_oss_are_dense(toy_folder: Any) -> None:
    checkpoint = open_checkpoint(toy_folder("gpt_oss"))
    assert "model.layers.0.mlp.experts.gate_up_proj_bias" in checkpoint.dense
    assert {layout.row_order for layout in checkpoint.experts.layouts.values()} == {RowOrder.INTERLEAVED}


def test_a_dense_model_is_refused_unless_allowed(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"this llama model is dense: .*allow_dense=True"):
        open_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path, allow_dense=True)
    assert not checkpoint.experts.layouts and not checkpoint.spec.moe_layers and len(checkpoint.dense) == 12


def test_every_path_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    empty, text, pipe = tmp_path / "empty.gguf", tmp_path / "text.gguf", tmp_path / "pipe.gguf"
    empty.touch()
    text.write_text("hello")
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    os.mkfifo(pipe)
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "loop").symlink_to("loop")
    for path, message in {
        tmp_path / "absent": r"absent: No such file or directory; a Hugging Face folder .* is wanted",
        tmp_path / "absent" / "\0": r"a Hugging Face folder .* is wanted",
        tmp_path / "loop": r"loop: .*; a Hugging Face folder",
        empty: r"empty.gguf: is empty; fetch it again",
        text: r"text.gguf: starts with b'hell', a GGUF starts with b'GGUF'",
        pipe: r"pipe.gguf: not a regular file",
        tmp_path
        / "folder": r"folder: a folder with config.json and safetensors, or with one .gguf .*found neither",
        tmp_path: r"found 4 models: empty.gguf, pipe.gguf, pointer.gguf, text.gguf",
        tmp_path / "pointer.gguf": r"pointer.gguf: stands for a file .*: git lfs pull",
        tmp_path / "model.safetensors": r"is one file of a Hugging Face folder; give the folder",
        tmp_path / "broken": r"config.json: not valid JSON",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")

    def refuse(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("moe_offload.storage.header_reader.os.open", refuse)  # root may read everything
    with pytest.raises(CheckpointError, match=r"model.gguf: cannot be opened: Permission denied"):
        open_checkpoint(path)


def test_a_read_error_is_a_checkpoint_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_toy_model("qwen3_moe", tmp_path)

    def pread(*_: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("moe_offload.storage.header_reader.os.pread", pread)
    with pytest.raises(CheckpointError, match=r"read error at byte 0: Input/output error; check the disk"):
        open_checkpoint(folder)


def test_damaged_checkpoints_are_opened_or_refused(tmp_path: Path) -> None:
    """A short run of ``make fuzz``; its undamaged files must open, or it would prove nothing."""
    (tmp_path / "model.gguf").write_bytes(fuzz_headers.good_gguf())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").write_bytes(fuzz_headers.good_safetensors())
    (tmp_path / "folder" / "config.json").write_text(json.dumps(fuzz_headers.CONFIG))
    one, other = open_checkpoint(tmp_path / "model.gguf"), open_checkpoint(tmp_path / "folder")
    assert one.spec.moe_layers == other.spec.moe_layers == (0, 1) and len(one.experts.spans) == 8
    opened, refused = fuzz_headers.run(seconds=60, seed=0, max_files=600)
    assert opened + refused == 600 and opened > 0
