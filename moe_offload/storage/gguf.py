"""GGUF headers: metadata and tensor table, every count checked against the file before it is used.

Owns the format's rules (versions 2 and 3, little endian): magic, counts, key-value pairs, tensor
table, then the aligned data section; gguf_parts.py joins the parts of a split file. Arrays stay in the
file until somebody asks for them, so a vocabulary of 150k tokens costs one walk over its string lengths.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from moe_offload.errors import CheckpointError
from moe_offload.storage.expert_format import BLOCK_SIZES, GgmlType, Span
from moe_offload.storage.gguf_window import U32, U64, HeaderWindow
from moe_offload.storage.header_reader import HeaderReader

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT_BYTES = 32
MAX_DIMS = 4
MAX_KEYS, MAX_TENSORS, MAX_ARRAY_COUNT = 1 << 16, 1 << 20, 1 << 24
MAX_NAME_BYTES, MAX_STRING_BYTES = (1 << 16) - 1, 16 << 20

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"),
    4: struct.Struct("<I"), 5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<B"),
    10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d"),
}  # fmt: skip

# Types that exist in ggml but hold no weights that we can read, so that a refusal can name them.
_OTHER_TYPES = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array in the metadata, read from the file when ``values`` is called."""

    path: Path
    key: str
    element_type: int
    count: int
    offset: int
    num_bytes: int

    def values(self) -> list[Any]:
        """Return the elements: int, float, bool or str."""
        with HeaderReader(self.path) as file:
            data = file.read(self.offset, self.num_bytes, f"metadata key {self.key!r}")
        if self.element_type == _STRING:
            return list(self._strings(data))
        scalar = _SCALARS[self.element_type]
        numbers = [number for (number,) in scalar.iter_unpack(data)]
        return [bool(number) for number in numbers] if self.element_type == _BOOL else numbers

    def _strings(self, data: bytes) -> Iterator[str]:
        position = 0
        try:
            for _ in range(self.count):
                (length,) = U64.unpack_from(data, position)
                position += 8 + length
                if position > len(data):
                    raise struct.error(f"{length} bytes reach past the array")
                yield data[position - length : position].decode("utf-8")
        except (struct.error, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path}: metadata key {self.key!r}: bad string: {error}") from error


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the tensor table; ``span`` counts from the start of its file."""

    name: str
    ggml_type: GgmlType
    shape: tuple[int, ...]  # torch order: rows before columns
    span: Span


@dataclass(frozen=True)
class GgufHeader:
    """Metadata of a GGUF (of the first part, when it is split) and the tensors of all its parts."""

    files: tuple[Path, ...]
    metadata: Mapping[str, Any]  # int, float, bool, str or GgufArray
    tensors: Mapping[str, GgufTensor]

    @property
    def path(self) -> Path:
        return self.files[0]

    def array(self, key: str, kind: type) -> list[Any] | None:
        """Return the array under ``key`` (elements of ``kind``), or None when there is none."""
        value = self.metadata.get(key)
        if value is None:
            return None
        values = value.values() if isinstance(value, GgufArray) else None
        if values is None or any(type(item) is not kind for item in values):
            raise CheckpointError(f"{self.path}: metadata key {key!r} must be an array of {kind.__name__}")
        return values


def read_part(path: Path, file_id: int = 0) -> GgufHeader:
    """Read the header of one file; its spans name it ``file_id``."""
    with HeaderReader(path) as file:
        window = HeaderWindow(file)
        num_tensors, num_keys = _read_counts(window)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = window.string("a metadata key", MAX_NAME_BYTES)
            if key in metadata:
                window.fail(f"metadata key {key!r} appears twice")
            metadata[key] = _read_value(window, key)
        alignment = _alignment(file, metadata)
        entries = [_read_tensor(window) for _ in range(num_tensors)]
        data_start = -(-window.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for entry in entries:
            if entry.name in tensors:
                file.fail(f"tensor {entry.name!r} appears twice; the file is corrupt: fetch it again")
            tensors[entry.name] = _placed(file, entry, data_start, alignment, file_id)
        _check_no_overlap(file, tensors.values())
        return GgufHeader((path,), metadata, tensors)


def _read_counts(window: HeaderWindow) -> tuple[int, int]:
    """Check magic and version; return the counts of tensors and of metadata keys."""
    file = window.file
    magic = file.read_up_to(0, 4)
    if magic != MAGIC:
        file.fail(
            f"starts with {magic!r}, a GGUF starts with {MAGIC!r}; give a Hugging Face folder or a .gguf file"
        )
    window.seek(4)
    version = window.number(U32, "the version")
    if version not in (2, 3):
        if version & 0xFFFF == 0:
            file.fail(
                "is a big-endian GGUF, only little-endian ones are read; convert it with gguf_convert_endian"
            )
        file.fail(f"is GGUF version {version}; versions 2 and 3 are read: convert the model again")
    num_tensors = window.number(U64, "the tensor count")
    num_keys = window.number(U64, "the metadata count")
    # The least bytes of an entry: a key with a 1-byte value; a one-dimensional tensor.
    for what, count, entry_bytes, limit in (
        ("metadata keys", num_keys, 13, MAX_KEYS), ("tensors", num_tensors, 32, MAX_TENSORS),
    ):  # fmt: skip
        if count > min(limit, window.bytes_left // entry_bytes):
            window.fail(f"says it has {count} {what}; {window.bytes_left} bytes cannot hold them")
    return num_tensors, num_keys


def _read_value(window: HeaderWindow, key: str) -> Any:
    what = f"metadata key {key!r}"
    value_type = window.number(U32, what)
    if value_type == _STRING:
        return window.string(what, MAX_STRING_BYTES)
    if value_type == _ARRAY:
        return _read_array(window, key, what)
    if value_type not in _SCALARS:
        window.fail(f"{what} has the unknown value type {value_type}")
    value = window.number(_SCALARS[value_type], what)
    return bool(value) if value_type == _BOOL else value


def _read_array(window: HeaderWindow, key: str, what: str) -> GgufArray:
    """Skip over an array, remembering where it is."""
    element_type = window.number(U32, what)
    count = window.number(U64, what)
    if element_type != _STRING and element_type not in _SCALARS:
        window.fail(
            f"{what} is an array of value type {element_type}; arrays of numbers and strings are read"
        )
    element_bytes = 8 if element_type == _STRING else _SCALARS[element_type].size
    if count > min(MAX_ARRAY_COUNT, window.bytes_left // element_bytes):
        window.fail(f"{what} says it has {count} elements; {window.bytes_left} bytes cannot hold them")
    offset = window.position
    if element_type == _STRING:
        window.skip_strings(count, what)
    else:
        window.seek(offset + count * element_bytes)
    return GgufArray(window.file.path, key, element_type, count, offset, window.position - offset)


def _alignment(file: HeaderReader, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT_BYTES)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        file.fail(f"general.alignment must be a power of two up to 2^20, found {alignment!r:.80}")
    return alignment


def _read_tensor(window: HeaderWindow) -> GgufTensor:
    """Read one entry; its span's offset still counts from the start of the data section."""
    name = window.string("a tensor's name", MAX_NAME_BYTES)
    what = f"tensor {name!r}"
    num_dims = window.number(U32, what)
    if not 1 <= num_dims <= MAX_DIMS:
        window.fail(f"{what} has {num_dims} dimensions; 1 to {MAX_DIMS} are allowed")
    dims = [window.number(U64, what) for _ in range(num_dims)]
    type_id = window.number(U32, what)
    offset = window.number(U64, what)
    if type_id not in BLOCK_SIZES:
        kind = f"ggml type {type_id}" + (f" ({_OTHER_TYPES[type_id]})" if type_id in _OTHER_TYPES else "")
        window.file.fail(
            f"{what} is stored as {kind}, which is not supported; "
            f"supported are {', '.join(known.name for known in GgmlType)}: quantize the model again"
        )
    ggml_type = GgmlType(type_id)
    if 0 in dims or prod(dims) >= 1 << 60:
        window.fail(f"{what} has impossible dimensions {dims}")
    block = BLOCK_SIZES[ggml_type]
    if dims[0] % block.elements:
        window.fail(f"{what}: rows of {dims[0]} are not whole {ggml_type.name} blocks of {block.elements}")
    num_bytes = prod(dims) // block.elements * block.num_bytes
    return GgufTensor(name, ggml_type, tuple(reversed(dims)), Span(0, offset, num_bytes))


def _placed(
    file: HeaderReader, tensor: GgufTensor, data_start: int, alignment: int, file_id: int
) -> GgufTensor:
    """Check the tensor's place and make its offset count from the start of the file."""
    offset, num_bytes = tensor.span.offset, tensor.span.num_bytes
    if offset % alignment:
        file.fail(f"tensor {tensor.name!r}: offset {offset} is not a multiple of the alignment {alignment}")
    if data_start + offset + num_bytes > file.num_bytes:
        file.fail(
            f"tensor {tensor.name!r} ends at byte {data_start + offset + num_bytes}, but the file has "
            f"{file.num_bytes}; it is truncated or corrupt: fetch it again"
        )
    return replace(tensor, span=Span(file_id, data_start + offset, num_bytes))


def _check_no_overlap(file: HeaderReader, tensors: Iterable[GgufTensor]) -> None:
    end, owner = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.span.offset):
        if tensor.span.offset < end:
            file.fail(
                f"tensors {owner!r} and {tensor.name!r} overlap at byte {tensor.span.offset}; fetch it again"
            )
        end, owner = tensor.span.offset + tensor.span.num_bytes, tensor.name
