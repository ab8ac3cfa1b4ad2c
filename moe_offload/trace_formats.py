"""The files that hold a routing trace: from each format to the fields of trace.make_trace."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_offload.errors import CheckpointError
from moe_offload.npz import open_npz

Row = tuple[int, int, Sequence[int], Sequence[float] | None]  # token, layer, ids, weights


def _read_npz(path: Path) -> dict[str, Any]:
    with open_npz(path) as file:
        fields: dict[str, Any] = {name: file[name] for name in _NPZ_ARRAYS if name in file}
        if "weights" not in fields and "probs" in file:
            fields["weights"] = file["probs"]
        if "num_experts" in file:
            fields["num_experts"] = int(file["num_experts"])
        if "model" in file:
            fields["model"] = str(file["model"])
        if "metadata" in file:
            fields["metadata"] = dict(json.loads(str(file["metadata"])))
    expect("experts" in fields, "it has no array 'experts'")
    return fields


_NPZ_ARRAYS = (
    "experts", "weights", "seq_len", "step_tokens", "phase", "layers", "router_logits", "router_inputs",
)  # fmt: skip


def _read_npy(path: Path) -> dict[str, Any]:
    return {"experts": np.load(path, allow_pickle=False)}


def _read_csv(path: Path) -> dict[str, Any]:
    """Read a table by its header; without one by its width."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row and not row[0].lstrip().startswith("#")]
    names = [cell.strip().lower() for cell in rows[0]] if rows and not _is_number(rows[0][0]) else []
    if names:
        rows = rows[1:]
    if {"token", "layer", "expert"} <= set(names):
        return _grid(_ranked_rows(rows, names))
    table = [[int(cell) for cell in row] for row in rows]
    if names == ["layer", "expert"] or (table and all(len(row) == 2 for row in table)):
        return _grid(_activation_rows(table))
    decoded = [row for row in table if row[0] >= 0]
    expect(bool(decoded) or not table, "every token is below 0, a prompt's: none was decoded")
    return _grid((row[0], row[1], row[2:], None) for row in decoded)


def _is_number(cell: str) -> bool:
    return cell.strip().lstrip("-").isdigit()


def _ranked_rows(rows: Sequence[Sequence[str]], names: Sequence[str]) -> Iterator[Row]:
    """Yield rows of all ids from a table of one id a row; ``rank`` and ``phase`` need not be there."""
    cells: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for position, row in enumerate(rows):
        named = dict(zip(names, row, strict=True))
        if named.get("phase", "decode").strip() == "decode":
            ranked = int(named.get("rank", position)), int(named["expert"])
            cells.setdefault((int(named["token"]), int(named["layer"])), []).append(ranked)
    for (token, layer), chosen in cells.items():
        yield token, layer, [expert_id for _, expert_id in sorted(chosen)], None


def _activation_rows(table: Sequence[Sequence[int]]) -> Iterator[Row]:
    """Yield rows from pairs (layer, id) in the order of a run, layer after layer.

    As many as one token chooses is the fewest pairs that a layer has in a row. Passes of more tokens,
    prompts, are left out: of their tokens the last layer has but the last one.
    """
    blocks: list[tuple[int, list[int]]] = []
    for layer, expert_id in table:
        if not blocks or blocks[-1][0] != layer:
            blocks.append((layer, []))
        blocks[-1][1].append(expert_id)
    top_k = min((len(ids) for _, ids in blocks), default=0)
    passes: list[list[tuple[int, list[int]]]] = []
    for position, block in enumerate(blocks):
        if position == 0 or block[0] <= blocks[position - 1][0]:
            passes.append([])
        passes[-1].append(block)
    single = [one for one in passes if all(len(ids) == top_k for _, ids in one)]
    for token, one in enumerate(single):
        yield from ((token, layer, ids, None) for layer, ids in one)


def _read_jsonl(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8-sig") as file:
        objects = [json.loads(line) for line in file if line.strip()]
    expect(all(isinstance(item, dict) for item in objects), "a line is not an object")
    fields = _grid((item["token"], item["layer"], item["experts"], item.get("weights")) for item in objects)
    sequences = dict.fromkeys((item["token"], item.get("sequence", 0)) for item in objects)
    of_token = [sequence for _, sequence in sorted(sequences, key=lambda pair: int(pair[0]))]
    expect(len(of_token) == len(fields["experts"]), "a token is in two sequences")
    starts = [i for i in range(len(of_token)) if i == 0 or of_token[i] != of_token[i - 1]]
    fields["seq_len"] = np.diff([*starts, len(of_token)])
    return fields


def _grid(rows: Iterable[Row]) -> dict[str, Any]:
    """Put rows of any order into arrays; every token has every layer, once."""
    cells: dict[tuple[int, int], tuple[Sequence[int], Sequence[float] | None]] = {}
    for token, layer, ids, weights in rows:
        cell = int(token), int(layer)
        expect(cell not in cells, f"token {cell[0]} has layer {cell[1]} twice: is it several traces in one?")
        cells[cell] = ids, weights
    tokens = sorted({token for token, _ in cells})
    layers = sorted({layer for _, layer in cells})
    expect(bool(cells), "it has no rows")
    expect(len(cells) == len(tokens) * len(layers), f"{len(tokens)} tokens, {len(layers)} layers: rows lack")
    widths = {len(ids) for ids, _ in cells.values()}
    expect(len(widths) == 1, f"rows have {sorted(widths)} experts; every row needs the same number")
    order = [(token, layer) for token in tokens for layer in layers]
    shape = (len(tokens), len(layers), widths.pop())
    fields: dict[str, Any] = {"layers": layers}
    fields["experts"] = np.array([cells[cell][0] for cell in order], np.int64).reshape(shape)
    if all(weights is not None for _, weights in cells.values()):
        fields["weights"] = np.array([cells[cell][1] for cell in order], np.float32).reshape(shape)
    return fields


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
}


def expect(condition: bool, message: str) -> None:
    """Raise CheckpointError(message) unless ``condition``."""
    if not condition:
        raise CheckpointError(message)
