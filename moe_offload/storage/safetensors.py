"""The headers of a safetensors folder: which tensor lies where, checked before it is believed.

Owns the format's rules: an 8-byte little-endian header length, a JSON object
``{name: {dtype, shape, data_offsets}}``, then the data. Data offsets count from the end of the
header. Nothing but headers is read here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from moe_offload.errors import CheckpointError
from moe_offload.storage.expert_format import GgmlType, IntegerType, OwnType, Relayout, Span, WeightType
from moe_offload.storage.header_reader import HeaderReader, parse_json_object, read_json_object

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMS = 8
SHOWN_NAMES = 8  # in an error

# Bits of one element. F4, F6 and F8 kinds are listed so that they can be named in a refusal.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
TABLE_NAMES = ("tid2eid",)  # DeepSeek-V4's hash routing: from token ids to experts
TABLE_TYPES = {"I32": IntegerType.I32, "I64": IntegerType.I64}
WEIGHT_TYPES = {"F32": GgmlType.F32, "F16": GgmlType.F16, "BF16": GgmlType.BF16}
SCALED_TYPES: dict[str, WeightType] = {"MXFP4": GgmlType.MXFP4, "F8_E4M3": OwnType.F8_E4M3}


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of a quantized tensor, and how reading puts them among its codes."""

    relayout: Relayout
    span: Span


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """One header entry; ``span`` counts from the start of the file.

    A quantized one has the shape of its weights, and ``scales`` (scaled_tensors.py).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    span: Span
    scales: Scales | None = None


def weight_type(tensor: SafetensorsTensor) -> WeightType | None:
    """Return the type of its numbers; None for one that no kernel reads."""
    types = WEIGHT_TYPES if tensor.scales is None else SCALED_TYPES
    return types.get(tensor.dtype)


def table_type(tensor: SafetensorsTensor) -> IntegerType | None:
    """Return the integer type of a table that a router looks tokens up in; None for any other tensor."""
    is_table = tensor.name.rpartition(".")[2] in TABLE_NAMES
    return TABLE_TYPES.get(tensor.dtype) if is_table else None


@dataclass(frozen=True)
class SafetensorsFolder:
    """Every tensor of a folder's shards, by name."""

    files: tuple[Path, ...]
    tensors: dict[str, SafetensorsTensor]


def read_folder(folder: Path) -> SafetensorsFolder:
    """Read the headers of ``model.safetensors``, of an index's shards, or of any set of shards."""
    index_path = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return _read_shards([folder / "model.safetensors"])
    if index_path.exists():
        return _read_indexed(folder, index_path)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(
            f"{folder}: no model.safetensors, no model.safetensors.index.json and no *.safetensors; "
            "fetch the model's safetensors files (pickled .bin weights are not read) or give a .gguf file"
        )
    _check_numbering(paths)
    return _read_shards(paths)


def read_header(path: Path, file_id: int = 0) -> dict[str, SafetensorsTensor]:
    """Return the tensors of one file; spans name it ``file_id``.

    Raises:
        CheckpointError: the header is not as the format says, or promises bytes the file lacks.
    """
    with HeaderReader(path) as file:
        if file.num_bytes < 8:
            file.fail(f"{file.num_bytes} bytes are too few for a safetensors file; fetch it again")
        header_bytes = int.from_bytes(file.read(0, 8, "the header length"), "little")
        if header_bytes > min(MAX_HEADER_BYTES, file.num_bytes - 8):
            file.fail(
                f"the header length says {header_bytes} bytes, but the file has {file.num_bytes} and a "
                f"header at most {MAX_HEADER_BYTES}; this is not a whole safetensors file: fetch it again"
            )
        header = parse_json_object(file.read(8, header_bytes, "the header"), f"{path}: header")
        header.pop("__metadata__", None)
        data_start = 8 + header_bytes
        tensors = {
            name: _checked_tensor(file, name, entry, file_id, data_start) for name, entry in header.items()
        }
        _check_no_overlap(file, tensors.values())
        return tensors


