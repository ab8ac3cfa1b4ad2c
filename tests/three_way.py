"""The three-way check: transformers, llama.cpp and a third party give one model's logits.

A fixture that we both write and read cancels its own mistakes, so a GGUF is made by llama.cpp's
rules from a Hugging Face folder, and llama.cpp and transformers, who never saw our reader, must
agree with what our spans, names, permutations and config give.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moe_offload.runtime.dense_tensors import OPERATIONS
from moe_offload.storage.checkpoint import Checkpoint, open_checkpoint
from moe_offload.storage.dense_tensor import TensorInfo
from moe_offload.storage.expert_format import ExpertKey, GgmlType, RowOrder, Span

Logits = Callable[[Path, list[int]], Tensor]  # (checkpoint path, token ids) -> (num_tokens, vocab_size)


def transformers_logits(folder: Path, ids: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Plain transformers on a Hugging Face folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def llama_cpp_logits(path: Path, ids: list[int]) -> Tensor:
    """llama.cpp on a GGUF, with a float32 KV cache."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(
        str(path), n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    try:
        model.eval(ids)
        return torch.from_numpy(np.array(model.scores[: len(ids)], dtype=np.float32))
    finally:
        model.close()


def logits_from_spans(path: Path, ids: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A plain transformers model filled from our Checkpoint: its config, names, spans and permutations."""
    checkpoint = open_checkpoint(path, allow_dense=True)
    settings = dict(checkpoint.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    weights = {name: read_dense(checkpoint, info) for name, info in checkpoint.dense.items()}
    weights |= read_experts(checkpoint, model)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, strict=True)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def read_dense(checkpoint: Checkpoint, info: TensorInfo) -> Tensor:
    """A parameter in float, its recipe followed by the runtime's own operations on gguf-py's numbers."""
    if info.recipe is None:
        return dequantize(checkpoint, info.span, info.ggml_type, info.shape)
    parts = [read_dense(checkpoint, part) for part in info.recipe.parts]
    return OPERATIONS[info.recipe.operation](parts, *info.recipe.sizes).reshape(info.shape)


def read_experts(checkpoint: Checkpoint, model: Any) -> dict[str, Tensor]:
    """The experts of every layer as the parameters of transformers' module, in its own layout."""
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "_apply_gate")}
    weights = {}
    for (layer_idx, layout), (name, module) in zip(
        checkpoint.experts.layouts.items(), modules.items(), strict=True
    ):
        assert layout.row_order in (RowOrder.SPLIT, RowOrder.GATE_UP) and f"layers.{layer_idx}." in name
        experts = [
            [
                dequantize(checkpoint, span, form.ggml_type, (form.rows, form.cols))
                for span, form in zip(
                    checkpoint.experts.spans[ExpertKey(layer_idx, expert_id)], layout.matrices, strict=True
                )
            ]
            for expert_id in range(layout.num_experts)
        ]
        gate_up = torch.stack([torch.cat(matrices[:-1]) for matrices in experts])
        down = torch.stack([matrices[-1] for matrices in experts])
        if module.is_transposed:  # gpt-oss: gate and up alternate, too
            gate_up, down = interleaved(gate_up, 1).transpose(1, 2), down.transpose(1, 2)
            bias = read_dense(checkpoint, checkpoint.dense[f"{name}.gate_up_proj_bias"])
            weights[f"{name}.gate_up_proj_bias"] = interleaved(bias, 1)
        weights |= {f"{name}.gate_up_proj": gate_up, f"{name}.down_proj": down}
    return weights


def interleaved(halves: Tensor, dim: int) -> Tensor:
    """Gate then up -> gate 0, up 0, gate 1, up 1 ..."""
    return torch.stack(halves.chunk(2, dim), dim + 1).flatten(dim, dim + 1)


def dequantize(checkpoint: Checkpoint, span: Span, kind: GgmlType, shape: tuple[int, ...]) -> Tensor:
    """gguf-py's own dequantization of the bytes of a span."""
    import gguf

    with checkpoint.files[span.file_id].open("rb") as file:
        file.seek(span.offset)
        raw: Any = np.frombuffer(file.read(span.num_bytes), dtype=np.uint8).reshape(*shape[:-1], -1)
    number = gguf.GGMLQuantizationType(int(kind))
    return torch.from_numpy(np.array(gguf.quants.dequantize(raw, number)).reshape(shape))


def assert_three_way(
    folder: Path, path: Path, ids: list[int], our_logits: Logits, llama_cpp_share: float = 1e-3
) -> None:
    """Hold ``our_logits(path)`` and llama.cpp's to those of transformers for the same unquantized weights.

    The measure is float64; another program may round elsewhere, but not by more than a thousandth
    (``llama_cpp_share``) of the spread of the logits, and where the two best tokens are further apart
    than twice the larger error, the best token is the same.
    """
    exact = transformers_logits(folder, ids, torch.float64)
    plain_error = (transformers_logits(folder, ids).double() - exact).abs().max()
    ours, theirs = our_logits(path, ids).double(), llama_cpp_logits(path, ids).double()
    our_error, their_error = (ours - exact).abs().max(), (theirs - exact).abs().max()
    assert our_error <= 2 * plain_error, f"ours is off by {our_error:.2e}, plain float32 by {plain_error:.2e}"
    assert their_error <= llama_cpp_share * exact.std(), (
        f"llama.cpp is off by {their_error:.2e} of {exact.std():.2e}"
    )
    best = exact.topk(2, dim=-1).values
    clear = best[:, 0] - best[:, 1] > 2 * torch.maximum(our_error, their_error)
    assert clear.any() and (ours.argmax(-1) == theirs.argmax(-1))[clear].all()
