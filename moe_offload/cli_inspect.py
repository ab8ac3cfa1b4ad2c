"""`moe-offload inspect`: what a checkpoint holds and what each budget would, from its headers alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from moe_offload import _native
from moe_offload.config import DEMO_MODEL, GIB, MIB, gib
from moe_offload.errors import ConfigError
from moe_offload.header_costs import fixed_costs, resolve_context
from moe_offload.header_sizes import context_bytes
from moe_offload.planning.kv_format import KV_PRICE, check_kv
from moe_offload.planning.placement import BudgetRow, FixedCosts, budgets_table
from moe_offload.runtime.native_families import native_step_reason
from moe_offload.storage.checkpoint import Checkpoint, open_checkpoint
from moe_offload.storage.expert_format import FAST_TYPES, WeightType
from moe_offload.storage.families import find_family

BUDGETS_BYTES = (
    GIB // 2,
    *(n * GIB for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)),
)


def run(args: argparse.Namespace) -> int:
    """Print the table, or the JSON object."""
    checkpoint = open_measured(args.model or DEMO_MODEL, allow_dense=args.allow_dense)
    report = describe(checkpoint, resolve_context(checkpoint, args.context))
    print(json.dumps(report) if args.json else as_text(report))
    return 0


def open_measured(path: str | Path, *, allow_dense: bool) -> Checkpoint:
    """Open a checkpoint with its cache's sizes as a load would find them; still reads headers only.

    They come from the configuration, without torch, but for families that are known by trial only.
    """
    checkpoint = open_checkpoint(path, allow_dense=allow_dense)
    if not find_family(checkpoint.spec.model_type, str(path)).found_in_file:
        return checkpoint
    from moe_offload.cli_session import import_libraries

    import_libraries()
    from moe_offload.runtime.skeleton import measured_checkpoint

    return measured_checkpoint(checkpoint)


def describe(checkpoint: Checkpoint, context_tokens: int) -> dict[str, Any]:
    """Return everything that ``inspect`` shows; sizes in bytes."""
    spec = checkpoint.spec
    fixed = fixed_costs(checkpoint, context_tokens)
    return {
        "path": str(checkpoint.path),
        "source": checkpoint.source,
        "files": len(checkpoint.files),
        "family": spec.model_type,
        "num_hidden_layers": spec.num_hidden_layers,
        "moe_layers": len(spec.moe_layers),
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "hidden_size": spec.hidden_size,
        "moe_intermediate_size": spec.moe_intermediate_size,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "bytes_by_format": {kind.name: size for kind, size in checkpoint.bytes_by_type().items()},
        "isa": _native.isa(),
        "generic_kernel_formats": [kind.name for kind in checkpoint.bytes_by_type() if _is_generic(kind)],
        "native_decode_step": (reason := native_step_reason(checkpoint.config)) is None,
        "native_decode_step_reason": reason,
        "expert_bytes": checkpoint.experts.total_bytes,
        "one_expert_bytes": _expert_sizes(checkpoint),
        "dense_bytes": checkpoint.dense_bytes,
        "kv_bytes_per_1000_tokens": context_bytes(checkpoint, 1000),
        "packed_kv_bytes_per_1000_tokens": _packed_kv_bytes(checkpoint),
        "context_tokens": context_tokens,
        "fixed": dataclasses.asdict(fixed),
        "budgets": [dataclasses.asdict(row) for row in _budgets(checkpoint, fixed)],
    }


def _packed_kv_bytes(checkpoint: Checkpoint) -> int | None:
    """Return what 1000 tokens take under kv="q8_0"; None where their rows cannot be packed."""
    try:
        check_kv(checkpoint.config, "q8_0", "")
    except ConfigError:
        return None
    return context_bytes(checkpoint, 1000, "q8_0")


def _is_generic(kind: WeightType) -> bool:
    return kind not in FAST_TYPES or _native.isa() == "baseline"


def _expert_sizes(checkpoint: Checkpoint) -> list[int]:
    """Return the different sizes of experts, smallest first (mixed files have several)."""
    return sorted({layout.expert_bytes for layout in checkpoint.experts.layouts.values()})


def _budgets(checkpoint: Checkpoint, fixed: FixedCosts) -> list[BudgetRow]:
    """Return rows from the smallest budget that works to the first that holds every expert."""
    layouts = checkpoint.experts.layouts
    (probe,) = budgets_table(checkpoint.spec, layouts, [0], fixed)
    smallest = -(-probe.smallest_ram_bytes // MIB) * MIB
    budgets = [smallest, *(size for size in BUDGETS_BYTES if size > smallest)]
    rows = budgets_table(checkpoint.spec, layouts, budgets, fixed)
    whole = next((i for i, row in enumerate(rows) if row.expert_share == 1), len(rows) - 1)
    return rows[: whole + 1]


def as_text(report: dict[str, Any]) -> str:
    """Return the report for people."""
    return "\n".join([*_facts(report), "", *_formats(report), "", *_budget_lines(report)])


def _facts(report: dict[str, Any]) -> list[str]:
    sizes = " to ".join(sorted({gib(size) for size in report["one_expert_bytes"]}))
    packed = report["packed_kv_bytes_per_1000_tokens"]
    facts = {
        "model": f"{report['path']} ({report['source']}, {report['files']} file(s))",
        "family": report["family"],
        "layers": f"{report['num_hidden_layers']}, {report['moe_layers']} of them with experts",
        "experts": f"{report['num_experts']} a layer, {report['top_k']} per token, {sizes} each"
        if report["num_experts"]
        else "none (dense)",
        "shape": f"hidden {report['hidden_size']}, expert {report['moe_intermediate_size']}, "
        f"vocabulary {report['vocab_size']}, {report['max_position_embeddings']} positions",
        "experts in all": gib(report["expert_bytes"]),
        "dense weights": gib(report["dense_bytes"]),
        "key/value cache": f"{gib(report['kv_bytes_per_1000_tokens'])} per 1000 tokens; "
        + (f"{gib(packed)} with --kv q8_0 (lossy: {KV_PRICE})" if packed else "--kv q8_0 is not possible"),
        "decode step": "native"
        if report["native_decode_step"]
        else f"transformers' layers: {report['native_decode_step_reason']}",
    }
    return [f"{name:16} {text}" for name, text in facts.items()]


def _formats(report: dict[str, Any]) -> list[str]:
    total = sum(report["bytes_by_format"].values())
    lines = [f"{'format':8} {'size':>12} {'share':>6}  kernel ({report['isa']})"]
    for name, size in report["bytes_by_format"].items():
        kernel = "generic: right, but slower" if name in report["generic_kernel_formats"] else "fast"
        lines.append(f"{name:8} {gib(size):>12} {size / total:>6.1%}  {kernel}")
    return lines


def _budget_lines(report: dict[str, Any]) -> list[str]:
    fixed = report["fixed"]
    lines = [
        f"Each budget holds libraries {gib(fixed['base_bytes'])} (an estimate; a run measures it),",
        f"dense weights, key/value cache {gib(fixed['kv_bytes'])} for {report['context_tokens']} tokens, "
        f"workspace {gib(fixed['workspace_bytes'])}, and experts:",
        f"{'--ram':>12} {'experts in memory':>20}",
    ]
    for row in report["budgets"]:
        lines.append(f"{gib(row['ram_bytes']):>12} {row['num_slots']:>12} ({row['expert_share']:>4.0%})")
    return lines
