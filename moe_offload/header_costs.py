"""What a checkpoint will cost, from its headers alone: for `inspect` and `plan`, before anything is loaded.

The division of a budget is planning/placement.py's, the same that the runtime uses; what only a running
process can measure (its libraries) is an estimate here, and says so where it is shown.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

from moe_offload.config import DEFAULT_CONTEXT_TOKENS, MIB, RuntimeConfig, resolve_expert_cap
from moe_offload.errors import BudgetError, ConfigError
from moe_offload.planning.cost_model import (
    TokenBytes,
    aligned,
    dense_workspace_bytes,
    device_host_bytes,
    kv_bytes,
    scale_copies_bytes,
    state_bytes,
    tokenizer_bytes,
    workspace_bytes,
)
from moe_offload.planning.dense_placement import DenseSizes
from moe_offload.planning.kv_format import cached_bytes, check_kv, unpacked_kv_bytes
from moe_offload.planning.placement import FixedCosts, divide, smallest_ram_bytes
from moe_offload.planning.plans import PlacementPlan
from moe_offload.planning.slots import with_staging
from moe_offload.residency.route_log import ROUTE_LOG_BYTES
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.dense_tensor import TensorInfo
from moe_offload.storage.expert_format import GgmlType, WeightType, row_bytes
from moe_offload.storage.io import BOUNCE_BYTES

# Interpreter, torch and transformers before a model is loaded, x86-64 Linux, torch 2.13: 354 MiB with the
# build for CPUs, 710 and 774 with the one for CUDA. A run measures it; here that would mean importing them.
CPU_LIBRARIES_BYTES = 360 * MIB
CUDA_LIBRARIES_BYTES = 780 * MIB
FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
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


def context_bytes(checkpoint: Checkpoint, num_tokens: int, kv: str | None = None) -> int:
    """Return the bytes of keys and values of ``num_tokens`` tokens."""
    return kv_bytes(
        checkpoint.spec,
        context_tokens=num_tokens,
        batch_size=1,
        bytes_per_element=element_bytes(checkpoint),
        kv=kv,
    )


def dense_resident_bytes(checkpoint: Checkpoint, bytes_per_element: int) -> int:
    """Return what the dense tensors will occupy: packed bytes in a GGUF, numbers of that size elsewhere."""
    is_gguf = checkpoint.source == "gguf"
    return sum(_resident_bytes(info, is_gguf, bytes_per_element) for info in checkpoint.dense.values())


def _resident_bytes(info: TensorInfo, is_gguf: bool, bytes_per_element: int) -> int:
    is_matrix = len(info.shape) == 2 and "ffn_gate_inp" not in info.name and ".gate.weight" not in info.name
    is_unpacked = info.recipe is not None and info.ggml_type is GgmlType.F32
    if info.scales is not None:
        return info.shape[0] * row_bytes(info.ggml_type, info.shape[1])
    if info.packed or (is_gguf and is_matrix and not is_unpacked):
        return info.span.num_bytes
    return info.num_elements * bytes_per_element


def dense_sizes(
    checkpoint: Checkpoint, bytes_per_element: int, context_tokens: int, kv: str | None = None
) -> DenseSizes:
    """Return what the dense parts would take on a device: vectors as float32, each tensor aligned."""
    spec, is_gguf = checkpoint.spec, checkpoint.source == "gguf"
    layers, others = [0] * spec.num_hidden_layers, dict[str, int]()
    for name, info in checkpoint.dense.items():
        layer = re.search(r"\blayers\.([0-9]+)\.", name)
        num_bytes = aligned(_resident_bytes(info, is_gguf, 4 if len(info.shape) == 1 else bytes_per_element))
        if layer is None:
            others[name] = num_bytes
        elif int(layer[1]) < len(layers) and ".experts." not in name:
            layers[int(layer[1])] += num_bytes
    is_tied = not any("lm_head" in name for name in others)
    num_heads = int(checkpoint.config["num_attention_heads"])
    head_dim = int(checkpoint.config.get("head_dim") or spec.hidden_size // num_heads)
    return DenseSizes(
        tuple(layers),
        sum(size for name, size in others.items() if is_tied or "embed_tokens" not in name),
        tuple(
            cached_bytes(elements, bytes_per_element=bytes_per_element, kv=kv)
            for elements in spec.kv_elements_per_token
        ),
        dense_workspace_bytes(spec, num_heads, head_dim, context_tokens, _widest_network(checkpoint)),
    )


def _widest_network(checkpoint: Checkpoint) -> int:
    """Return the units of the widest dense network, shared experts left out; 0 without one."""
    dense = [info for name, info in checkpoint.dense.items() if ".mlp.down_proj." in name]
    return max((info.shape[-1] for info in dense), default=0)


def element_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of an activation or a cached number: float32 for a GGUF, a folder's own dtype."""
    dtype = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    return 4 if checkpoint.source == "gguf" else FLOAT_BYTES.get(dtype, 4)


