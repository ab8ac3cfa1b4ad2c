"""Writing and reading the GGUF that holds a checkpoint's quantized matrices.

Its architecture is our own, so that other programs refuse it by name: it has no norms, no routers
and no tokenizer, which stay in the folder. Matrices are read slice by slice, quantized by a few
threads and written in order; a handful of slices is all that is in memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from moe_offload.errors import CheckpointError
from moe_offload.storage.expert_format import ExpertIndex, Span, row_bytes
from moe_offload.storage.expert_store import ExpertStore
from moe_offload.storage.gguf import GgufHeader
from moe_offload.storage.gguf_parts import read_gguf
from moe_offload.storage.io import open_reader
from moe_offload.storage.quantize_plan import QuantPlan, QuantTensor, SourceMatrix
from moe_offload.storage.quantize_rules import float_values, quantize_rows

ARCHITECTURE = "moe-offload-quantized"
IDENTITY_KEY, QUANT_KEY, FOLDER_KEY = (f"{ARCHITECTURE}.{name}" for name in ("identity", "quant", "folder"))
ALIGNMENT_BYTES = 32
SLICE_ELEMENTS = 1 << 20
FLUSH_BYTES = 256 << 20  # written pages are flushed and dropped, so that they crowd nothing out
MAX_THREADS = 8

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)
Blocks = npt.NDArray[np.uint8]


def workspace_bytes(plan: QuantPlan, num_threads: int) -> int:
    """Return what quantizing holds at most: slices under way, and whole matrices that are transposed."""
    slice_bytes = 12 * SLICE_ELEMENTS  # source, float32, checks, blocks
    transposed_bytes = max(
        (
            source.span.num_bytes
            for tensor in plan.tensors
            for source in tensor.sources
            if source.form.transposed
        ),
        default=0,
    )
    return num_threads * (2 * slice_bytes + 3 * transposed_bytes)  # itself, its blocks, two that wait


def write_quantized(
    path: Path, plan: QuantPlan, identity: str, progress: Progress | None, num_threads: int
) -> None:
    """Write the file, flushed to the disk before this returns.

    Raises:
        CheckpointError: a matrix cannot be read, or holds NaN or infinity.
        OSError: the disk is full, or may not be written.
    """
    _write_header(path, plan, identity)
    reader = open_reader()
    try:
        store = ExpertStore(ExpertIndex(), plan.source.files, reader)
        with open(path, "ab") as file:
            out = _Output(file, plan.num_bytes, progress)
            _pad(file)
            for blocks in _in_order(_slices(plan, store), num_threads):
                out.write(blocks)
            file.flush()
            os.fsync(file.fileno())
    finally:
        reader.close()


def read_spans(path: Path, plan: QuantPlan, identity: str) -> dict[str, Span]:
    """Return where the file at ``path`` holds the plan's tensors.

    Raises:
        CheckpointError: it is damaged, or holds something else than the plan wants.
    """
    header = read_gguf(path)
    if header.metadata.get(IDENTITY_KEY) != identity:
        raise CheckpointError(f"{path}: was made from another checkpoint, or by another version")
    wanted = {tensor.name: (tensor.ggml_type, tensor.shape) for tensor in plan.tensors}
    if {name: (tensor.ggml_type, tensor.shape) for name, tensor in header.tensors.items()} != wanted:
        raise CheckpointError(f"{path}: holds other tensors than the checkpoint asks for")
    file_id = len(plan.source.files)
    return {name: Span(file_id, *_place(header, name)) for name in wanted}


def _place(header: GgufHeader, name: str) -> tuple[int, int]:
    span = header.tensors[name].span
    return span.offset, span.num_bytes


def _write_header(path: Path, plan: QuantPlan, identity: str) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string(IDENTITY_KEY, identity)
    writer.add_string(QUANT_KEY, plan.quant)
    writer.add_string(FOLDER_KEY, os.fsencode(plan.source.path).decode("utf-8", "replace"))
    for tensor in plan.tensors:
        kind = GGMLQuantizationType(int(tensor.ggml_type))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float16), tensor.num_bytes, kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


class _Output:
    """The file's data section: tensors in order, each padded to the alignment."""

    def __init__(self, file: BinaryIO, total_bytes: int, progress: Progress | None) -> None:
        self.file, self.total_bytes, self.progress = file, total_bytes, progress
        self.done_bytes = self.unflushed_bytes = 0

    def write(self, blocks: Blocks | None) -> None:
        """Append blocks; None ends a tensor."""
        if blocks is None:
            _pad(self.file)
            return
        self.file.write(blocks.data)
        self.done_bytes += blocks.nbytes
        self.unflushed_bytes += blocks.nbytes
        if self.unflushed_bytes >= FLUSH_BYTES:
            self.file.flush()
            os.fdatasync(self.file.fileno())
            os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self.unflushed_bytes = 0
        if self.progress is not None:
            self.progress(self.done_bytes, self.total_bytes)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT_BYTES))


