"""Read dense tensors into owned memory: packed rows or floats, recipes applied on the way.

Nothing is mapped, and a large float tensor is converted piece by piece, so that no second copy of it
exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from moe_offload import ops
from moe_offload.storage.dense_tensor import Recipe, TensorInfo
from moe_offload.storage.expert_format import (
    FLOAT_TYPES,
    FP8_BLOCK,
    GgmlType,
    IntegerType,
    Relayout,
    Span,
    WeightType,
    row_bytes,
)
from moe_offload.storage.expert_store import ExpertStore
from moe_offload.storage.io import put_together

CONVERT_ELEMENTS = 4 << 20
TORCH_DTYPES: dict[WeightType, torch.dtype] = {
    GgmlType.F32: torch.float32,
    GgmlType.F16: torch.float16,
    GgmlType.BF16: torch.bfloat16,
    IntegerType.I32: torch.int32,
    IntegerType.I64: torch.int64,
}


def read_packed(info: TensorInfo, store: ExpertStore) -> Tensor:
    """Return the blocks of a matrix as (rows, row bytes) of uint8."""
    rows, cols = info.shape[0], prod(info.shape[1:])
    if info.scales is not None:
        return _read_scaled(info, store)
    if info.recipe is None:
        tensor = torch.empty(rows, row_bytes(info.ggml_type, cols), dtype=torch.uint8)
        store.read_into(info.span, tensor.data_ptr())
        return tensor
    if any(part.ggml_type is not info.ggml_type for part in info.recipe.parts):
        return read_float(info, store, TORCH_DTYPES[info.ggml_type]).view(rows, cols).view(torch.uint8)
    return _apply(info.recipe, [read_packed(part, store) for part in info.recipe.parts])


def read_float(info: TensorInfo, store: ExpertStore, dtype: torch.dtype) -> Tensor:
    """Return a tensor in ``dtype``; quantized ones are dequantized, integers stay what they are."""
    if info.recipe is not None:
        parts = [read_float(part, store, torch.float32) for part in info.recipe.parts]
        return _apply(info.recipe, parts).reshape(info.shape).to(dtype).contiguous()
    if isinstance(info.ggml_type, IntegerType):
        return _read_converted(info, store, TORCH_DTYPES[info.ggml_type])
    if info.ggml_type in FLOAT_TYPES:
        return _read_converted(info, store, dtype)
    cols = info.shape[-1]
    rows = info.num_elements // cols
    packed = torch.empty(info.span.num_bytes, dtype=torch.uint8)
    store.read_into(info.span, packed.data_ptr())
    tensor = ops.embedding_rows(torch.arange(rows), packed, info.ggml_type, rows, cols)
    return tensor.view(info.shape).to(dtype)


def _read_scaled(info: TensorInfo, store: ExpertStore) -> Tensor:
    """Put FP8 codes and their scales together in blocks, some rows of blocks at a time."""
    assert info.scales is not None
    rows, cols = info.shape
    relayout = info.scales.relayout
    packed = torch.empty(rows, row_bytes(info.ggml_type, cols), dtype=torch.uint8)
    scale_row_bytes = cols // FP8_BLOCK * (4 if relayout is Relayout.FP8_F32 else 2)
    band_rows = max(1, CONVERT_ELEMENTS // (cols * FP8_BLOCK)) * FP8_BLOCK
    codes = torch.empty(min(rows, band_rows) * cols, dtype=torch.uint8)
    scales = torch.empty(band_rows // FP8_BLOCK * scale_row_bytes, dtype=torch.uint8)
    for first in range(0, rows, band_rows):
        count = min(band_rows, rows - first)
        first_scale, scale_rows = first // FP8_BLOCK, -(-count // FP8_BLOCK)
        store.read_into(_part(info.span, first * cols, count * cols), codes.data_ptr())
        scale_part = _part(info.scales.span, first_scale * scale_row_bytes, scale_rows * scale_row_bytes)
        store.read_into(scale_part, scales.data_ptr())
        put_together(relayout, scales.data_ptr(), codes.data_ptr(), packed[first].data_ptr(), count, cols)
    return packed


def _part(span: Span, offset: int, num_bytes: int) -> Span:
    return Span(span.file_id, span.offset + offset, num_bytes)


def _read_converted(info: TensorInfo, store: ExpertStore, dtype: torch.dtype) -> Tensor:
    """Read piece by piece into the final dtype, so that no second copy of a large tensor exists."""
    source_dtype = TORCH_DTYPES[info.ggml_type]
    tensor = torch.empty(info.shape, dtype=dtype)
    if source_dtype == dtype:
        store.read_into(info.span, tensor.data_ptr())
        return tensor
    flat = tensor.view(-1)
    buffer = torch.empty(min(flat.numel(), CONVERT_ELEMENTS), dtype=source_dtype)
    for start in range(0, flat.numel(), CONVERT_ELEMENTS):
        piece = buffer[: min(CONVERT_ELEMENTS, flat.numel() - start)]
        offset = info.span.offset + start * source_dtype.itemsize
        store.read_into(Span(info.span.file_id, offset, piece.nbytes), piece.data_ptr())
        flat[start : start + piece.numel()] = piece
    return tensor


def _apply(recipe: Recipe, parts: list[Tensor]) -> Tensor:
    return OPERATIONS[recipe.operation](parts, *recipe.sizes).contiguous()


def _unpermute(parts: Sequence[Tensor], num_heads: int) -> Tensor:
    """Undo llama.cpp's interleaving of each head's rotary halves (llama, granitemoe: Q and K).

    The file holds row pairs (i, i + head_dim/2) side by side.
    """
    (rows,) = parts
    head_dim = rows.shape[0] // num_heads
    halves = rows.view(num_heads, head_dim // 2, 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _as_is(parts: Sequence[Tensor]) -> Tensor:
    """Only the shape differs: a dimension of one was dropped."""
    return parts[0]


def _concat_rows(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def _concat_columns(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=-1)


def _join_kv_b(parts: Sequence[Tensor]) -> Tensor:
    """(heads, rank, nope) and (heads, value, rank) -> (heads * (nope + value), rank): MLA's two halves."""
    key, value = parts
    return torch.cat([key.transpose(1, 2), value], dim=1).flatten(0, 1)


