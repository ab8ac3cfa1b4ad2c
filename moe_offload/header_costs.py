"""What a checkpoint will cost, from its headers alone: for `inspect` and `plan`, before anything is loaded.

The division of a budget is planning/placement.py's, the same that the runtime uses; what only a running
process can measure (its libraries) is an estimate here, and says so where it is shown.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from moe_offload.config import MIB, PlacementPlan
from moe_offload.planning.cost_model import kv_bytes, tokenizer_bytes, workspace_bytes
from moe_offload.planning.placement import FixedCosts, plan_placement
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.dense_tensor import TensorInfo
from moe_offload.storage.io import BOUNCE_BYTES

# Interpreter, torch and transformers before a model is loaded, x86-64 Linux, torch 2.13: 354 MiB with the
# build for CPUs, 710 and 774 with the one for CUDA. A run measures it; here that would mean importing them.
CPU_LIBRARIES_BYTES = 360 * MIB
CUDA_LIBRARIES_BYTES = 780 * MIB
FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
EAGER_FAMILIES = {"gpt_oss"}  # attention sinks: scores are stored, whole


def fixed_costs(checkpoint: Checkpoint, context_tokens: int) -> FixedCosts:
    """Return everything in memory that is not an expert."""
    return FixedCosts(
        base_bytes=libraries_bytes() + tokenizer_bytes(checkpoint.spec),
        dense_bytes=checkpoint.dense_bytes,
        kv_bytes=context_bytes(checkpoint, context_tokens),
        workspace_bytes=BOUNCE_BYTES
        + workspace_bytes(
            checkpoint.spec,
            checkpoint.config,
            context_tokens=context_tokens,
            stores_scores=checkpoint.spec.model_type in EAGER_FAMILIES,
        ),
        context_tokens=context_tokens,
    )


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
        kv_bytes_per_element=kv_element_bytes(checkpoint),
        activation_bytes=fixed.workspace_bytes,
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
        bytes_per_element=kv_element_bytes(checkpoint),
    )


def kv_element_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of a cached number: a GGUF computes in float32, a folder in its own dtype."""
    dtype = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    return 4 if checkpoint.source == "gguf" else FLOAT_BYTES.get(dtype, 4)


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
