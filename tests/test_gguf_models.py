"""GGUF checkpoints: three programs agree on their logits, and every trap of a file is met by name."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE
from gguf_writer import RawTensor, edit_gguf
from three_way import assert_three_way, llama_cpp_logits, logits_from_spans, transformers_logits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy_models import save_toy_model
from transformers import AutoConfig, AutoModelForCausalLM

import moe_offload
from moe_offload import CheckpointError
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.expert_format import GgmlType, RowOrder
from moe_offload.storage.tokenizer import load_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "bench" / "demo_model"))  # not before tests/reference.py
from export_gguf import export_gguf

VOCAB_SIZE = 260
EXPERT_WIDTH = {"qwen3_moe": {"moe_intermediate_size": 32}, "mixtral": {"intermediate_size": 64}}
IDS = [
    int(token) for token in torch.randint(0, VOCAB_SIZE, (48,), generator=torch.Generator().manual_seed(1))
]


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the 256 bytes, one merge (llama.cpp wants some) and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate([*alphabet, "ab"])}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(family: str, **overrides: Any) -> Path:
        folder = tmp_path_factory.mktemp(family)
        save_tokenizer(folder)
        # llama.cpp always renormalises Qwen3-MoE's routing weights, as every released model does.
        extra = {"norm_topk_prob": True} if family.startswith("qwen3_moe") else {}
        return save_toy_model(family, folder, vocab_size=VOCAB_SIZE, **extra, **overrides)

    return make


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("tied", [False, True])
def test_three_programs_agree(family: str, tied: bool, toy_folder: Any, tmp_path: Path) -> None:
    folder = toy_folder(family, tie_word_embeddings=tied)
    path = export_gguf(folder, tmp_path / "model.gguf", "F32")
    assert open_checkpoint(path).config["tie_word_embeddings"] is tied
    assert_three_way(folder, path, IDS, logits_from_spans)
    assert_three_way(folder, path, IDS, runtime_logits)
    assert torch.equal(logits_from_spans(path, IDS), transformers_logits(folder, IDS))


def runtime_logits(path: Path, ids: list[int], experts: str = "50%") -> torch.Tensor:
    """The runtime's own, with a part of the experts in memory."""
    model = moe_offload.from_pretrained(path, ram="8GiB", experts=experts, context=128)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    model.offload.close()
    return logits


def assert_close_to_llama_cpp(path: Path, share: float = 0.05) -> None:
    """Hold llama.cpp, and our runtime by it, to float64 on the weights as gguf-py dequantizes them.

    Both round activations to 8 bits, which costs some percent of the logits' spread; logits of a
    misread file would be unrelated, 2/sqrt(pi) = 113% of the spread away on average. Tokens of these
    models use all experts, since a rounding that flips a random router's choice says nothing.
    """
    exact = logits_from_spans(path, IDS, torch.float64)
    their_error = (llama_cpp_logits(path, IDS) - exact).abs().mean()
    assert their_error < share * exact.std()
    our_error = (runtime_logits(path, IDS, experts="all") - exact).abs().mean()
    assert our_error <= 2 * their_error


@pytest.mark.parametrize(
    ("types", "found"),
    [
        ("Q8_0", {"F32", "Q8_0"}),
        (
            {"gate": "Q4_0", "up": "Q5_1", "down": "BF16", "dense": "F16", "embed": "Q8_0"},
            {"F32", "Q4_0", "Q5_1", "BF16", "F16", "Q8_0"},
        ),
    ],
)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_quantized_and_mixed_files_give_llama_cpp_what_they_give_us(
    family: str, types: Any, found: set[str], toy_folder: Any, tmp_path: Path
) -> None:
    """The types that gguf-py quantizes; see ``assert_close_to_llama_cpp``."""
    experts = 8 if family == "qwen3_moe" else 6
    folder = toy_folder(family, hidden_size=64, num_experts_per_tok=experts, **EXPERT_WIDTH[family])
    path = export_gguf(folder, tmp_path / "model.gguf", types)
    checkpoint = open_checkpoint(path)
    assert {kind.name for kind in checkpoint.bytes_by_type()} == found
    assert_close_to_llama_cpp(path)


