"""Routing for a synthetic model: which experts each of its tokens chooses, and weights that do so.

Random routers choose independently from token to token, which makes every cache and predictor look
useless. Here the choices come first: token id t stands for position t of a process (Zipf's popularity,
a Markov chain over tokens) or of a recorded trace. Router rows are random directions, and a token's
embedding is the sum of the directions of the experts that it is to choose in all the layers. Fed with
ids in ascending order the model then routes as the process does; layers' outputs and the directions of
other layers blur it, so what results is to be measured (end_to_end.py prints it), not taken from here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROUTED_TOKENS = 4096  # positions of the process; ids above repeat them
# Chosen so that what the model's routers make of it has about the reuse published for Qwen3-30B-A3B (arXiv
# 2505.16056: SRP of 0.54 over 16 tokens) and between neighbours that of recorded gpt-oss-20b (0.45): measured
# over 512 tokens of 24 layers of that shape are 0.52 and 0.46.
ZIPF_EXPONENT = 0.7
PERSISTENCE = 0.5  # of a chosen expert, from one token to the next
TOPIC_SPREAD = 1.4  # of the logarithm of popularity between topics
TOPIC_TOKENS = 128  # mean length of a topic

Experts = NDArray[np.int64]  # (num_tokens, num_layers, top_k)


def zipf_markov(num_layers: int, num_experts: int, top_k: int, seed: int) -> Experts:
    """Return choices of ROUTED_TOKENS tokens, each layer a chain of its own.

    An expert that was chosen stays with probability PERSISTENCE; the other places are filled by
    popularity, without repetition. Popularity follows Zipf's law, in another order in every layer,
    times a factor that is drawn anew with each topic.
    """
    rng = np.random.default_rng(seed)
    ranks = np.array([1 + rng.permutation(num_experts) for _ in range(num_layers)])
    popularity = -ZIPF_EXPONENT * np.log(ranks)  # (num_layers, num_experts), logarithms
    topic = np.zeros_like(popularity)
    chosen = np.zeros((num_layers, num_experts), bool)
    experts = np.empty((ROUTED_TOKENS, num_layers, top_k), np.int64)
    for token in range(ROUTED_TOKENS):
        if token == 0 or rng.random() < 1 / TOPIC_TOKENS:
            topic = TOPIC_SPREAD * rng.standard_normal(popularity.shape)
        stays = chosen & (rng.random(chosen.shape) < PERSISTENCE)
        # Largest popularity + Gumbel noise: draws without replacement.
        keys = np.where(stays, np.inf, popularity + topic + rng.gumbel(size=chosen.shape))
        experts[token] = np.argpartition(-keys, top_k - 1, axis=1)[:, :top_k]
        chosen[:] = False
        np.put_along_axis(chosen, experts[token], True, axis=1)
    return experts


def from_trace(path: Path, num_layers: int, num_experts: int, top_k: int) -> Experts:
    """Return a recorded trace's choices; its layers and tokens repeat where the model has more.

    Raises:
        SystemExit: the trace's experts are not the model's.
    """
    from moe_offload.trace import read_trace

    trace = read_trace(path)
    if trace.top_k != top_k or trace.num_experts > num_experts:
        raise SystemExit(
            f"{path} has {trace.top_k} of {trace.num_experts} experts a token, but the model {top_k} of "
            f"{num_experts}; ask for a model with --top-k {trace.top_k} --num-experts {trace.num_experts}"
        )
    layers = np.arange(num_layers) % len(trace.layers)
    tokens = np.arange(ROUTED_TOKENS) % trace.num_tokens
    return trace.experts[tokens][:, layers].astype(np.int64)


def independent(num_layers: int, num_experts: int, top_k: int, seed: int) -> Experts:
    """Return uniform choices, independent of one another: the worst case of every cache."""
    rng = np.random.default_rng(seed)
    keys = rng.random((ROUTED_TOKENS, num_layers, num_experts), dtype=np.float32)
    return np.argpartition(keys, top_k - 1, axis=2)[:, :, :top_k]


def adjacent_reuse(experts: Experts) -> float:
    """Return the share of a token's experts that the next token chooses, too."""
    same = experts[1:, :, :, None] == experts[:-1, :, None, :]
    return float(same.any(axis=3).mean())


def router_rows(layer_idx: int, num_experts: int, hidden_size: int, seed: int) -> NDArray[np.float32]:
    """Return (num_experts, hidden_size): a random direction of length 1 for every expert."""
    rng = np.random.default_rng([seed, 1, layer_idx])
    rows = rng.standard_normal((num_experts, hidden_size), dtype=np.float32)
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def embedding_rows(
    experts: Experts, num_experts: int, hidden_size: int, seed: int, spread: float
) -> NDArray[np.float32]:
    """Return (ROUTED_TOKENS, hidden_size) whose elements have the standard deviation ``spread``."""
    num_tokens, num_layers, _ = experts.shape
    total = np.zeros((num_tokens, hidden_size), np.float32)
    for layer_idx in range(num_layers):
        chosen = np.zeros((num_tokens, num_experts), np.float32)
        np.put_along_axis(chosen, experts[:, layer_idx], 1.0, axis=1)
        total += chosen @ router_rows(layer_idx, num_experts, hidden_size, seed)
    scaled: NDArray[np.float32] = total * (spread / total.std())
    return scaled
