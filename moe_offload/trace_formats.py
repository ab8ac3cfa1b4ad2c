"""The files that hold a routing trace: from each format to the fields of trace.make_trace."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_offload.errors import CheckpointError
from moe_offload.npz import open_npz


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
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row and not row[0].lstrip().startswith("#")]
    if rows and not rows[0][0].strip().lstrip("-").isdigit():
        rows = rows[1:]  # a header
    table = [[int(cell) for cell in row] for row in rows]
    return _grid((row[0], row[1], row[2:], None) for row in table)


def _read_jsonl(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        objects = [json.loads(line) for line in file if line.strip()]
    expect(all(isinstance(item, dict) for item in objects), "a line is not an object")
    fields = _grid((item["token"], item["layer"], item["experts"], item.get("weights")) for item in objects)
    sequences = dict.fromkeys((item["token"], item.get("sequence", 0)) for item in objects)
    of_token = [sequence for _, sequence in sorted(sequences, key=lambda pair: int(pair[0]))]
    expect(len(of_token) == len(fields["experts"]), "a token is in two sequences")
    starts = [i for i in range(len(of_token)) if i == 0 or of_token[i] != of_token[i - 1]]
    fields["seq_len"] = np.diff([*starts, len(of_token)])
    return fields


def _grid(rows: Iterable[tuple[int, int, Sequence[int], Sequence[float] | None]]) -> dict[str, Any]:
    """Put (token, layer, ids, weights) rows of any order into arrays; every token has every layer."""
    cells = {(int(token), int(layer)): (ids, weights) for token, layer, ids, weights in rows}
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