def test_layers_may_differ_in_type(toy_folder: Any, tmp_path: Path) -> None:
    folder = toy_folder("qwen3_moe")
    path, half = export_gguf(folder, tmp_path / "f32.gguf"), export_gguf(folder, tmp_path / "f16.gguf", "F16")
    other: dict[str, RawTensor] = {}
    edit_gguf(half, tmp_path / "unused.gguf", change=other.update)
    name = "blk.1.ffn_down_exps.weight"
    mixed = edit_gguf(
        path, tmp_path / "mixed.gguf", change=lambda tensors: tensors.update({name: other[name]})
    )
    layouts = open_checkpoint(mixed).experts.layouts
    assert [layout.down.ggml_type for layout in layouts.values()] == [
        GgmlType.F32,
        GgmlType.F16,
        GgmlType.F32,
    ]
    assert (logits_from_spans(mixed, IDS) - llama_cpp_logits(mixed, IDS)).abs().max() < 1e-2


def test_any_part_of_a_split_model_opens_it_all(toy_folder: Any, tmp_path: Path) -> None:
    folder = toy_folder("mixtral")
    whole = logits_from_spans(export_gguf(folder, tmp_path / "whole.gguf"), IDS)
    (tmp_path / "parts").mkdir()
    export_gguf(folder, tmp_path / "parts" / "model.gguf", split_max_tensors=10)
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) > 2
    for path in (parts[0], parts[-1], tmp_path / "parts"):
        assert torch.equal(logits_from_spans(path, IDS), whole)
    assert (llama_cpp_logits(parts[0], IDS) - whole).abs().max() < 1e-3 * whole.std()


def fuse_gate_up(tensors: dict[str, RawTensor]) -> None:
    """Stack each expert's gate rows on its up rows, as newer files have them."""
    stacks = [name for name in tensors if name.endswith("ffn_gate_exps.weight")]
    for layer_idx in (name.split(".")[1] for name in stacks):
        gate, up = (tensors.pop(f"blk.{layer_idx}.ffn_{matrix}_exps.weight") for matrix in ("gate", "up"))
        columns, rows, num_experts = gate.dims
        size = len(gate.data) // num_experts
        pieces = [part.data[i * size : (i + 1) * size] for i in range(num_experts) for part in (gate, up)]
        fused = RawTensor([columns, 2 * rows, num_experts], gate.ggml_type, b"".join(pieces))
        tensors[f"blk.{layer_idx}.ffn_gate_up_exps.weight"] = fused


def split_experts(tensors: dict[str, RawTensor]) -> None:
    """One tensor per expert and matrix, as in files of 2023."""
    for name in [name for name in tensors if "_exps" in name]:
        stack = tensors.pop(name)
        size = len(stack.data) // stack.dims[2]
        for expert_id in range(stack.dims[2]):
            piece = RawTensor(
                stack.dims[:2], stack.ggml_type, stack.data[expert_id * size : (expert_id + 1) * size]
            )
            tensors[name.replace("_exps", f".{expert_id}")] = piece


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("layout", [fuse_gate_up, split_experts])
def test_other_ways_of_storing_experts_are_the_same_model(
    layout: Callable[..., None], family: str, toy_folder: Any, tmp_path: Path
) -> None:
    path = export_gguf(toy_folder(family), tmp_path / "model.gguf")
    other = edit_gguf(path, tmp_path / "other.gguf", change=layout)
    orders = {found.row_order for found in open_checkpoint(other).experts.layouts.values()}
    assert orders == {RowOrder.GATE_UP if layout is fuse_gate_up else RowOrder.SPLIT}
    assert torch.equal(logits_from_spans(other, IDS), logits_from_spans(path, IDS))


def test_dense_layers_among_the_experts_are_found(toy_folder: Any, tmp_path: Path) -> None:
    folder = toy_folder("qwen3_moe_with_dense_layers")
    path = export_gguf(folder, tmp_path / "model.gguf")
    assert open_checkpoint(path).spec.moe_layers == open_checkpoint(folder).spec.moe_layers == (1, 3)
    assert torch.equal(logits_from_spans(path, IDS), transformers_logits(folder, IDS))


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0}


