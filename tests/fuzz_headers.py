"""Damage checkpoints at random and open them, for as long as one likes: ``make fuzz``.

    python tests/fuzz_headers.py --seconds 600 [--seed 7]

Opening may succeed or raise CheckpointError; any other exception, more than a second for a file of
a few kilobytes, or memory beyond 512 MiB more than at the start is a bug. The failing file is kept
and its path and seed are printed; exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed

from gguf_writer import gguf_bytes, key, tensor

from moe_offload import CheckpointError
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.gguf import GgufArray
from moe_offload.storage.gguf_parts import read_gguf

NUMBERS = [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 127, 255, 256, 65535]
NUMBERS += [1 << bit for bit in (20, 30, 31, 32, 40, 60, 63)]
NUMBERS += [(1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1]
SHAPES = {
    "attn_norm": [32], "attn_q": [32, 32], "attn_k": [32, 16], "attn_v": [32, 16], "attn_output": [32, 32],
    "attn_q_norm": [8], "attn_k_norm": [8], "ffn_norm": [32], "ffn_gate_inp": [32, 4],
    "ffn_gate_exps": [32, 32, 4], "ffn_up_exps": [32, 32, 4], "ffn_down_exps": [32, 32, 4],
}  # fmt: skip
PARAMETERS = {
    "input_layernorm": [32], "post_attention_layernorm": [32], "self_attn.q_proj": [32, 32],
    "self_attn.k_proj": [16, 32], "self_attn.v_proj": [16, 32], "self_attn.o_proj": [32, 32],
    "self_attn.q_norm": [8], "self_attn.k_norm": [8], "mlp.gate": [4, 32],
    **{f"mlp.experts.{expert}.{matrix}_proj": [32, 32]
       for matrix in ("gate", "up", "down") for expert in range(4)},
}  # fmt: skip
CONFIG = {
    "model_type": "qwen3_moe", "vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32,
    "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [],
}  # fmt: skip


def good_gguf() -> bytes:
    """A whole qwen3moe of two layers with Q4_0 experts and a vocabulary, a few kilobytes of header."""
    numbers = {
        "block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8, "expert_count": 4,
        "attention.value_length": 8, "expert_used_count": 2, "expert_feed_forward_length": 32,
    }  # fmt: skip
    keys = [
        key("general.architecture", "str", "qwen3moe"),
        *(key(f"qwen3moe.{name}", "u32", number) for name, number in numbers.items()),
        key("qwen3moe.attention.layer_norm_rms_epsilon", "f32", 1e-6),
        key("tokenizer.ggml.model", "str", "gpt2"),
        key("tokenizer.ggml.tokens", "[str]", [f"token {i}" for i in range(12)]),
        key("tokenizer.ggml.token_type", "[i32]", [1] * 12),
        key("tokenizer.ggml.eos_token_id", "u32", 3),
    ]
    shapes = {"token_embd": [32, 12], "output_norm": [32]}
    shapes |= {f"blk.{layer}.{name}": dims for layer in range(2) for name, dims in SHAPES.items()}
    table, position = [], 0
    for name, dims in shapes.items():
        quantized = "_exps" in name
        table.append(tensor(f"{name}.weight", dims, 2 if quantized else 0, position))
        elements = dims[0] * (dims[1] if len(dims) > 1 else 1) * (dims[2] if len(dims) > 2 else 1)
        num_bytes = elements // 32 * 18 if quantized else 4 * elements
        position += -(-num_bytes // 32) * 32
    return gguf_bytes(keys, table, bytes(position))


def good_safetensors() -> bytes:
    """The same model as one safetensors file."""
    shapes = {"model.embed_tokens": [12, 32], "model.norm": [32], "lm_head": [12, 32]}
    shapes |= {
        f"model.layers.{layer}.{name}": dims for layer in range(2) for name, dims in PARAMETERS.items()
    }
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(position)


def damage(content: bytes, header_bytes: int, rng: random.Random) -> bytes:
    """Change a few places of the header: numbers, bits, pieces moved, doubled or cut."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(header_bytes)
        kind = rng.randrange(6)
        if kind == 0:
            damaged[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
        elif kind == 1:
            damaged[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
        elif kind == 2:
            damaged[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 3:
            damaged[at : at + 1] = str(rng.choice(NUMBERS)).encode()
        elif kind == 4:
            source = rng.randrange(header_bytes)
            damaged[at:at] = damaged[source : source + rng.randrange(64)]
        else:
            del damaged[at : at + rng.randrange(64)]
    return bytes(damaged[: rng.randrange(len(damaged))] if rng.random() < 0.1 else damaged)


def damage_config(rng: random.Random) -> str:
    """A config.json with values of other kinds and sizes."""
    config: dict[str, object] = dict(CONFIG)
    others = [
        None,
        True,
        -1,
        0,
        1 << 60,
        1.5,
        "32",
        [],
        [0],
        {},
        {"quant_method": "fp8"},
        "mixtral",
        *NUMBERS,
    ]
    for _ in range(rng.randrange(4)):
        config[rng.choice([*CONFIG, "quantization_config", "text_config"])] = rng.choice(others)
    return json.dumps(config)


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after ``seconds`` of this process's own time: a machine may be busy."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def open_gguf(folder: Path) -> None:
    path = folder / "model.gguf"
    for item in read_gguf(path).metadata.values():
        if isinstance(item, GgufArray):
            item.values()
    open_checkpoint(path, allow_dense=True)


def open_folder(folder: Path) -> None:
    open_checkpoint(folder, allow_dense=True)


def write_gguf(folder: Path, rng: random.Random) -> None:
    content = good_gguf()
    (folder / "model.gguf").write_bytes(damage(content, content.rindex(b"ffn_down_exps") + 60, rng))


def write_folder(folder: Path, rng: random.Random) -> None:
    content = good_safetensors()
    header_bytes = 8 + struct.unpack("<Q", content[:8])[0]
    (folder / "model.safetensors").write_bytes(
        damage(content, header_bytes, rng) if rng.random() < 0.7 else content
    )
    (folder / "config.json").write_text(damage_config(rng))


CASES: list[tuple[Callable[[Path, random.Random], None], Callable[[Path], None]]] = [
    (write_gguf, open_gguf),
    (write_folder, open_folder),
]


def run(seconds: float, seed: int, max_files: int = sys.maxsize) -> tuple[int, int]:
    """Return how many checkpoints were opened and how many refused.

    Raises:
        AssertionError: something else happened; the message names the seed and the kept folder.
    """
    opened = refused = 0
    until = time.monotonic() + seconds
    for number in range(max_files):
        if time.monotonic() > until:
            return opened, refused
        write, read = CASES[number % len(CASES)]
        with tempfile.TemporaryDirectory() as name:
            write(Path(name), random.Random(seed + number))
            try:
                with bounded(1.0):
                    read(Path(name))
                opened += 1
            except CheckpointError as error:
                assert name in str(error), f"the error does not name its file: {error}"
                refused += 1
            except BaseException as error:
                kept = tempfile.mkdtemp(prefix="moe_offload_fuzz_")
                shutil.copytree(name, kept, dirs_exist_ok=True)
                raise AssertionError(f"seed {seed + number}: {error!r}; files kept in {kept}") from error
    return opened, refused


def limit_memory(extra_bytes: int) -> None:
    """Let the process grow by ``extra_bytes`` of address space and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    limit_memory(512 << 20)
    opened, refused = run(args.seconds, args.seed)
    print(json.dumps({"seed": args.seed, "opened": opened, "refused": refused}))


if __name__ == "__main__":
    main()
