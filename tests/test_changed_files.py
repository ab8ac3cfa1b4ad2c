"""A checkpoint that is written to while a model reads it is an error, never other tokens."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

import moe_offload
from moe_offload import CheckpointError
from moe_offload.config import DEMO_MODEL

PROMPT = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(params=["gguf", "safetensors"])
def checkpoint(request, tiny_moe, tmp_path):
    """A path to load from and the file behind it."""
    if request.param == "gguf":
        file = shutil.copyfile(DEMO_MODEL, tmp_path / "model.gguf")
        return file, file
    folder = shutil.copytree(tiny_moe, tmp_path / "model")
    return folder, folder / "model.safetensors"


@pytest.fixture
def model(checkpoint):
    model = moe_offload.from_pretrained(checkpoint[0], experts="25%", context=64)
    yield model
    model.offload.close()


def text(model, **options):
    return model.generate(PROMPT, max_new_tokens=12, min_new_tokens=12, do_sample=False, **options).tolist()


def overwrite(file):
    """Write to the middle of the file, its size and inode as before."""
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(bytes(4096))


def test_the_next_text_names_the_file_that_was_written_to(model, checkpoint):
    text(model)
    overwrite(checkpoint[1])
    with pytest.raises(CheckpointError, match=r"model\.\w+ was written to while .* load the model again"):
        text(model)
    with pytest.raises(CheckpointError, match="was written to"):
        model(PROMPT)


def test_a_text_that_was_under_way_is_not_handed_over(model, checkpoint):
    def change(input_ids, scores):
        if input_ids.shape[1] == 8:
            overwrite(checkpoint[1])
        return scores

    with pytest.raises(CheckpointError, match="was written to"):
        text(model, logits_processor=[change])


def test_a_file_that_was_replaced_or_deleted_is_still_the_one_that_was_opened(model, checkpoint):
    file = checkpoint[1]
    expected = text(model)
    other = file.with_name("other")
    other.write_bytes(bytes(file.stat().st_size))
    os.replace(other, file)
    assert text(model) == expected
    file.unlink()
    assert text(model) == expected
