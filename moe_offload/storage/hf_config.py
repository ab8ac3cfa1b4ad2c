"""config.json → ModelSpec: aliases resolved, absent keys replaced by transformers' defaults.

One ``Family`` per model_type says what its configuration class calls things and what it assumes;
a test holds the table equal to the classes of the tested transformers version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_offload.config import ModelSpec
from moe_offload.errors import CheckpointError

MAX_LAYERS, MAX_EXPERTS, MAX_WIDTH, MAX_VOCAB, MAX_CONTEXT = 4096, 1 << 16, 1 << 22, 1 << 24, 1 << 31


class ConfigView:
    """Checked access to a configuration: each value is an int in range or a CheckpointError."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, int | None], where: str) -> None:
        self.config, self.defaults, self.where = config, defaults, where

    def optional(self, *names: str, low: int = 1, high: int = MAX_WIDTH) -> int | None:
        """Return the value under the first of ``names`` (aliases, newest first) or their default."""
        found: dict[str, int] = {
            name: self.config[name] for name in names if self.config.get(name) is not None
        }
        if not found:
            name = names[0]
            return None if any(name in self.config for name in names) else self.defaults.get(name)
        for name, value in found.items():
            if type(value) is not int or not low <= value <= high:
                raise CheckpointError(
                    f"{self.where}: {name} must be an integer from {low} to {high}, found {value!r:.80}"
                )
        if len(set(found.values())) > 1:
            raise CheckpointError(
                f"{self.where}: {found} are names of one number and disagree; keep one of them"
            )
        return next(iter(found.values()))

    def integer(self, *names: str, low: int = 1, high: int = MAX_WIDTH) -> int:
        value = self.optional(*names, low=low, high=high)
        if value is None:
            raise CheckpointError(
                f"{self.where}: {names[0]} is missing; it must be an integer from {low} to {high}"
            )
        return value

    def indices(self, name: str, limit: int) -> frozenset[int]:
        values = self.config.get(name) or ()
        if not isinstance(values, (list, tuple)) or any(
            type(value) is not int or not 0 <= value < limit for value in values
        ):
            raise CheckpointError(
                f"{self.where}: {name} must be a list of layer indices below {limit}, found {values!r:.80}"
            )
        return frozenset(values)