@pytest.mark.parametrize("rope", [YARN, LINEAR], ids=["yarn", "linear"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_stretched_rotary_embeddings_agree_three_ways(
    family: str, rope: dict[str, Any], toy_folder: Any, tmp_path: Path
) -> None:
    folder = toy_folder(family, rope_parameters=rope, max_position_embeddings=64, head_dim=16)
    assert_three_way(folder, export_gguf(folder, tmp_path / "model.gguf"), IDS, logits_from_spans)


def test_llama_3_frequency_factors_are_kept(toy_folder: Any, tmp_path: Path) -> None:
    """rope_freqs.weight divides the rotary frequencies; transformers' longrope takes the same list."""
    factors = [1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0]
    plain = export_gguf(toy_folder("mixtral"), tmp_path / "plain.gguf")
    raw = RawTensor([8], int(GgmlType.F32), struct.pack("<8f", *factors))
    path = edit_gguf(
        plain, tmp_path / "model.gguf", change=lambda found: found.update({"rope_freqs.weight": raw})
    )
    ours, theirs = logits_from_spans(path, IDS), llama_cpp_logits(path, IDS)
    assert (ours - theirs).abs().max() < 1e-3 * ours.std()
    assert (ours - logits_from_spans(plain, IDS)).abs().max() > 0.1 * ours.std()


def dense_folder(family: str, folder: Path) -> Path:
    """A dense toy model, exported through its MoE sibling's names."""
    save_tokenizer(folder)
    sizes = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.15 if weight.ndim > 1 else 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_dense_files_open_when_they_are_allowed(family: str, tmp_path: Path) -> None:
    folder = dense_folder(family, tmp_path)
    path = export_gguf(folder, tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=rf"this {family} model is dense"):
        open_checkpoint(path)
    assert_three_way(folder, path, IDS, logits_from_spans)


def test_a_file_brings_its_tokenizer_template_and_ends(toy_folder: Any, tmp_path: Path) -> None:
    path = export_gguf(toy_folder("qwen3_moe"), tmp_path / "model.gguf")
    ends = open_checkpoint(path).generation_config["eos_token_id"]
    assert ends == [2, 257, 259]  # eos by its key, <|endoftext|> and <|im_end|> by their texts
    named = edit_gguf(path, tmp_path / "named.gguf", {"tokenizer.ggml.eot_token_id": ("u32", 7)})
    assert open_checkpoint(named).generation_config["eos_token_id"] == [2, 7, 257, 259]
    tokenizer = load_tokenizer(path)
    message = [{"role": "user", "content": "abc"}]
    assert tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == (
        "<|user|>abc<|end|><|assistant|>"
    )
    assert tokenizer.encode("ab<|im_end|>") == [256, 259]


@pytest.mark.parametrize(
    "mixture",
    [
        "Q4_K_M",
        "Q2_K",
        "Q3_K_L",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("Q5_K_M", "Q6_K", "IQ4_XS", "IQ3_S")),
    ],
)
def test_the_mixtures_of_llama_cpp_are_read_type_by_type(
    mixture: str, toy_folder: Any, tmp_path: Path
) -> None:
    """llama.cpp quantizes: each tensor then has its own type."""
    llama_cpp = pytest.importorskip("llama_cpp")
    sizes = {
        "hidden_size": 256,
        "moe_intermediate_size": 256,
        "num_attention_heads": 16,
        "num_experts_per_tok": 8,
    }
    source = export_gguf(toy_folder("qwen3_moe", **sizes), tmp_path / "f32.gguf")
    path = tmp_path / f"{mixture}.gguf"
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mixture}")
    parameters.nthread = 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), parameters) == 0
    types = {kind.name for kind in open_checkpoint(path).bytes_by_type()}
    assert types > {"F32"}
    assert_close_to_llama_cpp(path)


