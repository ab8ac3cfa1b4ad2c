"""Make HorizonPolicy's coefficients from traces: ridge regression, layer by layer, in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
    prior = _generic(num_experts, num_before)
    table = np.empty((len(layers), *prior.shape), np.float32)  # (L, rates * E + N * E + 1, E)
    for position in range(len(layers)):
        parts = (part for trace in traces for part in _parts(trace, position, num_before, gamma))
        table[position] = _ridge(parts, ridge, prior)
        if on_progress is not None:
            on_progress(position + 1, len(layers))
    own_rows = len(RATES) * num_experts
    own = table[:, :own_rows].reshape(len(layers), len(RATES), num_experts, num_experts)
    before = table[:, own_rows:-1].reshape(len(layers), num_before, num_experts, num_experts)
    digests = tuple(digest for trace in traces for digest in sequence_digests(trace))
    return HorizonFit(layers, own.transpose(0, 2, 1, 3), before, table[:, -1], digests, traces[0].model)


def _parts(
    trace: RoutingTrace, position: int, num_before: int, gamma: float
) -> Iterator[tuple[Float32Array, Float32Array]]:
    """Yield (inputs, future use) of CHUNK_TOKENS at a time: all of them at once are as large as a model."""
    experts, num_experts = trace.experts, trace.num_experts
    targets = _future_use(_one_hot(experts[:, position], num_experts), trace.seq_len, gamma)
    frequencies = np.zeros((len(RATES), num_experts), np.float32)
    for start in range(0, len(experts), CHUNK_TOKENS):
        end = min(start + CHUNK_TOKENS, len(experts))
        yield _inputs(experts, num_experts, position, num_before, start, end, frequencies), targets[start:end]


def _one_hot(experts: NDArray[Any], num_experts: int) -> NDArray[np.uint8]:
    """Return (T, E) of (T, K)."""
    used = np.zeros((len(experts), num_experts), np.uint8)
    np.put_along_axis(used, experts.astype(np.intp), 1, axis=1)
    return used


def _inputs(
    experts: NDArray[Any],
    num_experts: int,
    position: int,
    num_before: int,
    start: int,
    end: int,
    frequencies: Float32Array,
) -> Float32Array:
    """Return (end - start, rates * E + N * E + 1): a layer's frequencies, the choices before it, and a one.

    Args:
        experts: (T, L, K) of the whole trace.
        frequencies: (rates, E) by ``start``; left as they are by ``end``.
    """
    inputs = np.zeros((end - start, (len(RATES) + num_before) * num_experts + 1), np.float32)
    groups = inputs[:, :-1].reshape(end - start, -1, num_experts)
    used = _one_hot(experts[start:end, position], num_experts)
    for number, rate in enumerate(RATES):
        _decay(used, rate, frequencies[number], groups[:, number])
    for n in range(num_before):
        layer = position - 1 - n
        first = 0
        if layer < 0:  # a later layer: what it chose for the token before
            first = 1 if start == 0 else 0
            chosen = experts[start - 1 + first : end - 1, layer % experts.shape[1]]
        else:
            chosen = experts[start:end, layer]
        groups[first:, len(RATES) + n] = _one_hot(chosen, num_experts)
    inputs[:, -1] = 1.0
    return inputs


def _decay(used: NDArray[np.uint8], rate: float, frequency: Float32Array, result: Float32Array) -> None:
    """Bring (E,) ``frequency`` from token to token of (T, E) ``used``, each time into ``result``."""
    if rate == 1.0:
        result[:] = used
        return
    for token in range(len(used)):
        frequency *= 1.0 - rate
        frequency += rate * used[token]
        result[token] = frequency


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


def _ridge(parts: Iterable[tuple[Float32Array, Float32Array]], ridge: float, prior: Any) -> Any:
    """Return the W of the least ``|Y - X W|^2 + ridge * |W - prior|^2`` over (X, Y) parts."""
    gram: Any = np.zeros((len(prior),) * 2)
    moment: Any = np.zeros(prior.shape)
    for inputs, targets in parts:
        gram += inputs.T @ inputs
        moment += inputs.T @ targets
    gram[np.diag_indices_from(gram)] += ridge
    return np.linalg.solve(gram, moment + ridge * prior).astype(np.float32)