Job = Callable[[], Blocks] | None


def _slices(plan: QuantPlan, store: ExpertStore) -> Iterator[Job]:
    """Yield what has to be quantized, in the file's order; None after each tensor."""
    for tensor in plan.tensors:
        for source in tensor.sources:
            piece = _Piece(plan.source.files[source.span.file_id], tensor, source, store)
            if source.form.transposed:
                yield piece.transposed_matrix
                continue
            for row in range(0, source.form.rows, piece.step):
                yield partial(piece.rows, row, min(piece.step, source.form.rows - row))
        yield None


class _Piece:
    """One matrix on its way from the checkpoint to blocks; its methods run in the pool."""

    def __init__(self, path: Path, tensor: QuantTensor, source: SourceMatrix, store: ExpertStore) -> None:
        self.path, self.tensor, self.source, self.store = path, tensor, source, store
        self.step = max(1, SLICE_ELEMENTS // source.form.cols)

    def rows(self, row: int, count: int) -> Blocks:
        """Return the blocks of ``count`` rows from ``row`` on."""
        whole, form = self.source.span, self.source.form
        width = whole.num_bytes // form.rows
        raw = self.store.read_bytes(Span(whole.file_id, whole.offset + row * width, count * width))
        return self.quantized(float_values(raw, form.ggml_type))

    def transposed_matrix(self) -> Blocks:
        """Return the blocks of all rows of a matrix that is stored (cols, rows)."""
        form = self.source.form
        stored = self.store.read_bytes(self.source.span).reshape(form.cols, form.rows, -1)  # last: one number
        out = np.empty((form.rows, row_bytes(self.tensor.ggml_type, form.cols)), dtype=np.uint8)
        for row in range(0, form.rows, self.step):
            raw = np.ascontiguousarray(stored[:, row : row + self.step].transpose(1, 0, 2))
            out[row : row + self.step] = self.quantized(float_values(raw.reshape(-1), form.ggml_type))
        return out

    def quantized(self, values: npt.NDArray[np.float32]) -> Blocks:
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.path}: {self.tensor.name!r} has NaN or infinity among its weights, which no block "
                "format can hold; use the checkpoint without quant, or fetch it again"
            )
        return quantize_rows(values.reshape(-1, self.source.form.cols), self.tensor.ggml_type)


def _in_order(jobs: Iterator[Job], num_threads: int) -> Iterator[Blocks | None]:
    """Run the jobs in ``num_threads`` threads, a few ahead, and yield their results in order."""
    waiting: deque[Future[Blocks] | None] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="quantize") as pool:
        try:
            for job in jobs:
                waiting.append(None if job is None else pool.submit(job))
                while len(waiting) > 2 * num_threads:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        finally:
            for future in waiting:
                if future is not None:
                    future.cancel()


def _result(future: Future[Blocks] | None) -> Blocks | None:
    return None if future is None else future.result()
