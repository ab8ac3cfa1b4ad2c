"""What a checkpoint's tensors amount to, from headers: in memory, on a device, for a token, for a prompt."""

from __future__ import annotations

import re

from moe_offload.planning.cost_model import TokenBytes, aligned, dense_workspace_bytes, kv_bytes
from moe_offload.planning.dense_placement import DenseSizes
from moe_offload.planning.kv_format import cached_bytes
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.dense_tensor import TensorInfo
from moe_offload.storage.expert_format import GgmlType, WeightType, row_bytes

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def context_bytes(checkpoint: Checkpoint, num_tokens: int, kv: str | None = None) -> int:
    """Return the bytes of keys and values of ``num_tokens`` tokens."""
    return kv_bytes(
        checkpoint.spec,
        context_tokens=num_tokens,
        batch_size=1,
        bytes_per_element=element_bytes(checkpoint),
        kv=kv,
    )


def bytes_per_token(checkpoint: Checkpoint, cached_tokens: int, kv: str | None = None) -> TokenBytes:
    """Return what decoding one token reads after ``cached_tokens`` others."""
    layouts, top_k = checkpoint.experts.layouts.values(), checkpoint.spec.top_k
    return TokenBytes(
        dense_bytes=dense_read_bytes(checkpoint),
        expert_bytes=sum(min(top_k, layout.num_experts) * layout.expert_bytes for layout in layouts),
        kv_bytes=context_bytes(checkpoint, cached_tokens, kv),
    )


def element_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of an activation or a cached number: float32 for a GGUF, a folder's own dtype."""
    dtype = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    return 4 if checkpoint.source == "gguf" else FLOAT_BYTES.get(dtype, 4)


def attention_heads(checkpoint: Checkpoint) -> int:
    """Return the heads of all layers that attend: each makes a score of every cached token."""
    layers = sum(elements > 0 for elements in checkpoint.spec.kv_elements_per_token)
    return int(checkpoint.config["num_attention_heads"]) * layers


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


def dense_read_bytes(checkpoint: Checkpoint) -> int:
    """Return the dense bytes that every decoded token reads: all but an embedding used by row only."""
    return sum(info.span.num_bytes for info in _multiplied(checkpoint))


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
