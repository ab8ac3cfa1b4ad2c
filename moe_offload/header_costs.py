"""What a checkpoint will cost, from its headers alone: for `inspect` and `plan`, before anything is loaded.

The division of a budget is planning/placement.py's, the same that the runtime uses; what only a running
process can measure (its libraries) is an estimate here, and says so where it is shown.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

from moe_offload.config import DEFAULT_CONTEXT_TOKENS, MIB, RuntimeConfig, resolve_expert_cap
from moe_offload.errors import BudgetError, ConfigError
from moe_offload.header_sizes import dense_resident_bytes, element_bytes
from moe_offload.planning.cost_model import (
    device_host_bytes,
    kv_bytes,
    scale_copies_bytes,
    state_bytes,
    tokenizer_bytes,
    workspace_bytes,
)
from moe_offload.planning.kv_format import check_kv, unpacked_kv_bytes
from moe_offload.planning.placement import FixedCosts, divide, smallest_ram_bytes
from moe_offload.planning.plans import PlacementPlan
from moe_offload.planning.slots import with_staging
from moe_offload.residency.route_log import ROUTE_LOG_BYTES
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.io import BOUNCE_BYTES

# Interpreter, torch and transformers before a model is loaded, x86-64 Linux, torch 2.13: 354 MiB with the
# build for CPUs, 710 and 774 with the one for CUDA. A run measures it; here that would mean importing them.
CPU_LIBRARIES_BYTES = 360 * MIB
CUDA_LIBRARIES_BYTES = 780 * MIB
EAGER_FAMILIES = {  # transformers has no other attention for them (sinks): scores are stored, whole
    "gpt_oss", "flint", "granitemoe_swa", "mimo_v2_flash",
}  # fmt: skip


@dataclass(frozen=True)
class Process:
    """What the process that runs the model adds to the headers.

    Attributes:
        base_bytes: interpreter, libraries and the caller's own data.
        bytes_per_element: of an activation or a cached number.
        stores_scores: attention keeps its scores (eager).
        loads_tokenizer: the tokenizer is yet to come.
        drives_device: a device computes some of the experts.
    """

    base_bytes: int
    bytes_per_element: int
    stores_scores: bool
    loads_tokenizer: bool = True
    drives_device: bool = False


def fresh_process(checkpoint: Checkpoint) -> Process:
    """Return the estimate for a process that has just started, without importing torch."""
    return Process(
        base_bytes=libraries_bytes(),
        bytes_per_element=element_bytes(checkpoint),
        stores_scores=checkpoint.spec.model_type in EAGER_FAMILIES,
    )


def resolve_context(checkpoint: Checkpoint, asked: int | None) -> int:
    """Return the tokens of key/value cache: what was asked for, or 4096 or the model's maximum.

    Raises:
        ConfigError: more than the model was made for.
    """
    largest = checkpoint.spec.max_position_embeddings
    if asked is None:
        return min(DEFAULT_CONTEXT_TOKENS, largest)
    if not 1 <= asked <= largest:
        raise ConfigError(
            f"context={asked} is beyond the {largest} positions that {checkpoint.path} was made for; "
            f"it must be from 1 to {largest}"
        )
    return asked


def place(
    checkpoint: Checkpoint, config: RuntimeConfig, *, ram_bytes: int, process: Process | None = None
) -> PlacementPlan:
    """Return where ``ram_bytes`` go: the one answer of `from_pretrained`, `plan` and `inspect`.

    Args:
        config: what the user chose; context, key/value format and cap on experts count here.
        process: as measured by the process that loads; the estimate for a new one otherwise.

    Raises:
        BudgetError: it is too little; names the least that would do, and the context that would fit.
        ConfigError: context or key/value format cannot be.
    """
    check_kv(checkpoint.config, config.kv, str(checkpoint.path))
    context_tokens = resolve_context(checkpoint, config.context_tokens)
    process = replace(process or fresh_process(checkpoint), drives_device=config.device is not None)
    layouts = checkpoint.experts.layouts
    cap = resolve_expert_cap(config.experts, sum(layout.num_experts for layout in layouts.values()))
    fixed = fixed_costs(checkpoint, context_tokens, kv=config.kv, process=process)
    try:
        plan = divide(checkpoint.spec, layouts, fixed, ram_bytes=ram_bytes, expert_cap=cap)
        return replace(plan, pools=with_staging(plan.pools, config.ram_staging, checkpoint.spec.top_k))
    except BudgetError as error:
        contexts = _contexts_that_fit(checkpoint, config.kv, ram_bytes, process, context_tokens)
        raise BudgetError(f"{error}{contexts}") from None


def _contexts_that_fit(
    checkpoint: Checkpoint, kv: str | None, ram_bytes: int, process: Process, context_tokens: int
) -> str:
    """Return what to tell of shorter contexts, plain and packed; "" where none fits, or this one would."""
    found = []
    for form in dict.fromkeys((kv, "q8_0")):
        longest = _longest_context(checkpoint, form, ram_bytes, process, context_tokens)
        if form == kv and longest == context_tokens:
            return ""  # something else is too small
        if longest:
            found.append(f"{longest} tokens" + (f" with kv={form!r}" if form else ""))
    return f"; the longest context that would fit is {', or '.join(found)}" if found else ""


def _longest_context(
    checkpoint: Checkpoint, kv: str | None, ram_bytes: int, process: Process, most: int
) -> int:
    """Return the largest context up to ``most`` whose least budget is within ``ram_bytes``; 0: none."""
    try:
        check_kv(checkpoint.config, kv, "")
    except ConfigError:
        return 0
    layouts, top_k = checkpoint.experts.layouts, checkpoint.spec.top_k

    def fits(context_tokens: int) -> bool:
        fixed = fixed_costs(checkpoint, context_tokens, kv=kv, process=process)
        return smallest_ram_bytes(fixed, layouts, top_k) <= ram_bytes

    return bisect_left(range(1, most + 1), True, key=lambda tokens: not fits(tokens))


def fixed_costs(
    checkpoint: Checkpoint, context_tokens: int, *, kv: str | None = None, process: Process | None = None
) -> FixedCosts:
    """Return everything in memory that is not an expert, part by part."""
    process = process or fresh_process(checkpoint)
    spec, element = checkpoint.spec, process.bytes_per_element
    activations = workspace_bytes(
        spec, checkpoint.config, context_tokens=context_tokens, stores_scores=process.stores_scores
    )
    unpacked = unpacked_kv_bytes(spec, context_tokens=context_tokens, bytes_per_element=element, kv=kv)
    tokenizer = tokenizer_bytes(spec) if process.loads_tokenizer else 0
    return FixedCosts(
        base_bytes=process.base_bytes,
        dense_bytes=dense_resident_bytes(checkpoint, element),
        kv_bytes=kv_bytes(spec, context_tokens=context_tokens, batch_size=1, bytes_per_element=element, kv=kv)
        + state_bytes(spec),
        workspace_bytes=activations
        + unpacked
        + tokenizer
        + ROUTE_LOG_BYTES
        + BOUNCE_BYTES
        + (device_host_bytes(spec) if process.drives_device else 0)
        + scale_copies_bytes(checkpoint.experts.layouts),
        context_tokens=context_tokens,
    )


def libraries_bytes() -> int:
    """Return the estimate for the build of torch that is installed, without importing it."""
    try:
        return CPU_LIBRARIES_BYTES if version("torch").endswith("+cpu") else CUDA_LIBRARIES_BYTES
    except PackageNotFoundError:
        return CPU_LIBRARIES_BYTES
