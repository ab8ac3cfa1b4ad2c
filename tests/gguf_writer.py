"""GGUF files for tests: byte by byte where a file must be wrong, by gguf-py where it must be right."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TYPES = {
    "u8": 0,
    "i8": 1,
    "u16": 2,
    "i16": 3,
    "u32": 4,
    "i32": 5,
    "f32": 6,
    "bool": 7,
    "u64": 10,
    "i64": 11,
    "f64": 12,
}
FORMATS = {"u8": "<B", "i8": "<b", "u16": "<H", "i16": "<h", "u32": "<I", "i32": "<i", "f32": "<f",
           "bool": "<?", "u64": "<Q", "i64": "<q", "f64": "<d"}  # fmt: skip


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: str, item: Any) -> bytes:
    """A typed value: kind is a scalar's name, "str", or "[kind]" for an array."""
    if kind == "str":
        return struct.pack("<I", 8) + string(item)
    if kind.startswith("["):
        inner = kind[1:-1]
        if inner == "str":
            return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(string(text) for text in item)
        packed = b"".join(struct.pack(FORMATS[inner], number) for number in item)
        return struct.pack("<IIQ", 9, TYPES[inner], len(item)) + packed
    return struct.pack("<I", TYPES[kind]) + struct.pack(FORMATS[kind], item)


def key(name: str | bytes, kind: str, item: Any) -> bytes:
    return string(name) + value(kind, item)


def tensor(name: str, dims: Sequence[int], ggml_type: int, offset: int) -> bytes:
    """A tensor table entry; ``dims`` in ggml's order, columns first."""
    head = string(name) + struct.pack("<I", len(dims))
    return head + b"".join(struct.pack("<Q", dim) for dim in dims) + struct.pack("<IQ", ggml_type, offset)


def gguf_bytes(
    keys: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; counts are those of the parts unless a test states others."""
    keys, tensors = list(keys), list(tensors)
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    head = (
        magic + struct.pack("<I", version) + struct.pack("<QQ", *counts) + b"".join(keys) + b"".join(tensors)
    )
    return head + b"\0" * (-len(head) % alignment) + data


def write_vocabulary(
    path: Path,
    tokens: Sequence[str],
    *,
    model: str = "gpt2",
    pre: str | None = None,
    merges: Sequence[str] = (),
    scores: Sequence[float] = (),
    token_types: Sequence[int] = (),
    special: dict[str, int] | None = None,
    flags: dict[str, bool] | None = None,
) -> Path:
    """Write a GGUF that holds a tokenizer and no tensors (``vocab_only`` in llama.cpp)."""
    keys = [
        key("general.architecture", "str", "llama"),
        key("tokenizer.ggml.model", "str", model),
        key("tokenizer.ggml.tokens", "[str]", tokens),
        key("tokenizer.ggml.token_type", "[i32]", token_types or [1] * len(tokens)),
    ]
    if pre is not None:
        keys.append(key("tokenizer.ggml.pre", "str", pre))
    if merges:
        keys.append(key("tokenizer.ggml.merges", "[str]", merges))
    if scores:
        keys.append(key("tokenizer.ggml.scores", "[f32]", scores))
    keys += [
        key(f"tokenizer.ggml.{name}_token_id", "u32", token_id) for name, token_id in (special or {}).items()
    ]
    keys += [key(f"tokenizer.ggml.{name}", "bool", flag) for name, flag in (flags or {}).items()]
    path.write_bytes(gguf_bytes(keys))
    return path


@dataclass
class RawTensor:
    """A tensor as it stands in a file: dims in ggml's order, ggml type number, bytes."""

    dims: list[int]
    ggml_type: int
    data: bytes


def edit_gguf(
    source: Path,
    target: Path,
    keys: dict[str, tuple[str, Any] | None] | None = None,
    change: Callable[[dict[str, RawTensor]], Any] = lambda tensors: None,
) -> Path:
    """Copy a GGUF (read by gguf-py) with keys set or (None) dropped and its tensors changed."""
    import gguf

    reader = gguf.GGUFReader(source)
    kept = {
        name: b"".join(part.tobytes() for part in field.parts)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    for name, item in (keys or {}).items():
        kept.pop(name, None)
        if item is not None:
            kept[name] = key(name, *item)
    tensors = {
        found.name: RawTensor([int(dim) for dim in found.shape], int(found.tensor_type), found.data.tobytes())
        for found in reader.tensors
    }
    change(tensors)
    table, data = [], b""
    for name, raw in tensors.items():
        table.append(tensor(name, raw.dims, raw.ggml_type, len(data)))
        data += raw.data + b"\0" * (-len(raw.data) % 32)
    target.write_bytes(gguf_bytes(kept.values(), table, data))
    return target
