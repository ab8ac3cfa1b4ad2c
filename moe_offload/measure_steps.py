"""What a decode step and a prompt's chunk cost on a model's own experts: for `plan` on this machine.

The code that the runtime runs, on experts of the checkpoint in memory and on its file, in a few seconds. All
of it is measured several times over, one thing after the other, and of each figure the median counts: a host
that others share is now fast and now slow, and what is predicted is how fast it is as a rule, not at best.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from moe_offload import ops
from moe_offload._native import attend_prompt
from moe_offload.config import PREFILL_CHUNK_TOKENS
from moe_offload.expert_bench import expert_bench
from moe_offload.header_costs import EAGER_FAMILIES
from moe_offload.header_sizes import bytes_per_token, element_bytes, multiplied_bytes_by_type, prompt_type
from moe_offload.measure import COLS, WEIGHTS_BYTES, kernel_bytes_per_s, random_weights
from moe_offload.measure_experts import LayerExperts
from moe_offload.planning.machine_speed import Curve, MachineSpeed, PromptSpeed, medians
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.expert_format import GgmlType, WeightType, row_bytes

PASSES = 3  # over everything, so that no figure is of one moment
SHARE_S = 0.015  # for each measurement of a pass
LEAST_RUNS = 3
LEAST_S = 1e-9  # of a difference between noisy times
CACHED_AS = {4: (GgmlType.F32, torch.float32), 2: (GgmlType.BF16, torch.bfloat16)}  # by an element's bytes
CHUNK_TOKENS, CHUNK_ROWS = (16, 64, PREFILL_CHUNK_TOKENS), 1024  # of a dense product


def measure_steps(checkpoint: Checkpoint, *, is_native: bool) -> MachineSpeed:
    """Measure the machine at the checkpoint's formats, sizes and numbers of tokens; overheads are left 0.

    Args:
        is_native: native code attends, not transformers' layers (runtime/native_families.py).
    """
    dense_type = next(iter(multiplied_bytes_by_type(checkpoint)))
    # As many as a token reads of all kinds: a cache that holds the dense ones alone would flatter them.
    weights = random_weights(min(WEIGHTS_BYTES, bytes_per_token(checkpoint, 0).total_bytes))

    def dense() -> MachineSpeed:
        macs_per_s = _dense_macs_per_s(prompt_type(checkpoint), weights)
        score_s = _score_s(checkpoint, is_native)
        prompt = PromptSpeed(macs_per_s, ((1.0, 0.0),), 0.0, score_s=score_s / own_share, own_share=own_share)
        ram_bytes_per_s = kernel_bytes_per_s(dense_type, weights, _mean_s)
        return MachineSpeed(ram_bytes_per_s, ram_bytes_per_s, macs_per_s[-1][1], prompt=prompt)

    own_share = 0.5 if is_native else 1.0
    if not checkpoint.experts.layouts:
        return replace(medians([dense() for _ in range(PASSES)]), prompt=None)
    with expert_bench(checkpoint) as bench:
        layer = LayerExperts(bench, next(iter(checkpoint.experts.layouts)))
        machine = medians([_with_experts(dense(), layer) for _ in range(PASSES)])
        assert machine.prompt is not None
        fresh = medians([replace(machine.prompt, fresh_s=layer.fresh_curve()) for _ in range(PASSES)])
        return replace(machine, prompt=fresh)


def _with_experts(dense: MachineSpeed, layer: LayerExperts) -> MachineSpeed:
    """Return the machine with what one look at a layer's experts tells of them."""
    assert dense.prompt is not None
    expert_s = layer.at_hand_s() / layer.top_k
    latency_s, read_s = _decode_reads(layer, expert_s)
    submit_s, curve = layer.submit_s(), layer.prompt_curve()
    streamed_s = layer.streamed_s(1, latency_s)
    handling = layer.handling_curve(curve, streamed_s, latency_s)
    layer.fill()
    expert_bytes = layer.layout.expert_bytes
    return replace(
        dense,
        disk_bytes_per_s=expert_bytes / read_s,
        expert_bytes_per_s=expert_bytes / expert_s,
        disk_latency_s=latency_s,
        submit_s=submit_s,
        prompt=replace(dense.prompt, expert_s=curve, read_s=streamed_s, handling_s=handling),
    )


