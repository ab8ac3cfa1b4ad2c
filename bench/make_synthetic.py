"""Write a large qwen3moe GGUF of random weights, for budgets and speed: it talks nonsense.

    python bench/make_synthetic.py --like qwen3-30b-a3b --layers 24 --mix q4_0 --out big.gguf
    python bench/make_synthetic.py --like small --size-gib 3 --mix q4_k_m --out big.gguf

Blocks are random bytes with constant scales, so that weights have the spread of a trained model's
and logits stay finite. Routers and embedding are not random: token ids in ascending order are routed as
--routing says (synthetic_routing.py), so feed them in that order. One tensor at a time is in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import synthetic_routing as routing
from gguf import GGMLQuantizationType as Type
from synthetic_blocks import block_scales, random_blocks, set_scales

END_OF_TEXT = "<|endoftext|>"
# Of the embedding's elements, where a layer adds about 0.5: an embedding of 1 drowns in what attention
# averages over the text, one of 4 leaves the residual stream so still that predictors never err.
EMBEDDING_SPREAD = 2.5
WRITE_BYTES = 16 << 20


@dataclass(frozen=True)
class Shape:
    """The sizes that decide bytes and speed, in Hugging Face's words."""

    hidden_size: int
    num_hidden_layers: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float = 1e6
    context_length: int = 32768


SHAPES = {
    "qwen3-30b-a3b": Shape(2048, 48, 128, 8, 768, 32, 4, 128, 151936),
    "gpt-oss-20b": Shape(2880, 24, 32, 4, 2880, 64, 8, 64, 201088),  # its sizes; the architecture is Qwen3's
    "small": Shape(1024, 24, 64, 8, 512, 16, 4, 64, 4096),
    "toy": Shape(256, 2, 8, 2, 256, 4, 2, 64, 512),
}
VOCAB_SIZES = {"152k": 151936, "small": 4096}


@dataclass(frozen=True)
class Tensor:
    """``shape`` is in numpy's order: (rows, cols) or (experts, rows, cols)."""

    name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def num_bytes(self) -> int:
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block_elements * block_bytes


def main() -> None:
    """Write the file, then print its figures and one line of JSON."""
    args = parse_args()
    shape = chosen_shape(args)
    begin = time.perf_counter()
    tensors = list_tensors(shape, args.mix)
    experts = chosen_experts(args, shape)
    write(args.out, shape, tensors, experts, args.seed)
    seconds = time.perf_counter() - begin
    expert_bytes = sum(t.num_bytes for t in tensors if "_exps" in t.name)
    result = {
        "bench": "make_synthetic", "like": args.like, "mix": args.mix, "layers": shape.num_hidden_layers,
        "file_bytes": args.out.stat().st_size, "expert_bytes": expert_bytes, "seconds": seconds,
        "routing": args.routing, "adjacent_reuse": routing.adjacent_reuse(experts),
    }  # fmt: skip
    sizes = f"{result['file_bytes'] / 2**30:.2f} GiB, {expert_bytes / 2**30:.2f} of experts"
    print(f"{args.out}: {sizes}, {seconds:.1f} s")
    reuse = f"{result['adjacent_reuse']:.0%} of a token's experts are the next token's, too"
    print(f"routing {args.routing}: {reuse} (intended; what the model makes of it is to be measured)")
    print(json.dumps(result))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--like", choices=SHAPES, default="qwen3-30b-a3b", help="layer shape")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--layers", type=int, help="default: as the original")
    length.add_argument("--size-gib", type=float, help="as few layers as make the file at least this large")
    parser.add_argument("--mix", choices=MIXES, default="q4_0", help="formats, as in llama.cpp")
    parser.add_argument("--vocab", choices=VOCAB_SIZES, default="small")
    parser.add_argument(
        "--routing", default="zipf-markov", help="zipf-markov, independent, or a recorded trace to follow"
    )
    parser.add_argument("--num-experts", type=int, help="a layer; default: as the original")
    parser.add_argument("--top-k", type=int, help="experts of a token; default: as the original")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def chosen_shape(args: argparse.Namespace) -> Shape:
    """Apply --layers, --size-gib, --vocab, --num-experts and --top-k to the preset."""
    preset = SHAPES[args.like]
    shape = replace(
        preset,
        vocab_size=preset.vocab_size if args.like == "toy" else VOCAB_SIZES[args.vocab],
        num_experts=args.num_experts or preset.num_experts,
        top_k=args.top_k or preset.top_k,
    )
    if args.size_gib is not None:
        shape = replace(shape, num_hidden_layers=1)
        while sum(t.num_bytes for t in list_tensors(shape, args.mix)) < args.size_gib * 2**30:
            shape = replace(shape, num_hidden_layers=shape.num_hidden_layers + 1)
        return shape
    return replace(shape, num_hidden_layers=args.layers or shape.num_hidden_layers)


