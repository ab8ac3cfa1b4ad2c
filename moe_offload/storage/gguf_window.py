"""A cursor over a file's header that keeps one small piece of it in memory."""

from __future__ import annotations

import struct
from typing import Any, NoReturn

from moe_offload.storage.header_reader import HeaderReader

MAX_HEADER_BYTES = 256 << 20  # the largest vocabularies in use take about 20 MiB
WINDOW_BYTES = 1 << 20
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


class HeaderWindow:
    """Reads numbers and strings one after the other; every failure is a CheckpointError."""

    def __init__(self, file: HeaderReader) -> None:
        self.file = file
        self.data, self.base, self.cursor = b"", 0, 0  # data[cursor] is byte base + cursor of the file

    @property
    def position(self) -> int:
        return self.base + self.cursor

    @property
    def bytes_left(self) -> int:
        return self.file.num_bytes - self.position

    def fail(self, message: str) -> NoReturn:
        self.file.fail(f"{message} (byte {self.position}); the file is corrupt or truncated: fetch it again")

    def need(self, num_bytes: int, what: str) -> None:
        """Make ``num_bytes`` bytes available at the cursor."""
        if self.cursor + num_bytes <= len(self.data):
            return
        if num_bytes > self.bytes_left:
            self.fail(f"{what} takes {num_bytes} bytes, but {self.bytes_left} are left of the file")
        self.seek(self.position)
        self.data = self.file.read_up_to(self.base, max(num_bytes, WINDOW_BYTES))
        if len(self.data) < num_bytes:
            self.fail(f"{what}: the file was shortened while it was read")

    def seek(self, position: int) -> None:
        if position > MAX_HEADER_BYTES:
            self.fail(f"the header goes beyond {MAX_HEADER_BYTES} bytes")
        self.base, self.cursor, self.data = position, 0, b""

    def number(self, form: struct.Struct, what: str) -> Any:
        self.need(form.size, what)
        (value,) = form.unpack_from(self.data, self.cursor)
        self.cursor += form.size
        return value

    def string(self, what: str, limit: int) -> str:
        length = self.number(U64, what)
        if length > limit:
            self.fail(f"{what} says it has {length} bytes; at most {limit} are allowed")
        self.need(length, what)
        raw = self.data[self.cursor : self.cursor + length]
        self.cursor += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error}")

    def skip_strings(self, count: int, what: str) -> None:
        """Walk over ``count`` strings: 150k of them take some 50 ms."""
        unpack = U64.unpack_from
        while count:
            self.need(8, what)
            data, cursor, last = self.data, self.cursor, len(self.data) - 8
            while count and cursor <= last:
                cursor += 8 + unpack(data, cursor)[0]
                count -= 1
            self.cursor = cursor
            if cursor > len(data):  # the last string reaches past the window
                if self.position > self.file.num_bytes:
                    self.fail(f"{what} reaches past the end of the file")
                self.seek(self.position)
