"""GGUF files of one part or many: the parts of a split file are found beside each other and joined."""

from __future__ import annotations

import re
from pathlib import Path

from moe_offload.errors import CheckpointError
from moe_offload.storage.gguf import GgufHeader, GgufTensor, read_part

SPLIT_NAME = re.compile(r"(?P<prefix>.*)-(?P<part>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


def read_gguf(path: Path) -> GgufHeader:
    """Read the header at ``path``; given one part of a split file, read all of its parts.

    Raises:
        CheckpointError: the header is not as the format says, promises bytes the file lacks, or a
            part is missing.
    """
    header = read_part(path)
    count = _split_number(header, "split.count")
    if count is None or count == 1:
        return header
    if path.is_symlink() and not _has_parts(path):
        path = path.resolve()  # a link to one part: the others lie beside what it links to
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{path}: is one of {count} parts, but its name does not end in -0000k-of-{count:05}.gguf; "
            "give the parts their original names"
        )
    paths = [path.with_name(f"{match['prefix']}-{part + 1:05}-of-{count:05}.gguf") for part in range(count)]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        shown = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
        raise CheckpointError(f"{path}: {len(missing)} of {count} parts are missing: {shown}; fetch them")
    return _join_parts([read_part(part, file_id) for file_id, part in enumerate(paths)])


def _has_parts(path: Path) -> bool:
    match = SPLIT_NAME.fullmatch(path.name)
    return match is not None and all(
        path.with_name(f"{match['prefix']}-{part + 1:05}-of-{match['count']}.gguf").exists()
        for part in range(int(match["count"]))
    )


def _split_number(header: GgufHeader, key: str) -> int | None:
    value = header.metadata.get(key)
    if value is not None and (type(value) is not int or not 0 <= value <= 99_999):
        raise CheckpointError(
            f"{header.path}: metadata key {key!r} must be a part number, found {value!r:.80}"
        )
    return value


def _join_parts(parts: list[GgufHeader]) -> GgufHeader:
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        found = _split_number(part, "split.no"), _split_number(part, "split.count")
        if found != (number, len(parts)):
            raise CheckpointError(
                f"{part.path}: says that it is part {found[0]} (from 0) of {found[1]}, by its name it is "
                f"part {number} of {len(parts)}; give the parts their original names"
            )
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{part.path}: tensor {name!r} is also in {parts[tensors[name].span.file_id].path.name}"
                )
            tensors[name] = tensor
    wanted = parts[0].metadata.get("split.tensors.count")
    if type(wanted) is int and wanted != len(tensors):
        raise CheckpointError(
            f"{parts[0].path}: its parts hold {len(tensors)} tensors, split.tensors.count says {wanted}; "
            "the parts are of different files: fetch them again"
        )
    return GgufHeader(tuple(part.path for part in parts), parts[0].metadata, tensors)