def bytes_per_token(checkpoint: Checkpoint, cached_tokens: int, kv: str | None = None) -> TokenBytes:
    """Return what decoding one token reads after ``cached_tokens`` others."""
    layouts, top_k = checkpoint.experts.layouts.values(), checkpoint.spec.top_k
    return TokenBytes(
        dense_bytes=dense_read_bytes(checkpoint),
        expert_bytes=sum(min(top_k, layout.num_experts) * layout.expert_bytes for layout in layouts),
        kv_bytes=context_bytes(checkpoint, cached_tokens, kv),
    )


def attention_heads(checkpoint: Checkpoint) -> int:
    """Return the heads of all layers that attend: each makes a score of every cached token."""
    layers = sum(elements > 0 for elements in checkpoint.spec.kv_elements_per_token)
    return int(checkpoint.config["num_attention_heads"]) * layers


def dense_read_bytes(checkpoint: Checkpoint) -> int:
    """Return the dense bytes that every decoded token reads: all but an embedding used by row only."""
    return sum(info.span.num_bytes for info in _multiplied(checkpoint))


def prompt_weights(checkpoint: Checkpoint) -> int:
    """Return how many dense weights every token of a prompt meets: the head sees its last only."""
    return sum(info.num_elements for name, info in checkpoint.dense.items() if not _is_head(name))


def skipped_weights(checkpoint: Checkpoint) -> int:
    """Return how many of the last layer's dense weights only those tokens meet whose output is wanted."""
    last = f"layers.{checkpoint.spec.num_hidden_layers - 1}."
    return sum(
        info.num_elements
        for name, info in checkpoint.dense.items()
        if last in name and "k_proj" not in name and "v_proj" not in name
    )


def prompt_type(checkpoint: Checkpoint) -> WeightType:
    """Return the format that most of ``prompt_weights`` have."""
    counts: dict[WeightType, int] = {}
    for name, info in checkpoint.dense.items():
        if not _is_head(name):
            counts[info.ggml_type] = counts.get(info.ggml_type, 0) + info.num_elements
    return max(counts, key=lambda ggml_type: counts[ggml_type])


def head_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of the head, which may be the embedding."""
    body = sum(info.span.num_bytes for name, info in checkpoint.dense.items() if not _is_head(name))
    return dense_read_bytes(checkpoint) - body


def _is_head(name: str) -> bool:
    return "lm_head" in name or "embed_tokens" in name


def multiplied_bytes_by_type(checkpoint: Checkpoint) -> dict[WeightType, int]:
    """Return the bytes of ``dense_read_bytes`` by format, most first."""
    sizes: dict[WeightType, int] = {}
    for info in _multiplied(checkpoint):
        sizes[info.ggml_type] = sizes.get(info.ggml_type, 0) + info.span.num_bytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _multiplied(checkpoint: Checkpoint) -> list[TensorInfo]:
    """Return the dense tensors but the input embedding, which is read by row unless it is the head, too."""
    is_tied = not any("lm_head" in name for name in checkpoint.dense)
    return [info for name, info in checkpoint.dense.items() if is_tied or "embed_tokens" not in name]
