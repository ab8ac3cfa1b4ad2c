"""Every ggml type runs through the whole model, also where gate, up, down and layers differ."""

from __future__ import annotations

import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch
from gguf_writer import edit_gguf
from op_cases import packed_weight
from test_gguf_models import VOCAB_SIZE, save_tokenizer
from three_way import llama_cpp_logits, logits_from_spans
from toy_models import plain_model, save_toy_model

import moe_offload
from moe_offload.runtime.quant_modules import QuantLinear
from moe_offload.storage.expert_format import GgmlType

sys.path.append(str(Path(__file__).parents[1] / "bench" / "demo_model"))  # not before tests/reference.py
from export_gguf import export_gguf

IDS = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47]


def our_logits(path, ids, **kwargs):
    model = moe_offload.from_pretrained(path, **{"ram": "8GiB", "experts": "50%", "context": 64, **kwargs})
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    model.offload.close()
    return logits


@pytest.fixture(scope="module")
def plain_gguf(tmp_path_factory):
    """Nine layers whose matrices have 256 columns, so that every type divides them; F32.

    Every token uses every expert: rounding would otherwise flip a random router's choice now and
    then, and the test would measure that.
    """
    folder = tmp_path_factory.mktemp("formats")
    save_tokenizer(folder)
    shape = {"num_hidden_layers": 9, "hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64}
    routing = {"num_experts_per_tok": 8, "norm_topk_prob": True}
    save_toy_model("qwen3_moe", folder, vocab_size=VOCAB_SIZE, **shape, **routing)
    return export_gguf(folder, folder / "f32.gguf", "F32")


def test_all_types_in_one_model_agree_with_their_dequantized_weights(plain_gguf, tmp_path):
    """Quantized activations cost some accuracy, a wrong block layout costs all of it."""
    kinds = cycle(GgmlType)
    used = set()

    def mix(tensors):
        for seed, (name, raw) in enumerate(sorted(tensors.items())):
            if not name.endswith("_exps.weight"):
                continue
            kind = next(kinds)
            used.add(kind)
            cols, rows, num_experts = raw.dims
            raw.ggml_type = int(kind)
            raw.data = packed_weight(kind, rows * num_experts, cols, seed=seed).tobytes()

    path = edit_gguf(plain_gguf, tmp_path / "mixed.gguf", change=mix)
    assert used == set(GgmlType)
    exact = logits_from_spans(path, IDS, torch.float64)
    ours = our_logits(path, IDS, experts="all").double()  # nine sizes of experts, eight of each at least
    assert (ours - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    "kind",
    [
        "F16",
        "Q4_0",
        "Q5_1",
        "Q8_0",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("BF16", "Q4_1", "Q5_0")),
    ],
)
def test_a_uniformly_quantized_model_is_as_close_to_float64_as_llama_cpp(kind, plain_gguf, tmp_path):
    path = export_gguf(plain_gguf.parent, tmp_path / "model.gguf", kind)
    exact = logits_from_spans(path, IDS, torch.float64)
    ours = (our_logits(path, IDS) - exact).abs().max()
    assert ours <= 2 * (llama_cpp_logits(path, IDS) - exact).abs().max()


def test_dense_layers_of_every_type_are_packed(plain_gguf, tmp_path):
    kinds = cycle(sorted(set(GgmlType) - {GgmlType.F32}))

    def mix(tensors):
        for seed, (name, raw) in enumerate(sorted(tensors.items())):
            if name.endswith(("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight")):
                kind = next(kinds)
                cols, rows = raw.dims
                raw.ggml_type, raw.data = int(kind), packed_weight(kind, rows, cols, seed=seed).tobytes()

    path = edit_gguf(plain_gguf, tmp_path / "dense.gguf", change=mix)
    model = moe_offload.from_pretrained(path, ram="8GiB", context=64)
    packed = {module.ggml_type for module in model.modules() if isinstance(module, QuantLinear)}
    model.offload.close()
    assert packed == set(GgmlType) - {GgmlType.F32}
    exact = logits_from_spans(path, IDS, torch.float64)
    assert (our_logits(path, IDS) - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_half_precision_is_as_accurate_as_plain_transformers(family, dtype, tmp_path):
    """Sharded, in bf16 and fp16: our error against float64 is at most twice plain PyTorch's."""
    folder = save_toy_model(family, tmp_path, dtype, shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ids = torch.tensor([[i % 97 for i in IDS]])
    with torch.no_grad():
        exact = plain_model(folder, dtype=torch.float64)(ids).logits
        plain = plain_model(folder, dtype=dtype)(ids).logits.double()
        ours = our_logits(folder, ids[0].tolist()).double()
    assert our_logits(folder, ids[0].tolist()).dtype == dtype
    assert (ours - exact[0]).abs().max() <= 2 * (plain - exact).abs().max()