def _decode_reads(layer: LayerExperts, expert_s: float) -> tuple[float, float]:
    """Return what a step's first miss costs more than each further one, and what that one costs.

    From steps with one miss and with as many as there can be: until the last is there and computed. What
    a step without misses costs beside its products is a layer's overhead, measured elsewhere.
    """
    most, beside_s = layer.most_misses, layer.step_s(0) - layer.top_k * expert_s
    one_s = layer.step_s(1) - max(0.0, beside_s)
    if most == 1:
        return 0.0, max(LEAST_S, one_s - expert_s)
    read_s = max(LEAST_S, (layer.step_s(most) - layer.step_s(1)) / (most - 1))
    return max(0.0, one_s - expert_s - read_s), read_s


def _dense_macs_per_s(ggml_type: WeightType, weights: torch.Tensor) -> Curve:
    """Return multiply-adds per second of a chunk's product with a dense matrix, by tokens."""
    rows = min(CHUNK_ROWS, weights.numel() // row_bytes(ggml_type, COLS))
    packed = weights[: rows * row_bytes(ggml_type, COLS)]
    rates = []
    for num_tokens in CHUNK_TOKENS:
        seconds = _mean_s(partial(ops.linear, torch.randn(num_tokens, COLS), packed, ggml_type, rows, COLS))
        rates.append((float(num_tokens), num_tokens * rows * COLS / seconds))
    return tuple(rates)


def _score_s(checkpoint: Checkpoint, is_native: bool) -> float:
    """Return what a first chunk's attention costs, by heads x tokens x tokens, those to come included."""
    config, tokens = checkpoint.config, PREFILL_CHUNK_TOKENS
    heads = int(config["num_attention_heads"])
    dim = int(config.get("head_dim") or checkpoint.spec.hidden_size // heads)
    pairs = heads * tokens * tokens
    if is_native:
        return _mean_s(_native_attention(checkpoint, heads, dim)) / pairs
    query, key, value = (torch.randn(1, heads, tokens, dim) for _ in range(3))
    if checkpoint.spec.model_type not in EAGER_FAMILIES:
        return _mean_s(lambda: scaled_dot_product_attention(query, key, value, is_causal=True)) / pairs
    mask = torch.zeros(1, 1, tokens, tokens)

    def with_scores() -> torch.Tensor:
        scores = query @ key.transpose(2, 3) * dim**-0.5 + mask
        with_sink = torch.cat([scores, scores[..., :1]], dim=-1)
        with_sink = with_sink - with_sink.max(dim=-1, keepdim=True).values
        return torch.softmax(with_sink, dim=-1)[..., :-1] @ value

    return _mean_s(with_scores) / pairs


def _native_attention(checkpoint: Checkpoint, heads: int, dim: int) -> Callable[[], object]:
    """Return the attention of a prompt's first chunk, in a type of the cache's size."""
    kv_heads = int(checkpoint.config.get("num_key_value_heads") or heads)
    ggml_type, dtype = CACHED_AS[element_bytes(checkpoint)]
    query = torch.randn(PREFILL_CHUNK_TOKENS, heads, dim) * dim**-0.5
    keys, values = torch.randn(2, kv_heads, PREFILL_CHUNK_TOKENS, dim).to(dtype)
    context = torch.empty_like(query)

    def attend() -> None:
        addresses = keys.data_ptr(), values.data_ptr()
        shape = heads, kv_heads, dim, int(ggml_type)
        attend_prompt(*shape, *addresses, len(query), query.data_ptr(), context.data_ptr())

    return attend


def _mean_s(function: Callable[[], object]) -> float:
    """Return the mean seconds of a call, the first left out."""
    function()
    calls, started = 0, time.perf_counter()
    while calls < LEAST_RUNS or time.perf_counter() - started < SHARE_S:
        function()
        calls += 1
    return (time.perf_counter() - started) / calls
