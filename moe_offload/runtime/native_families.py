"""Which models decode through the native step, and why another one does not. Imports no torch.

The choice rests on the family and its configuration alone, never on budget, policy or predictor, so
it cannot make two placements differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# model_type: how a layer's router weighs the chosen experts; None in families without experts.
#   "all"            softmax over all experts, normalised where norm_topk_prob says so
#   "all_normalized" the same, always normalised
#   "chosen"         softmax over the chosen logits
NATIVE_FAMILIES: dict[str, str | None] = {
    "qwen3_moe": "all",
    "olmoe": "all",
    "mixtral": "all_normalized",
    "gpt_oss": "chosen",
    "llama": None,
    "mistral": None,
    "qwen2": None,
    "qwen3": None,
}
# Rotary positions whose angles do not depend on the sequence's length.
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
WINDOW_OF_CONFIG = ("mixtral", "mistral")  # config.sliding_window holds for every layer


def native_step_reason(config: Mapping[str, Any]) -> str | None:
    """Return why a model's decode steps run transformers' layers; None when they run natively.

    Args:
        config: the checkpoint's, as in config.json, with ``model_type``.
    """
    model_type = config.get("model_type")
    if model_type not in NATIVE_FAMILIES:
        return f"the native decode step does not know model_type {model_type!r}"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in FIXED_ROPE_TYPES:
        return f"rotary positions of type {rope_type!r} change with the sequence's length"
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if head_dim % 8:
        return f"a head has {head_dim} dimensions, which is not a multiple of 8"
    return None
