"""Official multimodal folders: the language model is loaded, the rest is left out and counted."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_models import TOY_CONFIGS, plain_model, save_toy_model

import moe_offload
from moe_offload.storage.checkpoint import open_checkpoint

IDS = torch.tensor([[21, 22, 23, 24, 25, 26, 27]])
# By family: the outer model_type, and where official folders keep the language model.
OFFICIAL = {
    "qwen3_5_moe": ("qwen3_5_moe", "model.language_model."),
    "gemma4": ("gemma4", "model.language_model."),
}
VISION = {"model.visual.blocks.0.attn.qkv.weight": (64, 64), "model.vision_tower.patch_embed.weight": (3, 8)}


def nest(folder, model_type, prefix):
    """Turn a text folder into what is published: nested config, other towers, next-token layers."""
    tensors = load_file(folder / "model.safetensors")
    nested = {
        name if name.startswith("lm_head.") else prefix + name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
    }
    others = {name: torch.zeros(shape) for name, shape in VISION.items()}
    others["mtp.layers.0.mlp.experts.0.up_proj.weight"] = torch.zeros(24, 64)
    save_file({**nested, **others}, folder / "model.safetensors")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    tied = config.pop("tie_word_embeddings")
    outer = {"model_type": model_type, "tie_word_embeddings": tied, "dtype": config.pop("dtype")}
    path.write_text(json.dumps({**outer, "text_config": config, "vision_config": {"depth": 1}}))


@pytest.mark.parametrize("family", OFFICIAL)
def test_a_multimodal_folder_runs_as_its_language_model(family, tmp_path, capsys):
    text, official = tmp_path / "text", tmp_path / "official"
    for folder in (text, official):
        save_toy_model(family, folder)
    nest(official, *OFFICIAL[family])
    offloaded = moe_offload.from_pretrained(official, ram="8GiB", context=256, experts="50%")
    assert capsys.readouterr().err.splitlines()[-1] == (
        "moe-offload: text only: left out 1 tensors of next-token prediction (6.00 KiB), "
        "2 tensors of vision or audio (16.09 KiB)"
    )
    plain = plain_model(text)
    with torch.no_grad():
        expected, actual = plain(IDS).logits, offloaded(IDS).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max()))
    kwargs = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(offloaded.generate(IDS, **kwargs), plain.generate(IDS, **kwargs))
    offloaded.offload.close()


@pytest.mark.parametrize("family", OFFICIAL)
def test_what_is_left_out_is_not_counted(family, tmp_path):
    text, official = tmp_path / "text", tmp_path / "official"
    for folder in (text, official):
        save_toy_model(family, folder)
    nest(official, *OFFICIAL[family])
    assert open_checkpoint(official).spec == open_checkpoint(text).spec
    assert open_checkpoint(official).dense.keys() == open_checkpoint(text).dense.keys()
    assert open_checkpoint(official).spec.model_type == TOY_CONFIGS[family][0]
    assert open_checkpoint(text).notes == ()


def test_layers_after_the_last_are_left_out_where_the_family_predicts_further_tokens(tmp_path):
    """DeepSeek-V3 and GLM-4 publish them as one more layer of the decoder."""
    folder = save_toy_model("deepseek_v3", tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_nextn_predict_layers": 1}))
    before = open_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.2.")}
    save_file(
        {
            **tensors,
            **{name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in last.items()},
        },
        folder / "model.safetensors",
    )
    after = open_checkpoint(folder)
    assert after.dense.keys() == before.dense.keys() and after.experts.layouts.keys() == {1, 2}
    assert after.notes[0].startswith(f"text only: left out {len(last)} tensors of next-token prediction")
