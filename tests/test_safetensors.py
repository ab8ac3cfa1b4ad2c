"""The safetensors header reader: what is right is read, what is wrong is refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_offload import CheckpointError
from moe_offload.storage.expert_format import Span
from moe_offload.storage.safetensors import read_folder, read_header


def content(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(folder: Path, raw: bytes, name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(raw)
    return folder / name


def test_our_reader_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(2, 2, 2).bfloat16(),
        "c": torch.ones(7).half(),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
    }
    path = tmp_path / "model.safetensors"
    library.save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    raw = path.read_bytes()
    for name, tensor in tensors.items():
        span = found[name].span
        data = bytearray(raw[span.offset : span.offset + span.num_bytes])
        again = torch.frombuffer(data, dtype=tensor.dtype) if data else tensor.flatten()
        assert torch.equal(again.reshape(tensor.shape), tensor)


def test_offsets_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    raw = content({"b": entry("F16", [2], 8, 12), "a": entry("F32", [2, 1], 0, 8)}, bytes(12))
    found = read_header(write(tmp_path, raw), file_id=3)
    assert found["a"].span == Span(3, len(raw) - 12, 8) and found["b"].span == Span(3, len(raw) - 4, 4)


ONE = {"t": entry("F32", [2], 0, 8)}
HUGE = 1 << 60
BAD_FILES = {
    "empty": (b"", r"0 bytes are too few"),
    "cut length": (b"\1\2\3", r"3 bytes are too few"),
    "length 2^60": (content(ONE, bytes(8), length=HUGE), rf"the header length says {HUGE} bytes"),
    "length beyond the file": (
        content(ONE, length=5000),
        r"the header length says 5000 bytes, but the file has",
    ),
    "not JSON": (content(b"{nonsense"), r"header: not valid JSON"),
    "not UTF-8": (content(b"\xff\xfe{}"), r"header: not valid JSON"),
    "a list": (content([]), r"a JSON object is wanted, found list"),
    "nested beyond sense": (content(b"[" * 200_000), r"header: not valid JSON"),
    "an integer of 5000 digits": (content(b'{"t": ' + b"9" * 5000 + b"}"), r"not valid JSON"),
    "name twice": (content(b'{"t": 1, "t": 2}'), r"key 't' appears twice"),
    "entry is no object": (content({"t": [1]}), r"tensor 't': an object .* found \[1\]"),
    "entry is empty": (content({"t": {}}), r"tensor 't': unknown dtype None"),
    "unknown dtype": (content({"t": entry("Q9", [2], 0, 8)}, bytes(8)), r"tensor 't': unknown dtype 'Q9'"),
    "dtype is no text": (
        content({"t": entry(["F32"], [2], 0, 8)}, bytes(8)),
        r"'t': unknown dtype \['F32'\]",
    ),  # type: ignore[arg-type]
    "negative shape": (content({"t": entry("F32", [-2], 0, 8)}, bytes(8)), r"'t': shape .* found \[-2\]"),
    "shape of floats": (content({"t": entry("F32", [2.0], 0, 8)}, bytes(8)), r"'t': shape .* found \[2.0\]"),  # type: ignore[list-item]
    "shape of truths": (content({"t": entry("F32", [True, True], 0, 4)}, bytes(8)), r"'t': shape"),
    "shape 2^60": (content({"t": entry("F32", [HUGE], 0, 8)}, bytes(8)), rf"F32 of shape \({HUGE},\) takes"),
    "shape overflows": (content({"t": entry("F32", [HUGE] * 8, 0, 8)}, bytes(8)), r"'t': F32 of shape"),
    "9 dimensions": (content({"t": entry("F32", [1] * 9, 0, 4)}, bytes(8)), r"'t': shape must be at most 8"),
    "one offset": (
        content({"t": {**ONE["t"], "data_offsets": [0]}}, bytes(8)),
        r"data_offsets must be \[begin",
    ),
    "negative offset": (content({"t": entry("F32", [2], -8, 0)}, bytes(8)), r"data_offsets must be"),
    "end before begin": (content({"t": entry("F32", [2], 8, 0)}, bytes(8)), r"data_offsets must be"),
    "offset 2^60": (
        content({"t": entry("F32", [2], HUGE, HUGE + 8)}, bytes(8)),
        r"'t' ends at byte 1152921504",
    ),
    "offset 2^64": (content({"t": entry("F32", [2], 1 << 64, 1 << 65)}, bytes(8)), r"data_offsets must be"),
    "data cut off": (content(ONE, bytes(7)), r"tensor 't' ends at byte \d+, but the file has"),
    "bytes do not fit": (content({"t": entry("F32", [3], 0, 8)}, bytes(8)), r"takes 12 bytes, but .* hold 8"),
    "overlap": (
        content({"t": entry("F32", [2], 0, 8), "u": entry("F32", [1], 4, 8)}, bytes(8)),
        r"tensor 'u' begins at byte \d+, inside 't'",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_file_place_and_remedy(name: str, tmp_path: Path) -> None:
    raw, message = BAD_FILES[name]
    path = write(tmp_path, raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    raw = content({"t": entry("F32", [2], 0, 8), "u": entry("BF16", [4], 8, 16)}, bytes(16))
    for length in range(len(raw)):
        with pytest.raises(CheckpointError):
            read_header(write(tmp_path, raw[:length]))
    assert len(read_header(write(tmp_path, raw))) == 2


def shard(*names: str) -> bytes:
    return content(
        {name: entry("F32", [1], 4 * i, 4 * i + 4) for i, name in enumerate(names)}, bytes(4 * len(names))
    )


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_found_through_the_index_or_by_their_names(tmp_path: Path) -> None:
    write(tmp_path, shard("a"), "x-00001-of-00002.safetensors")
    write(tmp_path, shard("b", "c"), "x-00002-of-00002.safetensors")
    without_index = read_folder(tmp_path)
    write_index(tmp_path, {name: f"x-0000{1 + (name != 'a')}-of-00002.safetensors" for name in "abc"})
    with_index = read_folder(tmp_path)
    assert with_index == without_index
    assert [with_index.tensors[name].span.file_id for name in "abc"] == [0, 1, 1]
    assert [path.name[2:7] for path in with_index.files] == ["00001", "00002"]


@pytest.mark.parametrize(
    ("shards", "weight_map", "message"),
    [
        ({}, None, r"no model.safetensors, .*fetch the model's safetensors"),
        (
            {"p.safetensors": ("a",)},
            {"a": "p.safetensors", "b": "q.safetensors"},
            r"1 of the 2 shards .*q.safet",
        ),
        (
            {"p.safetensors": ("a",)},
            {"a": "p.safetensors", "b": "p.safetensors"},
            r"1 tensors are not .*'b' in p",
        ),
        (
            {"p.safetensors": ("a",), "q.safetensors": ("a", "b")},
            {"a": "p.safetensors", "b": "q.safetensors"},
            r"q.safetensors: tensor 'a' is also in p.safetensors",
        ),
        ({"p.safetensors": ("a",), "q.safetensors": ("a",)}, None, r"tensor 'a' is also in p.safetensors"),
        (
            {"x-00001-of-00003.safetensors": ("a",)},
            None,
            r"missing shards: x-00002-of-00003.safetensors, x-00003",
        ),
        (
            {"p.safetensors": ("a",)},
            {"a": "../p.safetensors"},
            r"'a': a file name inside the folder is wanted",
        ),
        ({"p.safetensors": ("a",)}, {"a": 7}, r"'a': a file name inside the folder is wanted, found 7"),
        ({"p.safetensors": ("a",)}, [1], r"'weight_map' must be an object"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    shards: dict[str, tuple[str, ...]], weight_map: Any, message: str, tmp_path: Path
) -> None:
    for name, tensors in shards.items():
        write(tmp_path, shard(*tensors), name)
    if weight_map is not None:
        write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        read_folder(tmp_path)


VALID = content(
    {"__metadata__": {"format": "pt"}, "a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32)},
    bytes(32),
)
EDITS = st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=8)), max_size=4)


def read_or_refuse(path: Path) -> None:
    """Anything but a header or a CheckpointError is a bug."""
    try:
        for tensor in read_header(path).values():
            assert tensor.span.offset + tensor.span.num_bytes <= path.stat().st_size
    except CheckpointError as error:
        assert str(path) in str(error)


@given(edits=EDITS, length=st.integers(0, len(VALID)) | st.just(len(VALID)))
def test_a_damaged_file_is_read_or_refused(
    edits: list[tuple[int, bytes]], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(VALID)
    for position, replacement in edits:
        damaged[position : position + len(replacement)] = replacement
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(damaged[:length])
    read_or_refuse(path)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "I8"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "t", "__metadata__"]), inner, max_size=4
        )
    ),
)


@given(header=st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=4))
def test_any_json_header_is_read_or_refused(
    header: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(content(header, bytes(64)))
    read_or_refuse(path)