def chosen_experts(args: argparse.Namespace, shape: Shape) -> routing.Experts:
    """Return what every token id is to choose, (tokens, layers, top_k), as --routing says."""
    sizes = (shape.num_hidden_layers, shape.num_experts, shape.top_k)
    if args.routing == "zipf-markov":
        return routing.zipf_markov(*sizes, args.seed)
    if args.routing == "independent":
        return routing.independent(*sizes, args.seed)
    return routing.from_trace(Path(args.routing), *sizes)


# Which tensor has which format


def q4_0(name: str, layer_idx: int, num_layers: int) -> Type:
    """Experts Q4_0, dense layers Q8_0."""
    return Type.Q4_0 if "_exps" in name else Type.Q8_0


def q8_0(name: str, layer_idx: int, num_layers: int) -> Type:
    """Everything Q8_0."""
    return Type.Q8_0


def q4_k_m(name: str, layer_idx: int, num_layers: int) -> Type:
    """Q4_K, with Q6_K for the head and, in about half of the layers, for down and value."""
    outer = layer_idx < num_layers // 8 or layer_idx >= 7 * num_layers // 8
    more_bits = outer or (layer_idx - num_layers // 8) % 3 == 2
    if name == "output.weight" or (more_bits and ("ffn_down_exps" in name or "attn_v" in name)):
        return Type.Q6_K
    return Type.Q4_K


MIXES = {"q4_0": q4_0, "q8_0": q8_0, "q4_k_m": q4_k_m}


def list_tensors(shape: Shape, mix: str) -> list[Tensor]:
    """Return the file's tensors in order; norms and routers are float32."""
    hidden, intermediate, experts = shape.hidden_size, shape.moe_intermediate_size, shape.num_experts
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    tensors = []

    def add(name: str, *dims: int, layer_idx: int = 0) -> None:
        is_float = len(dims) == 1 or "ffn_gate_inp" in name
        tensor_type = Type.F32 if is_float else MIXES[mix](name, layer_idx, shape.num_hidden_layers)
        if name == "token_embd.weight":
            tensor_type = Type.Q8_0  # one row of it is read per token; gguf-py cannot quantize to K formats
        tensors.append(Tensor(name, dims, tensor_type))

    add("token_embd.weight", shape.vocab_size, hidden)
    for i in range(shape.num_hidden_layers):
        add(f"blk.{i}.attn_norm.weight", hidden)
        add(f"blk.{i}.attn_q.weight", query, hidden, layer_idx=i)
        add(f"blk.{i}.attn_k.weight", key, hidden, layer_idx=i)
        add(f"blk.{i}.attn_v.weight", key, hidden, layer_idx=i)
        add(f"blk.{i}.attn_q_norm.weight", shape.head_dim)
        add(f"blk.{i}.attn_k_norm.weight", shape.head_dim)
        add(f"blk.{i}.attn_output.weight", hidden, query, layer_idx=i)
        add(f"blk.{i}.ffn_norm.weight", hidden)
        add(f"blk.{i}.ffn_gate_inp.weight", experts, hidden)
        add(f"blk.{i}.ffn_gate_exps.weight", experts, intermediate, hidden, layer_idx=i)
        add(f"blk.{i}.ffn_up_exps.weight", experts, intermediate, hidden, layer_idx=i)
        add(f"blk.{i}.ffn_down_exps.weight", experts, hidden, intermediate, layer_idx=i)
    add("output_norm.weight", hidden)
    add("output.weight", shape.vocab_size, hidden)
    return tensors


# Bytes


def write(out: Path, shape: Shape, tensors: list[Tensor], experts: routing.Experts, seed: int) -> None:
    """Write a temporary file beside ``out`` and rename it when it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, "qwen3moe")
    add_metadata(writer, shape)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(partial, "ab") as file:
        pad(file)
        for index, tensor in enumerate(tensors):
            if tensor.name == "token_embd.weight":
                pieces = embedding_pieces(tensor, experts, shape, seed)
            elif "ffn_gate_inp" in tensor.name:
                rows = routing.router_rows(int(tensor.name.split(".")[1]), *tensor.shape, seed)
                pieces = iter([rows.data.cast("B")])
            else:
                pieces = tensor_pieces(tensor, np.random.default_rng([seed, index]))
            for piece in pieces:
                file.write(piece)
            pad(file)
    os.replace(partial, out)


def pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """Write the shape and a tokenizer of single bytes, two merges and names without meaning."""
    writer.add_name("synthetic: random weights")
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.moe_intermediate_size)
    writer.add_expert_feed_forward_length(shape.moe_intermediate_size)
    writer.add_expert_count(shape.num_experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(shape.rope_theta)
    tokens, types, merges = vocabulary(shape.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for add_id in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add_id(0)
    writer.add_add_bos_token(False)


def vocabulary(size: int) -> tuple[list[str], list[int], list[str]]:
    """Return tokens, their types and the merges of a byte-level BPE of ``size`` tokens."""
    from tokenizers import pre_tokenizers

    merges = ["Ġ t", "Ġt h"]
    tokens = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "Ġth"]
    types = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1)
    fillers = [f"word{i}" for i in range(size - len(tokens))]
    return tokens + fillers, types + [gguf.TokenType.NORMAL] * len(fillers), merges


def embedding_pieces(
    tensor: Tensor, experts: routing.Experts, shape: Shape, seed: int
) -> Iterator[memoryview]:
    """Yield the embedding's rows, the routed ones again and again up to the vocabulary's size."""
    rows = routing.embedding_rows(experts, shape.num_experts, shape.hidden_size, seed, EMBEDDING_SPREAD)
    packed = np.ascontiguousarray(gguf.quantize(rows, tensor.type))
    for first in range(0, shape.vocab_size, len(packed)):
        yield packed[: shape.vocab_size - first].data.cast("B")


def tensor_pieces(tensor: Tensor, rng: np.random.Generator) -> Iterator[memoryview]:
    """Yield the tensor's bytes in pieces of at most WRITE_BYTES."""
    if tensor.type == Type.F32:
        yield np.ones(tensor.shape, np.float32).data.cast("B")  # a norm's
        return
    block_bytes = gguf.GGML_QUANT_SIZES[tensor.type][1]
    scales = block_scales(tensor.type, 1 / math.sqrt(tensor.shape[-1]))
    num_blocks, piece_blocks = tensor.num_bytes // block_bytes, WRITE_BYTES // block_bytes
    for first in range(0, num_blocks, piece_blocks):
        blocks = random_blocks(min(piece_blocks, num_blocks - first), block_bytes, rng)
        set_scales(blocks, scales)
        yield blocks.data.cast("B")


if __name__ == "__main__":
    main()
