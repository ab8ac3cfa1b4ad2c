"""Make HorizonPolicy's coefficients from traces: ridge regression, layer by layer, in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.errors import ConfigError
from moe_offload.planning.policies.horizon import GENERIC_COEFFICIENTS, RATES, Float32Array, HorizonFit
from moe_offload.trace import RoutingTrace, sequence_digests

GAMMA, RIDGE, LAYERS_BEFORE = 0.85, 100.0, 7
CHUNK_TOKENS = 8192


def fit_horizon(
    traces: Sequence[RoutingTrace],
    *,
    gamma: float = GAMMA,
    ridge: float = RIDGE,
    layers_before: int = LAYERS_BEFORE,
    on_progress: Callable[[int, int], None] | None = None,
) -> HorizonFit:
    """Return the coefficients that forecast the traces' discounted future use best in least squares.

    Args:
        traces: of one checkpoint; their decode tokens count. Futures end with their sequences, histories
            go on over them, as a policy's do.
        gamma: discount per token; about what an expert's stay in the cache is long.
        ridge: how much evidence it takes to leave the coefficients that are the same for every model.
        layers_before: how many layers' choices are looked at beside the layer's own.
        on_progress: called with (layers done, layers in all).

    Raises:
        ConfigError: no decode token, or traces of different shapes.
    """
    traces = [trace.decode_only() for trace in traces]
    shapes = {(trace.layers, trace.num_experts) for trace in traces}
    if len(shapes) != 1 or not sum(trace.num_tokens for trace in traces):
        raise ConfigError("a fit takes traces of one checkpoint, with decode tokens in them")
    layers, num_experts = shapes.pop()
    num_before = min(layers_before, len(layers) - 1)
    chosen = [_one_hot(trace) for trace in traces]
    prior = _generic(num_experts, num_before)
    weights = []
    for position in range(len(layers)):
        inputs = [_inputs(used, position, num_before) for used in chosen]
        targets = [
            _future_use(used[:, position], trace.seq_len, gamma)
            for used, trace in zip(chosen, traces, strict=True)
        ]
        weights.append(_ridge(inputs, targets, ridge, prior))
        if on_progress is not None:
            on_progress(position + 1, len(layers))
    table = np.stack(weights)  # (L, rates * E + N * E + 1, E)
    own_rows = len(RATES) * num_experts
    own = table[:, :own_rows].reshape(len(layers), len(RATES), num_experts, num_experts)
    before = table[:, own_rows:-1].reshape(len(layers), num_before, num_experts, num_experts)
    digests = tuple(digest for trace in traces for digest in sequence_digests(trace))
    return HorizonFit(layers, own.transpose(0, 2, 1, 3), before, table[:, -1], digests, traces[0].model)


def _one_hot(trace: RoutingTrace) -> NDArray[np.uint8]:
    """(T, L, E)"""
    used = np.zeros((trace.num_tokens, len(trace.layers), trace.num_experts), np.uint8)
    np.put_along_axis(used, trace.experts.astype(np.intp), 1, axis=2)
    return used


def _inputs(used: NDArray[np.uint8], position: int, num_before: int) -> Float32Array:
    """Return (T, rates * E + N * E + 1): the layer's frequencies, the choices before it, and a one."""
    num_tokens, num_layers, num_experts = used.shape
    columns = [_decayed(used[:, position], rate) for rate in RATES]
    for n in range(num_before):
        before = used[:, (position - 1 - n) % num_layers].astype(np.float32)
        if position - 1 - n < 0:  # a later layer: what it chose for the token before
            before = np.concatenate([np.zeros((1, num_experts), np.float32), before[:-1]])
        columns.append(before)
    return np.concatenate([*columns, np.ones((num_tokens, 1), np.float32)], axis=1)


def _decayed(used: NDArray[np.uint8], rate: float) -> Float32Array:
    if rate == 1.0:
        return used.astype(np.float32)
    result = np.empty(used.shape, np.float32)
    frequency = np.zeros(used.shape[1], np.float32)
    for token in range(len(used)):
        frequency *= 1.0 - rate
        frequency += rate * used[token]
        result[token] = frequency
    return result


def _future_use(used: NDArray[np.uint8], seq_len: NDArray[np.int32], gamma: float) -> Float32Array:
    """Return (T, E): discounted uses after each token, within its sequence."""
    result = np.zeros(used.shape, np.float32)
    end = len(used)
    for length in reversed(seq_len.tolist()):
        for token in range(end - 2, end - length - 1, -1):
            result[token] = used[token + 1] + gamma * result[token + 1]
        end -= length
    return result


def _generic(num_experts: int, num_before: int) -> Any:
    """Return the coefficients that are the same for every model, in the shape of a layer's fit."""
    own = [coefficient * np.eye(num_experts) for coefficient in GENERIC_COEFFICIENTS]
    return np.concatenate([*own, np.zeros((num_before * num_experts + 1, num_experts))])


def _ridge(inputs: Sequence[Float32Array], targets: Sequence[Float32Array], ridge: float, prior: Any) -> Any:
    """Return the W of the least ``|Y - X W|^2 + ridge * |W - prior|^2``."""
    gram: Any = np.zeros((inputs[0].shape[1],) * 2)
    moment: Any = np.zeros((inputs[0].shape[1], targets[0].shape[1]))
    for x, y in zip(inputs, targets, strict=True):
        for start in range(0, len(x), CHUNK_TOKENS):
            part = x[start : start + CHUNK_TOKENS]
            gram += part.T @ part
            moment += part.T @ y[start : start + CHUNK_TOKENS]
    gram[np.diag_indices_from(gram)] += ridge
    return np.linalg.solve(gram, moment + ridge * prior).astype(np.float32)
