"""What a checkpoint will cost, from its headers alone: for `inspect` and `plan`, before anything is loaded.

The division of a budget is planning/placement.py's, the same that the runtime uses; what only a running
process can measure (its libraries) is an estimate here, and says so where it is shown.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from moe_offload.config import MIB, PlacementPlan
from moe_offload.planning.cost_model import (
    TokenBytes,
    kv_bytes,
    scale_copies_bytes,
    state_bytes,
    tokenizer_bytes,
    workspace_bytes,
)
from moe_offload.planning.placement import FixedCosts, plan_placement
from moe_offload.residency.route_log import ROUTE_LOG_BYTES
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.dense_tensor import TensorInfo
from moe_offload.storage.expert_format import GgmlType, row_bytes
from moe_offload.storage.io import BOUNCE_BYTES

# Interpreter, torch and transformers before a model is loaded, x86-64 Linux, torch 2.13: 354 MiB with the
# build for CPUs, 710 and 774 with the one for CUDA. A run measures it; here that would mean importing them.
CPU_LIBRARIES_BYTES = 360 * MIB
CUDA_LIBRARIES_BYTES = 780 * MIB
FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
EAGER_FAMILIES = {  # transformers has no other attention for them (sinks): scores are stored, whole
    "gpt_oss", "flint", "granitemoe_swa", "mimo_v2_flash",
}  # fmt: skip


def fixed_costs(checkpoint: Checkpoint, context_tokens: int) -> FixedCosts:
    """Return everything in memory that is not an expert, part by part as the runtime plans it."""
    return FixedCosts(
        base_bytes=libraries_bytes(),
        dense_bytes=dense_resident_bytes(checkpoint, element_bytes(checkpoint)),
        kv_bytes=context_bytes(checkpoint, context_tokens) + state_bytes(checkpoint.spec),
        workspace_bytes=_activation_bytes(checkpoint, context_tokens)
        + BOUNCE_BYTES
        + scale_copies_bytes(checkpoint.experts.layouts),
        context_tokens=context_tokens,
    )


def _activation_bytes(checkpoint: Checkpoint, context_tokens: int) -> int:
    """Return the workspace of a process that has just started: it has yet to load the tokenizer."""
    activations = workspace_bytes(
        checkpoint.spec,
        checkpoint.config,
        context_tokens=context_tokens,
        stores_scores=checkpoint.spec.model_type in EAGER_FAMILIES,
    )
    return activations + tokenizer_bytes(checkpoint.spec) + ROUTE_LOG_BYTES


def place_from_headers(checkpoint: Checkpoint, fixed: FixedCosts, ram_bytes: int) -> PlacementPlan:
    """Return where ``ram_bytes`` would go.

    Raises:
        BudgetError: it is too little; names the least that would do.
    """
    return plan_placement(
        checkpoint.spec,
        checkpoint.experts.layouts,
        ram_bytes=ram_bytes,
        base_bytes=fixed.base_bytes,
        dense_bytes=fixed.dense_bytes,
        context_tokens=fixed.context_tokens,
        kv_bytes_per_element=element_bytes(checkpoint),
        reader_bytes=BOUNCE_BYTES,
        activation_bytes=_activation_bytes(checkpoint, fixed.context_tokens),
    )


def libraries_bytes() -> int:
    """Return the estimate for the build of torch that is installed, without importing it."""
    try:
        return CPU_LIBRARIES_BYTES if version("torch").endswith("+cpu") else CUDA_LIBRARIES_BYTES
    except PackageNotFoundError:
        return CPU_LIBRARIES_BYTES


def context_bytes(checkpoint: Checkpoint, num_tokens: int) -> int:
    """Return the bytes of keys and values of ``num_tokens`` tokens."""
    return kv_bytes(
        checkpoint.spec,
        context_tokens=num_tokens,
        batch_size=1,
        bytes_per_element=element_bytes(checkpoint),
    )


def dense_resident_bytes(checkpoint: Checkpoint, bytes_per_element: int) -> int:
    """Return what the dense tensors will occupy: packed bytes in a GGUF, numbers of that size elsewhere."""
    total = 0
    for name, info in checkpoint.dense.items():
        is_matrix = len(info.shape) == 2 and "ffn_gate_inp" not in name and ".gate.weight" not in name
        is_unpacked = info.recipe is not None and info.ggml_type is GgmlType.F32
        if info.scales is not None:
            total += info.shape[0] * row_bytes(info.ggml_type, info.shape[1])
        elif info.packed or (checkpoint.source == "gguf" and is_matrix and not is_unpacked):
            total += info.span.num_bytes
        else:
            total += info.num_elements * bytes_per_element
    return total


def element_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of an activation or a cached number: float32 for a GGUF, a folder's own dtype."""
    dtype = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    return 4 if checkpoint.source == "gguf" else FLOAT_BYTES.get(dtype, 4)


def bytes_per_token(checkpoint: Checkpoint, cached_tokens: int) -> TokenBytes:
    """Return what decoding one token reads after ``cached_tokens`` others."""
    layouts, top_k = checkpoint.experts.layouts.values(), checkpoint.spec.top_k
    return TokenBytes(
        dense_bytes=dense_read_bytes(checkpoint),
        expert_bytes=sum(min(top_k, layout.num_experts) * layout.expert_bytes for layout in layouts),
        kv_bytes=context_bytes(checkpoint, cached_tokens),
    )


def dense_read_bytes(checkpoint: Checkpoint) -> int:
    """Return the dense bytes that every decoded token reads: all but an embedding used by row only."""
    return sum(info.span.num_bytes for info in _multiplied(checkpoint))


def dense_weights(checkpoint: Checkpoint) -> int:
    """Return how many dense weights a token is multiplied with."""
    return sum(info.num_elements for info in _multiplied(checkpoint))


def _multiplied(checkpoint: Checkpoint) -> list[TensorInfo]:
    """Return the dense tensors but the input embedding, which is read by row unless it is the head, too."""
    is_tied = not any("lm_head" in name for name in checkpoint.dense)
    return [info for name, info in checkpoint.dense.items() if is_tied or "embed_tokens" not in name]
