"""A transformers experts module in the native kernel's terms: its gating, told by what it computes."""

from __future__ import annotations

from typing import Any

import torch

from moe_offload.errors import CheckpointError
from moe_offload.expert_ops import Activation, ActivationKind, ExpertKernel, activate_reference
from moe_offload.storage.expert_format import ExpertLayout

# Names in a configuration; experts are told by what they compute (activation_of).
ACTIVATION_KINDS = {
    "silu": ActivationKind.SILU,
    "swish": ActivationKind.SILU,
    "gelu": ActivationKind.GELU_ERF,
    "gelu_pytorch_tanh": ActivationKind.GELU_TANH,
    "gelu_new": ActivationKind.GELU_TANH,
    "relu": ActivationKind.RELU,
}
# Gate and up values that tell all activations apart, limits and the tails of GELU included.
PROBES = torch.tensor([-20.0, -9.0, -4.5, -2.5, -1.0, -0.3, 0.0, 0.3, 1.0, 2.5, 4.5, 9.0, 20.0]).double()


def make_kernel(experts: Any, layout: ExpertLayout) -> ExpertKernel:
    """Translate a transformers experts module into the native kernel's terms."""
    bias = [getattr(experts, name, None) for name in ("gate_up_proj_bias", "down_proj_bias")]
    gate_up_bias, down_bias = (None if b is None else b.detach().float().contiguous() for b in bias)
    return ExpertKernel(layout, activation_of(experts), gate_up_bias, down_bias)


def activation_of(experts: Any) -> Activation:
    """Name the gating of an experts module by what it computes on probes.

    Raises:
        CheckpointError: a gating that no kernel computes.
    """
    family = type(experts).__name__
    if not experts.has_gate or experts.has_post_expert_norm:
        what = "normalises what its experts return" if experts.has_gate else "has experts without a gate"
        raise CheckpointError(f"{family} {what}, which no kernel computes")
    gate, up = PROBES.repeat_interleave(len(PROBES)), PROBES.repeat(len(PROBES))
    both = torch.stack([gate, up], dim=-1).flatten() if not experts.is_concatenated else torch.cat([gate, up])
    found = experts._apply_gate(both[None])[0]
    for activation in _candidates(experts):
        if torch.allclose(activate_reference(activation, gate, up), found.double(), rtol=1e-5, atol=1e-6):
            return activation
    known = ", ".join(kind.name for kind in ActivationKind)
    raise CheckpointError(f"{family} gates its experts in a way that no kernel computes; known are {known}")


def _candidates(experts: Any) -> list[Activation]:
    """Return every activation that an experts module may have, its own constants put in."""
    numbers = {
        name: float(getattr(experts, key))
        for name in ("alpha", "limit")
        for key in (name, f"swiglu_{name}")
        if isinstance(getattr(experts, key, None), (int, float))
    }
    return [Activation(kind, **numbers) for kind in ActivationKind]
