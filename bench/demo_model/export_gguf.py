"""Write a Hugging Face folder (qwen3_moe, mixtral, llama, qwen2, qwen3; byte-level BPE) as a GGUF.

    python bench/demo_model/export_gguf.py MODEL_DIR OUT.gguf --experts Q4_0 --dense Q8_0 --embed Q8_0

llama.cpp loads it; the rules are its own: experts of a layer stacked in one tensor per matrix,
one-dimensional tensors and routers in F32, Q and K rows of Llama and Mixtral in the order of its
rotary embedding. Blocks are quantized by gguf-py, which knows F32, F16, BF16, Q4_0 to Q8_0, TQ1_0,
TQ2_0 and MXFP4.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, TokenType
from safetensors import safe_open

ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
EXPERT_NAMES = {
    "qwen3_moe": "mlp.experts.{expert}.{matrix}_proj.weight",
    "mixtral": "block_sparse_moe.experts.{expert}.{matrix}.weight",
}
MIXTRAL_MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.bias": "attn_output.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

Types = str | Mapping[str, str]  # one type for all, or by "experts", "gate", "up", "down", "dense", "embed"


def export_gguf(
    model_dir: str | Path,
    out_path: str | Path,
    types: Types = "F32",
    *,
    tokenizer_pre: str = "gpt-2",
    split_max_tensors: int = 0,
) -> Path:
    """Write ``model_dir`` as a GGUF and return ``out_path``; a file that stands there is replaced."""
    model_dir, out_path = Path(model_dir), Path(out_path)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    unfinished = out_path if split_max_tensors else out_path.with_name(out_path.name + ".unfinished")
    writer = gguf.GGUFWriter(
        unfinished, ARCHITECTURES[config["model_type"]], split_max_tensors=split_max_tensors
    )
    try:
        add_metadata(writer, config, model_dir.name)
        add_tokenizer(writer, model_dir, config, tokenizer_pre)
        for name, weight in gguf_tensors(model_dir, config):
            add_weight(writer, name, weight, types)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    if not split_max_tensors:
        os.replace(unfinished, out_path)
    return out_path


def add_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any], name: str) -> None:
    """Write the keys that shape the model."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_name(name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] in EXPERT_NAMES:
        writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config["model_type"] == "qwen3_moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if ARCHITECTURES[config["model_type"]] == "llama":
        writer.add_rope_dimension_count(head_dim)
    add_rope(writer, config)


def add_rope(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return
    if kind not in ("linear", "yarn"):
        raise ValueError(f"rope_type {kind!r} has no counterpart here; default, linear and yarn have")
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def add_tokenizer(writer: gguf.GGUFWriter, model_dir: Path, config: Mapping[str, Any], pre: str) -> None:
    """Write a byte-level BPE tokenizer.json, its special tokens and the chat template."""
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text(encoding="utf-8"))
    if tokenizer["model"]["type"] != "BPE":
        raise ValueError(
            f"{model_dir}: tokenizer model {tokenizer['model']['type']}; a byte-level BPE is wanted"
        )
    vocab = dict(tokenizer["model"]["vocab"])
    kinds = dict.fromkeys(vocab.values(), TokenType.NORMAL)
    for token in tokenizer["added_tokens"]:
        vocab[token["content"]] = token["id"]
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    texts = {token_id: text for text, token_id in vocab.items()}
    ids = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([texts.get(token_id, f"[PAD{token_id}]") for token_id in ids])
    writer.add_token_types([kinds.get(token_id, TokenType.UNUSED) for token_id in ids])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    add_special_tokens(writer, model_dir, config)


def add_special_tokens(writer: gguf.GGUFWriter, model_dir: Path, config: Mapping[str, Any]) -> None:
    eos = config.get("eos_token_id")
    for add, token_id in (
        (writer.add_bos_token_id, config.get("bos_token_id")),
        (writer.add_eos_token_id, eos[0] if isinstance(eos, list) else eos),
        (writer.add_pad_token_id, config.get("pad_token_id")),
    ):
        if token_id is not None:
            add(token_id)
    settings_path, template_path = model_dir / "tokenizer_config.json", model_dir / "chat_template.jinja"
    settings = json.loads(settings_path.read_text(encoding="utf-8")) if settings_path.exists() else {}
    writer.add_add_bos_token(bool(settings.get("add_bos_token", False)))
    template = (
        template_path.read_text(encoding="utf-8") if template_path.exists() else settings.get("chat_template")
    )
    if template:
        writer.add_chat_template(template)