def _minus_one(parts: Sequence[Tensor]) -> Tensor:
    """Norms that multiply by 1 + weight are stored with the 1 added."""
    return parts[0] - 1.0


def _log_negated(parts: Sequence[Tensor]) -> Tensor:
    """``-exp(A_log)`` -> ``A_log``."""
    return torch.log(-parts[0])


def _log_negated_heads(parts: Sequence[Tensor], per_key: int, num_keys: int) -> Tensor:
    return _group_value_heads([_log_negated(parts)], 0, per_key, num_keys)


def _group_value_heads(parts: Sequence[Tensor], offset: int, per_key: int, num_keys: int) -> Tensor:
    """Rows of value heads, tiled over the key heads, put beside their key head; those before stay."""
    head, tail = parts[0][:offset], parts[0][offset:]
    tiled = tail.reshape(per_key, num_keys, -1, *tail.shape[1:])
    return torch.cat([head, tiled.transpose(0, 1).reshape(tail.shape)])


def _group_value_columns(parts: Sequence[Tensor], per_key: int, num_keys: int) -> Tensor:
    """The same for the columns that take what value heads give."""
    (weight,) = parts
    tiled = weight.reshape(weight.shape[0], per_key, num_keys, -1)
    return tiled.transpose(1, 2).reshape(weight.shape)


def _join_qkvz(parts: Sequence[Tensor], num_keys: int, key_dim: int) -> Tensor:
    """(q, k, v) and z -> for each key head: its rows of q, k, v and z."""
    qkv, z = parts
    keys = num_keys * key_dim
    stacks = [qkv[:keys], qkv[keys : 2 * keys], qkv[2 * keys :], z]
    return torch.cat([rows.reshape(num_keys, -1, rows.shape[1]) for rows in stacks], dim=1).flatten(0, 1)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "unpermute": _unpermute,
    "as_is": _as_is,
    "concat_rows": _concat_rows,
    "concat_columns": _concat_columns,
    "join_kv_b": _join_kv_b,
    "minus_one": _minus_one,
    "log_negated": _log_negated,
    "log_negated_heads": _log_negated_heads,
    "group_value_heads": _group_value_heads,
    "group_value_columns": _group_value_columns,
    "join_qkvz": _join_qkvz,
}
