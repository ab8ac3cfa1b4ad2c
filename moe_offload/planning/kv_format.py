"""What a cached key or value takes: numbers of the model's dtype, or blocks of fewer bits where asked.

``kv="q8_0"`` keeps ggml's Q8_0 blocks: 32 signed bytes and one half-precision scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_offload.config import ModelSpec
from moe_offload.errors import ConfigError

KV_FORMATS = ("q8_0",)
KV_BLOCK_ELEMENTS, KV_BLOCK_BYTES = 32, 34
FLOAT32_BYTES = 4
# What q8_0 cost where it was measured (bench/perplexity.py, docs/LOG.md 2026-11-21): the bundled model, and
# another as small.
KV_PRICE = "0.007 and 0.015% of perplexity on two small models"
HYBRID_CACHE_FAMILIES = {"inkling_text", "zaya"}  # layers that transformers alone knows how to cache
# A head's row in the cache, by its names in the configurations of families without a latent.
HEAD_DIMS = ("head_dim", "v_head_dim", "global_head_dim", "swa_head_dim", "swa_v_head_dim")


def cached_bytes(elements: int, *, bytes_per_element: int, kv: str | None) -> int:
    """Return what ``elements`` cached numbers take; a multiple of the block where ``kv`` packs them."""
    if kv is None:
        return elements * bytes_per_element
    return -(-elements // KV_BLOCK_ELEMENTS) * KV_BLOCK_BYTES


def unpacked_kv_bytes(spec: ModelSpec, *, context_tokens: int, bytes_per_element: int, kv: str | None) -> int:
    """Return what transformers' attention gets of packed keys and values: those of one layer, unpacked.

    A dtype of 16 bits is rounded from float32: keys are done when the values are on the way.
    """
    if kv is None:
        return 0
    rounding = FLOAT32_BYTES // 2 if bytes_per_element < FLOAT32_BYTES else 0
    return max(spec.kv_elements_per_token, default=0) * context_tokens * (bytes_per_element + rounding)


def cached_widths(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the lengths of the rows that a token leaves in the cache, by their names in the config."""
    if config.get("kv_lora_rank"):
        return {name: int(config[name]) for name in ("kv_lora_rank", "qk_rope_head_dim")}
    default = int(config["hidden_size"]) // int(config["num_attention_heads"])
    named = {name: int(config[name]) for name in HEAD_DIMS if config.get(name)}
    return {"head_dim": default} | named


def check_kv(config: Mapping[str, Any], kv: str | None, where: str) -> None:
    """Refuse a format that is not known, or rows that cannot be cut into its blocks.

    Raises:
        ConfigError: names the row and its length.
    """
    if kv is None:
        return
    if kv not in KV_FORMATS:
        raise ConfigError(f"kv={kv!r} is not known; known are {', '.join(KV_FORMATS)}, or nothing")
    if config.get("model_type") in HYBRID_CACHE_FAMILIES:
        raise ConfigError(
            f"kv={kv!r} is not possible for {where}: the layers of model_type {config['model_type']!r} keep "
            "a state beside keys and values; load it without kv, or with a smaller context"
        )
    for name, width in cached_widths(config).items():
        if width % KV_BLOCK_ELEMENTS:
            raise ConfigError(
                f"kv={kv!r} packs cached rows in blocks of {KV_BLOCK_ELEMENTS} numbers, and {where} has "
                f"{name}={width}, which is no multiple of it; load it without kv, or with a smaller context"
            )
