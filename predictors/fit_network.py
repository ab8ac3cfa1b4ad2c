"""Train the learned predictor of one layer: a hidden layer beside the ridge regression's matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, from_numpy
from torch.nn import functional

from moe_offload.predictors.history import Float32Array
from moe_offload.predictors.learned import export_onnx

HIDDEN_UNITS, EPOCHS, BATCH_TOKENS = 192, 10, 512
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS = 3e-3, 0.05, 50


def fit_network(
    features: Float32Array,
    linear: Float32Array,
    targets: Sequence[Float32Array],
    *,
    seed: int,
    hidden_units: int = HIDDEN_UNITS,
    epochs: int = EPOCHS,
) -> tuple[bytes, Callable[[Float32Array], Float32Array]]:
    """Return the network as ONNX, and a function that runs it: (n, F) -> (n, N).

    It is trained to have the true routers' softmax (cross entropy), which asks most where a choice is
    decided. Aiming at the chosen set itself was worse than the regression that it starts from.

    Args:
        features: (T, F).
        linear: (F, N), where the scores start; it stays as it is.
        targets: the true scores (T, E) of each later layer; N is the sum of their E.
    """
    generator = torch.Generator().manual_seed(seed)
    x, straight = from_numpy(features), from_numpy(features @ linear)
    wanted = [_distribution(from_numpy(target)) for target in targets]
    scale = 1.0 / x.square().mean(dim=0).sum().sqrt()  # so that units start at a size of about 1
    hidden = (torch.randn(x.shape[1], hidden_units, generator=generator) * scale).requires_grad_()
    output = torch.zeros(hidden_units, linear.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW(
        [hidden, output], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98)
    )
    batches = max(1, len(x) // BATCH_TOKENS)
    for step in range(epochs * batches):
        if step % batches == 0:
            order = torch.randperm(len(x), generator=generator)
        chosen = order[(step % batches) * BATCH_TOKENS : (step % batches + 1) * BATCH_TOKENS]
        rate = min(1.0, (step + 1) / WARMUP_STEPS) * (1.0 - step / (epochs * batches))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        scores = straight[chosen] + functional.silu(x[chosen] @ hidden) @ output
        loss = _cross_entropy(scores, [each[chosen] for each in wanted])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    w, v = hidden.detach().numpy(), output.detach().numpy()

    def run(rows: Float32Array) -> Float32Array:
        with torch.no_grad():
            units = functional.silu(from_numpy(rows @ w))
            result: Float32Array = rows @ linear + (units @ output).numpy()
        return result

    return export_onnx(linear, w, v, num_features=x.shape[1]), run


def _distribution(scores: Tensor) -> Tensor:
    """Return softmax over experts, flatter scores (sigmoids) stretched to a spread of 1."""
    return (scores / min(1.0, float(scores.std()))).softmax(dim=-1)


def _cross_entropy(scores: Tensor, wanted: Sequence[Tensor]) -> Tensor:
    parts = torch.split(scores, [each.shape[1] for each in wanted], dim=1)
    losses = [
        -(each * functional.log_softmax(part, dim=1)).sum(dim=1).mean()
        for part, each in zip(parts, wanted, strict=True)
    ]
    return torch.stack(losses).sum()