def _all_layers(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    return tuple(range(num_layers))


def _qwen3_moe_layers(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    dense = view.indices("mlp_only_layers", num_layers)
    step = view.integer("decoder_sparse_step")
    return tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0)


def _deepseek_layers(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    return tuple(range(view.integer("first_k_dense_replace", low=0), num_layers))


def _attention_kv(view: ConfigView) -> int:
    """Cached elements of one token in one layer: keys and values of every key-value head."""
    heads = view.integer("num_attention_heads")
    kv_heads = view.optional("num_key_value_heads", high=heads) or heads
    head_dim = view.optional("head_dim") or view.integer("hidden_size") // heads
    if head_dim < 1 or heads % kv_heads:
        raise CheckpointError(
            f"{view.where}: num_attention_heads={heads}, num_key_value_heads={kv_heads} and "
            f"head_dim={head_dim} do not fit together"
        )
    return 2 * kv_heads * head_dim


def _latent_kv(view: ConfigView) -> int:
    """DeepSeek caches the compressed latent and the shared rotary key."""
    return view.integer("kv_lora_rank") + view.integer("qk_rope_head_dim")


@dataclass(frozen=True)
class Family:
    """How one model_type names its numbers, and transformers' defaults for the absent ones."""

    defaults: Mapping[str, int | None]
    experts_names: tuple[str, ...] = ()  # empty for a dense family
    intermediate_name: str = "moe_intermediate_size"
    moe_layers: Callable[[ConfigView, int], tuple[int, ...]] = _all_layers
    kv_elements: Callable[[ConfigView], int] = _attention_kv


def _defaults(layers: int, hidden: int, heads: int, kv_heads: int | None, vocab: int, context: int,
              **others: int) -> dict[str, int | None]:  # fmt: skip
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": context, **others,
    }  # fmt: skip


MOE_FAMILIES = {
    "qwen3_moe": Family(
        _defaults(24, 2048, 32, 4, 151936, 32768, num_local_experts=128, num_experts_per_tok=8,
                  moe_intermediate_size=768, decoder_sparse_step=1),
        experts_names=("num_local_experts", "num_experts"),
        moe_layers=_qwen3_moe_layers,
    ),
    "mixtral": Family(
        _defaults(32, 4096, 32, 8, 32000, 131072, num_local_experts=8, num_experts_per_tok=2,
                  intermediate_size=14336),
        experts_names=("num_local_experts", "num_experts"),
        intermediate_name="intermediate_size",
    ),
    "olmoe": Family(
        _defaults(16, 2048, 16, None, 50304, 4096, num_experts=64, num_experts_per_tok=8,
                  intermediate_size=2048),
        experts_names=("num_experts", "num_local_experts"),
        intermediate_name="intermediate_size",
    ),
    "deepseek_v2": Family(
        _defaults(32, 4096, 32, None, 102400, 2048, n_routed_experts=64, moe_intermediate_size=1407,
                  first_k_dense_replace=0, kv_lora_rank=512, qk_rope_head_dim=64),
        experts_names=("n_routed_experts", "num_experts"),
        moe_layers=_deepseek_layers,
        kv_elements=_latent_kv,
    ),
    "gpt_oss": Family(
        _defaults(36, 2880, 64, 8, 201088, 131072, num_local_experts=128, num_experts_per_tok=4,
                  intermediate_size=2880, head_dim=64),
        experts_names=("num_local_experts", "num_experts"),
        intermediate_name="intermediate_size",
    ),
}  # fmt: skip
DENSE_FAMILIES = {
    "llama": Family(_defaults(32, 4096, 32, None, 32000, 2048)),
    "mistral": Family(_defaults(32, 4096, 32, 8, 32000, 131072)),
    "qwen2": Family(_defaults(32, 4096, 32, 32, 151936, 32768)),
    "qwen3": Family(_defaults(32, 4096, 32, 32, 151936, 32768, head_dim=128)),
}


def model_spec(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Return the shape that ``config`` (a config.json object, read from ``where``) describes.

    Raises:
        CheckpointError: unknown model_type, a quantized checkpoint, or a number missing or out of range.
    """
    refuse_quantization(config, where)
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = text
        refuse_quantization(config, where)
    model_type = config.get("model_type")
    family = find_family(model_type, where)
    view = ConfigView(config, family.defaults, where)
    num_layers = view.integer("num_hidden_layers", high=MAX_LAYERS)
    num_experts, top_k, intermediate_size, moe_layers = 0, 0, 0, tuple[int, ...]()
    if family.experts_names:
        num_experts = view.integer(*family.experts_names, low=0, high=MAX_EXPERTS)
        moe_layers = family.moe_layers(view, num_layers) if num_experts else ()
    if moe_layers:
        top_k = view.integer("num_experts_per_tok", high=num_experts)
        intermediate_size = view.integer(family.intermediate_name)
    return ModelSpec(
        model_type=str(model_type),
        hidden_size=view.integer("hidden_size"),
        num_hidden_layers=num_layers,
        vocab_size=view.integer("vocab_size", high=MAX_VOCAB),
        max_position_embeddings=view.integer("max_position_embeddings", high=MAX_CONTEXT),
        num_experts=num_experts if moe_layers else 0,
        top_k=top_k,
        moe_intermediate_size=intermediate_size,
        moe_layers=moe_layers,
        kv_elements_per_token=(family.kv_elements(view),) * num_layers,
    )


def find_family(model_type: object, where: str) -> Family:
    """Return the family of a ``model_type``; an unknown one is refused with the known names."""
    known = {**MOE_FAMILIES, **DENSE_FAMILIES}
    if not isinstance(model_type, str) or model_type not in known:
        raise CheckpointError(
            f"{where}: model_type {model_type!r:.80} is not supported; supported are "
            f"{', '.join(MOE_FAMILIES)} and, with allow_dense=True, {', '.join(DENSE_FAMILIES)}"
        )
    return known[model_type]


def refuse_quantization(config: Mapping[str, Any], where: str) -> None:
    """safetensors weights must be F32, F16 or BF16; other methods are refused by their name."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    remedy = "use the unquantized (bf16) checkpoint, or a GGUF file of the model"
    if method == "mxfp4":
        remedy = "save the model once as bf16 with Mxfp4Config(dequantize=True) and open that folder"
    raise CheckpointError(
        f"{where}: the weights are quantized with {method!r:.80}, which is not supported from safetensors "
        f"yet; F32, F16 and BF16 are: {remedy}"
    )