def gguf_tensors(model_dir: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor under its GGUF name, in float32; the experts of a layer as one tensor."""
    source = _Source(model_dir)
    for name, gguf_name in MODEL_NAMES.items():
        if name in source and not (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            yield gguf_name, source[name]
    for layer_idx in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer_idx}."
        for name, leaf in LAYER_NAMES.items():
            if prefix + name in source:
                yield f"blk.{layer_idx}.{leaf}", _rotary_order(source[prefix + name], name, config)
        if config["model_type"] in EXPERT_NAMES:
            yield from _experts(source, layer_idx, config)


def _experts(
    source: _Source, layer_idx: int, config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    num_experts = config.get("num_local_experts") or config["num_experts"]
    mixtral = config["model_type"] == "mixtral"
    pattern = f"model.layers.{layer_idx}." + EXPERT_NAMES[config["model_type"]]
    for matrix in ("gate", "up", "down"):
        names = [
            pattern.format(expert=expert, matrix=MIXTRAL_MATRICES[matrix] if mixtral else matrix)
            for expert in range(num_experts)
        ]
        if names[0] in source:
            yield f"blk.{layer_idx}.ffn_{matrix}_exps.weight", torch.stack([source[name] for name in names])


def _rotary_order(weight: torch.Tensor, name: str, config: Mapping[str, Any]) -> torch.Tensor:
    """Interleave the two halves of each head of Q and K, as llama.cpp rotates neighbours (Llama, Mixtral)."""
    is_query, is_key = "q_proj" in name, "k_proj" in name
    if ARCHITECTURES[config["model_type"]] != "llama" or not (is_query or is_key):
        return weight
    heads = config["num_attention_heads"] if is_query else config["num_key_value_heads"]
    rows = weight.shape[0]
    halves = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


class _Source:
    """The folder's tensors by name, read one at a time."""

    def __init__(self, model_dir: Path) -> None:
        self.files = [safe_open(path, framework="pt") for path in sorted(model_dir.glob("*.safetensors"))]
        self.file_of = {name: file for file in self.files for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.file_of[name].get_tensor(name).float()


def add_weight(writer: gguf.GGUFWriter, name: str, weight: torch.Tensor, types: Types) -> None:
    """Quantize one tensor to the type asked for its kind and add it."""
    kind = GGMLQuantizationType[weight_type(name, weight.dim(), types)]
    data: np.ndarray = gguf.quants.quantize(weight.contiguous().numpy(), kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def weight_type(name: str, num_dims: int, types: Types) -> str:
    """Return the type for a tensor; norms, biases and routers stay F32 as in llama.cpp."""
    if num_dims == 1 or "ffn_gate_inp" in name:
        return "F32"
    if isinstance(types, str):
        return types
    if name.endswith("_exps.weight"):
        matrix = name.removesuffix("_exps.weight").rpartition("ffn_")[2]
        return types.get(matrix, types.get("experts", "F32"))
    return types.get("embed" if name in ("token_embd.weight", "output.weight") else "dense", "F32")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_dir")
    parser.add_argument("out_path")
    for kind in ("experts", "gate", "up", "down", "dense", "embed"):
        parser.add_argument(
            f"--{kind}", help=f"ggml type of {kind} tensors (default: F32, or that of --experts)"
        )
    parser.add_argument(
        "--pre", default="gpt-2", help="tokenizer.ggml.pre, llama.cpp's name of the split rule"
    )
    args = parser.parse_args()
    types = {kind: vars(args)[kind] for kind in ("experts", "gate", "up", "down", "dense", "embed")}
    chosen = {kind: name for kind, name in types.items() if name}
    path = export_gguf(args.model_dir, args.out_path, chosen, tokenizer_pre=args.pre)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
