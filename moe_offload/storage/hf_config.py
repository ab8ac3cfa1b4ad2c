"""config.json → ModelSpec: aliases resolved, absent keys replaced by transformers' defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_offload.config import ModelSpec
from moe_offload.storage.config_view import MAX_CONTEXT as MAX_CONTEXT
from moe_offload.storage.config_view import MAX_EXPERTS as MAX_EXPERTS
from moe_offload.storage.config_view import MAX_LAYERS as MAX_LAYERS
from moe_offload.storage.config_view import MAX_VOCAB as MAX_VOCAB
from moe_offload.storage.config_view import ConfigView as ConfigView
from moe_offload.storage.families import DENSE_FAMILIES as DENSE_FAMILIES
from moe_offload.storage.families import MOE_FAMILIES as MOE_FAMILIES
from moe_offload.storage.families import find_family

# What a multimodal folder's outer config says of its text model, too.
_SHARED_WITH_TEXT = (
    "tie_word_embeddings", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id",
    "quantization_config",
)  # fmt: skip


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that describes the language model: all of it, or text_config."""
    config = _with_special_floats(config)
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    outer = {name: config[name] for name in _SHARED_WITH_TEXT if config.get(name) is not None}
    return {
        **outer,
        **{name: value for name, value in text.items() if value is not None or name not in outer},
    }


def _with_special_floats(value: Any) -> Any:
    """transformers writes infinities and NaN as ``{"__float__": "Infinity"}``, since JSON has none."""
    if isinstance(value, Mapping):
        special = value.get("__float__")
        if len(value) == 1 and special in ("Infinity", "-Infinity", "NaN"):
            return float(special)
        return {name: _with_special_floats(item) for name, item in value.items()}
    return [_with_special_floats(item) for item in value] if isinstance(value, list) else value


def model_spec(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Return the shape that ``config`` (a config.json object, read from ``where``) describes.

    Raises:
        CheckpointError: unknown model_type, a quantized checkpoint, or a number missing or out of range.
    """
    config = text_config(config)
    model_type = config.get("model_type")
    family = find_family(model_type, where)
    view = ConfigView(config, family.defaults, where)
    num_layers = view.integer("num_hidden_layers", high=MAX_LAYERS)
    num_experts, top_k, intermediate_size = 0, 0, 0
    moe_layers = family.moe_layers(view, num_layers) if family.experts_names else ()
    if moe_layers:
        num_experts = view.integer(*family.experts_names, low=0, high=MAX_EXPERTS)
    if num_experts:
        top_k = view.integer(*family.top_k_names, high=num_experts)
        intermediate_size = 0 if family.found_in_file else view.integer(family.intermediate_name)
    return ModelSpec(
        model_type=str(model_type),
        hidden_size=view.integer("hidden_size"),
        num_hidden_layers=num_layers,
        vocab_size=view.integer("vocab_size", high=MAX_VOCAB),
        max_position_embeddings=_max_position_embeddings(view),
        num_experts=num_experts,
        top_k=top_k,
        moe_intermediate_size=intermediate_size,
        moe_layers=moe_layers if num_experts else (),
        kv_elements_per_token=family.kv_elements(view, num_layers),
        state_elements_per_sequence=family.state_elements(view, num_layers),
    )


def _max_position_embeddings(view: ConfigView) -> int:
    """Return the longest context; Kimi's and Bailing's hybrid configurations call it model_max_length."""
    if view.config.get("max_position_embeddings") is None and "model_max_length" in view.config:
        return view.integer("model_max_length", high=MAX_CONTEXT)
    return view.integer("max_position_embeddings", high=MAX_CONTEXT)


def next_token_layers(config: Mapping[str, Any], where: str) -> int:
    """Return how many layers after the decoder's own predict further tokens."""
    family = find_family(config.get("model_type"), where)
    view = ConfigView(config, {}, where)
    stated = view.optional("num_nextn_predict_layers", "mtp_num_hidden_layers", low=0, high=MAX_LAYERS)
    return family.next_token_layers if stated is None else stated
