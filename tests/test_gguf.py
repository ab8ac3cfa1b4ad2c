"""The GGUF header reader: what is right is read, what is wrong is refused by name, nothing crashes."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import gguf_bytes, key, string, tensor
from hypothesis import given
from hypothesis import strategies as st

from moe_offload import CheckpointError
from moe_offload.storage.expert_format import GgmlType, Span
from moe_offload.storage.gguf_parts import read_gguf

F32, Q4_0 = 0, 2


def write(tmp_path: Path, content: bytes, name: str = "model.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def two_tensors(**options: Any) -> bytes:
    tensors = [tensor("a.weight", [8, 4], F32, 0), tensor("b.weight", [32, 3, 2], Q4_0, 128)]
    return gguf_bytes([key("general.architecture", "str", "llama")], tensors, bytes(128 + 108), **options)


def test_values_of_every_type_are_read(tmp_path: Path) -> None:
    keys = [
        key("u8", "u8", 200), key("i8", "i8", -3), key("u16", "u16", 60000), key("i16", "i16", -300),
        key("u32", "u32", 1 << 31), key("i32", "i32", -5), key("f32", "f32", 0.5), key("yes", "bool", True),
        key("u64", "u64", 1 << 63), key("i64", "i64", -(1 << 62)), key("f64", "f64", 1e300),
        key("text", "str", "zwölf"), key("texts", "[str]", ["a", "", "é"]),
        key("flags", "[bool]", [True, False]),
        key("numbers", "[i32]", [1, -2, 3]), key("none", "[str]", []),
    ]  # fmt: skip
    header = read_gguf(write(tmp_path, gguf_bytes(keys)))
    scalars = {name: found for name, found in header.metadata.items() if not hasattr(found, "values")}
    assert scalars == {
        "u8": 200, "i8": -3, "u16": 60000, "i16": -300, "u32": 1 << 31, "i32": -5, "f32": 0.5, "yes": True,
        "u64": 1 << 63, "i64": -(1 << 62), "f64": 1e300, "text": "zwölf",
    }  # fmt: skip
    assert header.array("texts", str) == ["a", "", "é"] and header.array("flags", bool) == [True, False]
    assert header.array("numbers", int) == [1, -2, 3] and header.array("none", str) == []
    assert header.array("absent", str) is None


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_are_placed_after_the_aligned_header(version: int, tmp_path: Path) -> None:
    content = two_tensors(version=version)
    header = read_gguf(write(tmp_path, content))
    start = len(content) - 236
    assert header.tensors["a.weight"].shape == (4, 8) and header.tensors["b.weight"].shape == (2, 3, 32)
    assert header.tensors["a.weight"].span == Span(0, start, 128)
    assert header.tensors["b.weight"].span == Span(0, start + 128, 108)
    assert header.tensors["b.weight"].ggml_type is GgmlType.Q4_0


def test_our_reader_agrees_with_gguf_py(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_token_list([f"tok{i}" for i in range(100)])
    writer.add_tensor("x", numpy.arange(24, dtype=numpy.float32).reshape(2, 3, 4))
    writer.add_tensor("y", numpy.ones((5, 32), numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = gguf.GGUFReader(tmp_path / "model.gguf")
    ours = read_gguf(tmp_path / "model.gguf")
    assert [
        (
            found.name,
            tuple(int(dim) for dim in reversed(found.shape)),
            int(found.data_offset),
            int(found.n_bytes),
        )
        for found in theirs.tensors
    ] == [
        (name, found.shape, found.span.offset, found.span.num_bytes) for name, found in ours.tensors.items()
    ]
    assert ours.array("tokenizer.ggml.tokens", str) == theirs.fields["tokenizer.ggml.tokens"].contents()


def bad_files() -> dict[str, tuple[bytes, str]]:
    """name → (content, what the error must say)"""
    huge, short = 1 << 60, gguf_bytes()[:11]
    arch = [key("general.architecture", "str", "llama")]

    def tensors(*entries: bytes, data: int = 4096, keys: list[bytes] = arch) -> bytes:
        return gguf_bytes(keys, entries, bytes(data))

    def array(inner: int, count: int) -> bytes:
        return string("k") + struct.pack("<IIQ", 9, inner, count)

    return {
        "empty": (b"", r"starts with b''"),
        "wrong magic": (gguf_bytes(magic=b"GGML"), r"starts with b'GGML', a GGUF starts with b'GGUF'"),
        "cut in the counts": (short, r"the tensor count takes 8 bytes"),
        "version 1": (gguf_bytes(version=1), r"GGUF version 1; versions 2 and 3"),
        "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"big-endian"),
        "2^60 keys": (gguf_bytes(num_keys=huge), rf"{huge} metadata keys"),
        "2^60 tensors": (gguf_bytes(num_tensors=huge), rf"{huge} tensors"),
        "more keys than bytes": (gguf_bytes(num_keys=2), r"2 metadata keys"),
        "cut in a key": (gguf_bytes([key("a" * 40, "u64", 1)])[:40], r"metadata keys?"),
        "key name of 2^60 bytes": (
            gguf_bytes([struct.pack("<Q", huge) + bytes(20)]),
            rf"a metadata key says it has {huge} bytes",
        ),
        "key not UTF-8": (gguf_bytes([key(b"\xff\xfe", "u32", 1)]), r"a metadata key is not UTF-8"),
        "key twice": (gguf_bytes([key("a", "u32", 1)] * 2), r"'a' appears twice"),
        "unknown value type": (
            gguf_bytes([string("k") + struct.pack("<I", 77) + bytes(8)]),
            r"'k' has the unknown value type 77",
        ),
        "string of 2^60 bytes": (
            gguf_bytes([string("k") + struct.pack("<IQ", 8, huge)]),
            rf"'k' says it has {huge} bytes",
        ),
        "string past the end": (
            gguf_bytes([string("k") + struct.pack("<IQ", 8, 5000)]),
            r"'k' takes 5000 bytes, but",
        ),
        "array of 2^60 numbers": (gguf_bytes([array(4, huge)]), rf"'k' says it has {huge} elements"),
        "array of 2^60 strings": (gguf_bytes([array(8, huge)]), rf"'k' says it has {huge} elements"),
        "array of arrays": (gguf_bytes([array(9, 1) + bytes(64)]), r"'k' is an array of value type 9"),
        "array of nothing known": (
            gguf_bytes([array(99, 1) + bytes(64)]),
            r"'k' is an array of value type 99",
        ),
        "array string past the end": (
            gguf_bytes([array(8, 2) + string("x") + struct.pack("<Q", huge)]),
            r"'k' reaches past the end",
        ),
        "alignment 0": (
            gguf_bytes([key("general.alignment", "u32", 0)]),
            r"power of two up to 2\^20, found 0",
        ),
        "alignment 24": (gguf_bytes([key("general.alignment", "u32", 24)]), r"general.alignment .* found 24"),
        "alignment text": (
            gguf_bytes([key("general.alignment", "str", "32")]),
            r"general.alignment .* found '32'",
        ),
        "no dimensions": (tensors(tensor("t", [], F32, 0), data=64), r"tensor 't' has 0 dimensions"),
        "5 dimensions": (tensors(tensor("t", [1] * 5, F32, 0)), r"tensor 't' has 5 dimensions"),
        "2^32-1 dimensions": (
            tensors(string("t") + struct.pack("<I", 0xFFFFFFFF) + bytes(64)),
            r"'t' has 4294967295 dimensions",
        ),
        "dimension 0": (tensors(tensor("t", [0, 4], F32, 0)), r"'t' has impossible dimensions"),
        "dimensions overflow": (
            tensors(tensor("t", [1 << 40, 1 << 40], F32, 0)),
            r"'t' has impossible dimensions",
        ),
        "row of half a block": (
            tensors(tensor("t", [48, 4], Q4_0, 0)),
            r"'t': rows of 48 are not whole Q4_0",
        ),
        "unknown type": (tensors(tensor("t", [32], 250, 0)), r"'t' is stored as ggml type 250, which is not"),
        "type without weights": (tensors(tensor("t", [32], 31, 0)), r"ggml type 31 \(Q4_0_4_4\)"),
        "tensor twice": (tensors(*[tensor("t", [8], F32, 0)] * 2), r"tensor 't' appears twice"),
        "offset not aligned": (tensors(tensor("t", [8], F32, 4)), r"'t': offset 4 is not a multiple"),
        "offset 2^60": (tensors(tensor("t", [8], F32, huge)), r"'t' ends at byte 1152921504606847"),
        "data cut off": (
            tensors(tensor("t", [1024], F32, 32)),
            r"'t' ends at byte \d+, but the file has \d+",
        ),
        "tensors overlap": (
            tensors(tensor("t", [64], F32, 0), tensor("u", [64], F32, 128)),
            r"'t' and 'u' overlap",
        ),
    }


@pytest.mark.parametrize("name", bad_files())
def test_a_bad_file_is_refused_with_file_place_and_remedy(name: str, tmp_path: Path) -> None:
    content, message = bad_files()[name]
    path = write(tmp_path, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


def test_a_string_that_is_not_utf8_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    raw = struct.pack("<IIQ", 9, 8, 1) + string(b"\xff")
    header = read_gguf(write(tmp_path, gguf_bytes([string("k") + raw])))
    with pytest.raises(CheckpointError, match=r"metadata key 'k': bad string"):
        header.array("k", str)


def test_an_array_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    header = read_gguf(write(tmp_path, gguf_bytes([key("k", "[i32]", [1]), key("n", "u32", 1)])))
    for name in ("k", "n"):
        with pytest.raises(CheckpointError, match=rf"metadata key '{name}' must be an array of str"):
            header.array(name, str)


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    content = two_tensors()
    for length in range(len(content)):
        with pytest.raises(CheckpointError):
            read_gguf(write(tmp_path, content[:length]))
    assert len(read_gguf(write(tmp_path, content)).tensors) == 2


def test_a_large_vocabulary_costs_about_what_its_bytes_cost(tmp_path: Path) -> None:
    """Walking over 150k strings is of the order of decoding them, not of some slow path per string."""
    tokens = [f"token{i}" for i in range(150_000)]
    path = write(tmp_path, gguf_bytes([key("tokenizer.ggml.tokens", "[str]", tokens)]))
    started = time.perf_counter()
    header = read_gguf(path)
    walked = time.perf_counter() - started
    started = time.perf_counter()
    assert header.array("tokenizer.ggml.tokens", str) == tokens
    assert walked < 10 * (time.perf_counter() - started)


def test_reading_headers_imports_nothing_heavy() -> None:
    code = (
        "import sys, moe_offload.storage.checkpoint;"
        "heavy = {'torch', 'transformers', 'gguf', 'numpy', 'tokenizers'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def split_part(number: int, count: int, name: str, **overrides: int) -> bytes:
    numbers = {"split.no": number, "split.count": count, "split.tensors.count": 2} | overrides
    keys = [key(name, "u16", item) for name, item in numbers.items()]
    return gguf_bytes(keys, [tensor(name, [8], F32, 0)], bytes(32))


@pytest.mark.parametrize("given_part", [1, 2])
def test_any_part_of_a_split_file_opens_all_of_them(given_part: int, tmp_path: Path) -> None:
    paths = [
        write(tmp_path, split_part(part, 2, name), f"m-{part + 1:05}-of-00002.gguf")
        for part, name in enumerate("ab")
    ]
    header = read_gguf(paths[given_part - 1])
    assert header.files == tuple(paths)
    assert [found.span.file_id for found in header.tensors.values()] == [0, 1]


@pytest.mark.parametrize("name", ["link", "m-00002-of-00002.gguf"])
def test_a_link_to_a_part_opens_the_parts_beside_what_it_links_to(name: str, tmp_path: Path) -> None:
    paths = [
        write(tmp_path, split_part(part, 2, tensor), f"m-{part + 1:05}-of-00002.gguf")
        for part, tensor in enumerate("ab")
    ]
    link = tmp_path / "elsewhere" / name
    link.parent.mkdir()
    link.symlink_to(paths[1])
    assert read_gguf(link).files == tuple(path.resolve() for path in paths)


@pytest.mark.parametrize(
    ("second", "name", "message"),
    [
        (None, "m-00001-of-00002.gguf", r"1 of 2 parts are missing: m-00002-of-00002.gguf; fetch"),
        (split_part(1, 2, "b"), "renamed.gguf", r"one of 2 parts, but its name does not end in"),
        (split_part(0, 2, "b"), "m-00001-of-00002.gguf", r"says that it is part 0 .* it is part 1 of 2"),
        (split_part(1, 2, "a"), "m-00001-of-00002.gguf", r"tensor 'a' is also in m-00001"),
        (split_part(1, 3, "b"), "m-00001-of-00002.gguf", r"of 3, by its name it is part 1 of 2"),
    ],
)
def test_a_split_file_that_is_not_whole_is_refused(
    second: bytes | None, name: str, message: str, tmp_path: Path
) -> None:
    first = write(tmp_path, split_part(0, 2, "a"), name)
    if second is not None:
        write(tmp_path, second, "m-00002-of-00002.gguf")
    with pytest.raises(CheckpointError, match=message):
        read_gguf(first)


def test_a_split_file_with_tensors_lost_is_refused(tmp_path: Path) -> None:
    changed = {"split.tensors.count": 9}
    for part, name in enumerate("ab"):
        write(tmp_path, split_part(part, 2, name, **changed), f"m-{part + 1:05}-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"hold 2 tensors, split.tensors.count says 9"):
        read_gguf(tmp_path / "m-00001-of-00002.gguf")


VALID = gguf_bytes(
    [
        key("general.architecture", "str", "llama"),
        key("llama.block_count", "u32", 2),
        key("tokenizer.ggml.tokens", "[str]", ["a", "b", "cc"]),
        key("tokenizer.ggml.scores", "[f32]", [0.0, 1.0]),
    ],
    [tensor("a.weight", [8, 4], F32, 0), tensor("b.weight", [32, 2], Q4_0, 128)],
    bytes(128 + 36),
)
EDITS = st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=8)), max_size=4)


def read_or_refuse(path: Path) -> None:
    """Anything but a header or a CheckpointError is a bug."""
    try:
        header = read_gguf(path)
        for name, found in header.metadata.items():
            if hasattr(found, "values"):
                header.array(name, str)
    except CheckpointError as error:
        assert str(path) in str(error)


@given(edits=EDITS, length=st.integers(0, len(VALID)) | st.just(len(VALID)))
def test_a_damaged_file_is_read_or_refused(
    edits: list[tuple[int, bytes]], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(VALID)
    for position, replacement in edits:
        content[position : position + len(replacement)] = replacement
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content[:length])
    read_or_refuse(path)


@given(content=st.binary(max_size=400))
def test_random_bytes_after_the_magic_are_read_or_refused(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + content)
    read_or_refuse(path)
