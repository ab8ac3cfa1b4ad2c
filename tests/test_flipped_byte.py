"""The experts' bytes are what is computed with: one flipped byte changes the logits, if it is used."""

import shutil

import pytest
import torch

import moe_offload
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.expert_format import BLOCK_SIZES, ExpertKey, GgmlType

PROMPT = [5, 9, 17, 33, 65, 129]


def logits_and_experts(path):
    """Return the last token's logits, and the experts that the tokens chose: (tokens, layers, top_k)."""
    model = moe_offload.from_pretrained(path, experts="50%")
    try:
        with model.offload.trace() as recorder, torch.no_grad():
            logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
        return logits, recorder.trace().experts
    finally:
        model.offload.close()


def flip_byte(path, key, matrix):
    """Double or halve the scale of the middle block of one of the expert's Q4_0 matrices.

    A changed quant would not do: one weight's part in a unit may vanish when the unit is rounded to 8 bits.
    """
    experts = open_checkpoint(path).experts
    span = experts.spans[key][matrix]
    assert experts.layouts[key.layer_idx].matrices[matrix].ggml_type == GgmlType.Q4_0
    block_bytes = BLOCK_SIZES[GgmlType.Q4_0].num_bytes
    position = span.offset + span.num_bytes // block_bytes // 2 * block_bytes + 1
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x04]))


@pytest.fixture
def demo_copy(tmp_path):
    return shutil.copy(moe_offload.config.DEMO_MODEL, tmp_path / "model.gguf")


def test_a_flipped_byte_changes_the_logits_if_its_expert_is_used_and_only_then(demo_copy):
    before, experts = logits_and_experts(demo_copy)
    layer_idx = experts.shape[1] // 2
    idle = next(i for i in range(32) if i not in experts[:, layer_idx])
    for matrix in range(3):
        flip_byte(demo_copy, ExpertKey(layer_idx, idle), matrix)
    assert torch.equal(logits_and_experts(demo_copy)[0], before)
    for matrix in range(3):
        flip_byte(demo_copy, ExpertKey(layer_idx, int(experts[-1, layer_idx, 0])), matrix)
        after, _ = logits_and_experts(demo_copy)
        assert not torch.equal(after, before), f"matrix {matrix}"
        before = after