@pytest.fixture(scope="session")
def qwen_gguf(toy_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_gguf(toy_folder("qwen3_moe"), tmp_path_factory.mktemp("good") / "model.gguf")


def drop(name: str) -> Callable[[dict[str, RawTensor]], Any]:
    return lambda tensors: tensors.pop(name)


def reshape(name: str, dims: list[int]) -> Callable[[dict[str, RawTensor]], Any]:
    return lambda tensors: tensors.update(
        {name: RawTensor(dims, tensors[name].ggml_type, tensors[name].data)}
    )


def one_expert_in_f16(tensors: dict[str, RawTensor]) -> None:
    split_experts(tensors)
    raw = tensors["blk.1.ffn_up.3.weight"]
    tensors["blk.1.ffn_up.3.weight"] = RawTensor(raw.dims, int(GgmlType.F16), raw.data[: len(raw.data) // 2])


BAD_KEYS = {
    "architecture": (
        "str",
        "mamba",
        r"general.architecture 'mamba' is not supported; supported are qwen3moe, llama",
    ),
    "architecture ": ("u32", 7, r"general.architecture 7 is not supported"),
    "block_count": (None, None, r"qwen3moe.block_count is missing; it must be an integer"),
    "embedding_length": (None, None, r"qwen3moe.embedding_length is missing"),
    "attention.head_count": ("str", "4", r"attention.head_count must be an integer .*found '4'"),
    "attention.key_length": (None, None, r"attention.(key|value)_length"),
    "attention.value_length": ("u32", 8, r"attention.value_length=8 differs from the head size 16"),
    "attention.layer_norm_rms_epsilon": (
        "f32",
        float("nan"),
        r"rms_epsilon must be a positive number, found nan",
    ),
    "feed_forward_length": (None, None, r"feed_forward_length is missing"),
    "expert_count": ("u64", 1 << 60, rf"expert_count must be .*found {1 << 60}"),
    "expert_count ": (
        "u32",
        9,
        r"'blk.0.ffn_gate_inp.weight' has shape \(8, 64\), by the metadata .* \(9, 64\)",
    ),
    "expert_used_count": ("u32", 0, r"expert_used_count must be"),
    "expert_used_count ": ("u32", 9, r"expert_used_count must be an integer from 1 to 8, found 9"),
    "expert_feed_forward_length": ("u32", 25, r"ffn_(gate|up)_exps.weight' has shape \(8, 24, 64\)"),
    "context_length": ("[i32]", [1, 2], r"context_length must be an integer"),
    "block_count ": ("u32", 2, r"tensor 'blk.2.* is not a tensor of a qwen3_moe model"),
    "block_count  ": ("u32", 4, r"tensor 'blk.3.attn_norm.weight' is missing"),
    "rope.scaling.type": (
        "str",
        "longrope",
        r"rope.scaling.type 'longrope' is unknown; linear and yarn are read",
    ),
}
BAD_TENSORS: dict[str, tuple[Callable[..., Any], str]] = {
    "dense missing": (drop("blk.1.attn_q.weight"), r"tensor 'blk.1.attn_q.weight' is missing"),
    "expert missing": (drop("blk.1.ffn_up_exps.weight"), r"tensor 'blk.1.ffn_up_exps.weight' is missing"),
    "embedding missing": (drop("token_embd.weight"), r"tensor 'token_embd.weight' is missing"),
    "wrong shape": (reshape("blk.1.attn_q.weight", [32, 128]), r"'blk.1.attn_q.weight' has shape \(128"),
    "unknown tensor": (
        lambda found: found.update({"blk.0.ssm_a": RawTensor([1], 0, bytes(4))}),
        r"tensor 'blk.0.ssm_a' is not a tensor of a qwen3_moe model that this version can run",
    ),
    "types within a layer": (one_expert_in_f16, r"'blk.1.ffn_up.3.weight' is F16, but F32 for the layer"),
}


@pytest.mark.parametrize("name", [*BAD_KEYS, *BAD_TENSORS])
def test_a_bad_model_is_refused_with_file_place_and_remedy(
    name: str, qwen_gguf: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.gguf"
    if name in BAD_KEYS:
        kind, item, message = BAD_KEYS[name]
        prefix = "general" if name.startswith("architecture") else "qwen3moe"
        edit_gguf(qwen_gguf, bad, {f"{prefix}.{name.strip()}": (kind, item) if kind else None})
    else:
        change, message = BAD_TENSORS[name]
        edit_gguf(qwen_gguf, bad, change=change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(bad)
    assert str(bad) in str(caught.value)


def test_a_window_that_dense_qwen_cannot_place_is_refused(tmp_path: Path) -> None:
    source = export_gguf(dense_folder("qwen3", tmp_path), tmp_path / "plain.gguf")
    path = edit_gguf(source, tmp_path / "window.gguf", {"qwen3.attention.sliding_window": ("u32", 32)})
    with pytest.raises(CheckpointError, match=r"sliding_window=32.*safetensors folder"):
        open_checkpoint(path, allow_dense=True)