def _checked_tensor(
    file: HeaderReader, name: str, entry: Any, file_id: int, data_start: int
) -> SafetensorsTensor:
    where = f"tensor {name!r}"
    if not isinstance(entry, dict):
        file.fail(f"{where}: an object with dtype, shape and data_offsets is wanted, found {entry!r:.80}")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        file.fail(f"{where}: unknown dtype {dtype!r:.80}; known are {', '.join(DTYPE_BITS)}")
    if not _is_counts(shape) or len(shape) > MAX_DIMS:
        file.fail(f"{where}: shape must be at most {MAX_DIMS} non-negative integers, found {shape!r:.80}")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        file.fail(f"{where}: data_offsets must be [begin, end], found {offsets!r:.80}")
    begin, end = offsets
    if data_start + end > file.num_bytes:
        file.fail(
            f"{where} ends at byte {data_start + end}, but the file has {file.num_bytes}; "
            "it is truncated or corrupt: fetch it again"
        )
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits != (end - begin) * 8:
        file.fail(
            f"{where}: {dtype} of shape {tuple(shape)} takes {bits / 8:.0f} bytes, "
            f"but data_offsets {offsets} hold {end - begin}; the header is corrupt: fetch the file again"
        )
    return SafetensorsTensor(name, dtype, tuple(shape), Span(file_id, data_start + begin, end - begin))


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_no_overlap(file: HeaderReader, tensors: Iterable[SafetensorsTensor]) -> None:
    end, owner = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.span.offset, tensor.span.num_bytes)):
        if tensor.span.num_bytes and tensor.span.offset < end:
            file.fail(
                f"tensor {tensor.name!r} begins at byte {tensor.span.offset}, inside {owner!r}, "
                f"which ends at {end}; the header is corrupt: fetch the file again"
            )
        end, owner = max(end, tensor.span.offset + tensor.span.num_bytes), tensor.name


def _read_shards(paths: list[Path]) -> SafetensorsFolder:
    tensors: dict[str, SafetensorsTensor] = {}
    for file_id, path in enumerate(paths):
        for name, tensor in read_header(path, file_id).items():
            if name in tensors:
                other = paths[tensors[name].span.file_id]
                raise CheckpointError(
                    f"{path}: tensor {name!r} is also in {other.name}; remove the file that does not "
                    "belong to this checkpoint"
                )
            tensors[name] = tensor
    return SafetensorsFolder(tuple(paths), tensors)


def _read_indexed(folder: Path, index_path: Path) -> SafetensorsFolder:
    weight_map = _weight_map(index_path)
    shard_names = sorted(set(weight_map.values()))
    missing = [name for name in shard_names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of the {len(shard_names)} shards that {index_path.name} names are "
            f"missing: {_some(missing)}; fetch them"
        )
    result = _read_shards([folder / name for name in shard_names])
    lost = []
    for name, shard in weight_map.items():
        tensor = result.tensors.get(name)
        if tensor is None or shard_names[tensor.span.file_id] != shard:
            lost.append(f"{name!r} in {shard}")
    if lost:
        raise CheckpointError(
            f"{index_path}: {len(lost)} tensors are not where the index says: {_some(lost)}; "
            "the index and the shards are from different checkpoints: fetch both again"
        )
    return result


def _weight_map(index_path: Path) -> dict[str, str]:
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: 'weight_map' must be an object of tensor name to shard file")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard or len(shard) > 255:
            raise CheckpointError(
                f"{index_path}: tensor {name!r}: a file name inside the folder is wanted, found {shard!r:.80}"
            )
    return weight_map


def _check_numbering(paths: list[Path]) -> None:
    """A set without an index is complete when its ``-00001-of-0000n`` numbers are."""
    for path in paths:
        head, separator, total = path.stem.rpartition("-of-")
        if separator and total.isdecimal() and len(total) <= 6:
            prefix, _, number = head.rpartition("-")
            names = [
                f"{prefix}-{index:0{len(number)}}-of-{total}{path.suffix}"
                for index in range(1, min(int(total), 10_000) + 1)
            ]
            missing = [name for name in names if not (path.parent / name).exists()]
            if missing:
                raise CheckpointError(f"{path.parent}: missing shards: {_some(missing)}; fetch them")


def _some(items: list[str]) -> str:
    rest = len(items) - SHOWN_NAMES
    return ", ".join(items[:SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")
