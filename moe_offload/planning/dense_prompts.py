"""Whether a prompt's dense layers run on an accelerator that has their weights.

Pure. Nobody has measured dense layers when a prompt begins, but experts on both sides have been, by their
number of tokens, and a dense matrix is as much work as so many experts with the same weights. Attention is
left out: it is the faster where the products are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_offload.planning.expert_costs import RunningCosts


@dataclass(frozen=True)
class PromptWork:
    """A dense layer for each token of a prompt."""

    num_weights: int  # that meet the token
    link_bytes: int  # its states there and back, its key and value back


@dataclass(frozen=True)
class PromptCosts:
    """Experts of one size, by which dense layers are judged."""

    of_experts: RunningCosts
    expert_weights: int
    expert_bytes: int  # that cross with a copy


def prompt_pays(work: PromptWork, costs: PromptCosts, num_tokens: int) -> bool:
    """Whether ``num_tokens`` tokens finish earlier on the device, their way there and back included."""
    tokens, share = np.array([num_tokens]), work.num_weights / costs.expert_weights
    cpu_s = share * float(costs.of_experts.cpu_s(tokens)[0])
    device_s = share * float(costs.of_experts.gpu_s(tokens)[0])
    link_s = num_tokens * work.link_bytes * costs.of_experts.copy_s / costs.expert_bytes
    return device_s + link_s < cpu_s
