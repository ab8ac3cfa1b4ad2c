"""A transformers model without its experts, built on meta; dense_loading.py reads its dense tensors.

These two files hold all private calls into transformers (tested with 5.23; setup.py states the range).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig
from transformers.cache_utils import DynamicCache, get_layer_types_and_kwargs
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.modeling_utils import PreTrainedModel

from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.runtime.dense_tensors import TORCH_DTYPES
from moe_offload.runtime.quant_modules import QuantEmbedding, QuantLinear, ScaledQuantEmbedding
from moe_offload.runtime.routers import router_in
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.expert_format import WeightType
from moe_offload.storage.families import ANY_NAMES, find_family

EXPERTS_IMPLEMENTATION = "moe_offload"
GGML_TYPES = {dtype: ggml_type for ggml_type, dtype in TORCH_DTYPES.items()}

# What transformers merges into one experts parameter: (gate, up) in this order, or down alone.
KNOWN_EXPERT_SOURCES = {("gate_proj", "up_proj"), ("w1", "w3"), ("down_proj",), ("w2",)}

EXPERT_MATRICES = {"gate_up_proj", "gate_proj", "up_proj", "down_proj"}

MEASURED_TOKENS = 5


def build_skeleton(
    checkpoint: Checkpoint, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Build the model on meta, drop the experts' parameters, pack the quantized dense layers.

    Raises:
        CheckpointError: transformers has no causal language model for the configuration.
    """
    config = make_config(checkpoint, dtype)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise CheckpointError(
            f"{checkpoint.path}: transformers has no causal language model for model_type "
            f"{checkpoint.spec.model_type!r}"
        )
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"), _refusals_of_transformers(checkpoint):
        model = model_class._from_config(
            config, dtype=dtype, experts_implementation=EXPERTS_IMPLEMENTATION, **kwargs
        )
    _check_expert_sources(model)
    modules = experts_modules(model)
    _check_shapes(modules, checkpoint)
    for experts in modules.values():
        _drop_expert_weights(experts)
    if checkpoint.source == "gguf" or any(info.scales for info in checkpoint.dense.values()):
        _pack_dense_layers(model, checkpoint, dtype)
    return model


def make_config(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Return the transformers configuration object of the checkpoint."""
    values = dict(checkpoint.config)
    model_type = values.pop("model_type")
    values.pop("quantization_config", None)  # the blocks are read as they are, by us
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"{checkpoint.path}: transformers does not know model_type {model_type!r}")
    with _refusals_of_transformers(checkpoint):
        config = CONFIG_MAPPING[model_type].from_dict({**values, "model_type": model_type})
    config.dtype = dtype
    config.name_or_path = str(checkpoint.path)
    return config


@contextmanager
def _refusals_of_transformers(checkpoint: Checkpoint) -> Iterator[None]:
    """Name the checkpoint where transformers finds fault with its configuration."""
    try:
        yield
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: transformers refuses config.json: {error}") from error


def experts_modules(model: Any) -> dict[int, Any]:
    """Map decoder layer index to its experts module (it has no ``layer_idx`` of its own)."""
    found = {}
    for layer_idx, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed"):
                found[layer_idx] = module
    return found


def measured_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the cache's sizes as a load would find them; reads nothing more."""
    return measure_cache(build_skeleton(checkpoint, torch.float32), checkpoint)


def measure_cache(model: Any, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the cache's sizes as transformers makes it, for a family found by trial.

    Five tokens pass the skeleton while it has no memory: its experts compute nothing, no byte is read.
    """
    if not find_family(checkpoint.spec.model_type, str(checkpoint.path)).found_in_file:
        return checkpoint
    for experts in experts_modules(model).values():
        experts.moe_offload_executor = lambda hidden, ids, weights: torch.empty_like(hidden)
    with torch.device("meta"), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(torch.ones(1, MEASURED_TOKENS, dtype=torch.long), use_cache=True, past_key_values=cache)
    tokens, states = [], []
    for layer in cache.layers:
        held = [value for value in vars(layer).values() if isinstance(value, Tensor)]
        tokens.append(-(-sum(value.numel() for value in held) // MEASURED_TOKENS))
        dicts = [value for value in vars(layer).values() if isinstance(value, dict)]
        found = [state for values in dicts for state in values.values() if isinstance(state, Tensor)]
        states.append(sum(state.numel() for state in found))
    spec = replace(
        checkpoint.spec, kv_elements_per_token=tuple(tokens), state_elements_per_sequence=tuple(states)
    )
    return replace(checkpoint, spec=spec)


def cache_layer_types(model: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return, by layer, transformers' name of what a cache keeps and that cache layer's arguments."""
    kinds, kwargs = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    return list(zip(kinds, kwargs, strict=True))


def router_of(model: Any, layer_idx: int) -> Any:
    """Return the router of a layer as a module that maps (T, H) to (logits, weights, ids).

    Raises:
        CheckpointError: the family's router needs more than its input.
    """
    named = (getattr(model.config, name, None) for name in ANY_NAMES.top_k_names)
    top_k = next((value for value in named if value), 0)
    return router_in(decoder_layers(model)[layer_idx], layer_idx, top_k)


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the decoder's list of layers."""
    layers: nn.ModuleList = model.get_decoder().layers
    return layers


def _check_shapes(modules: dict[int, Any], checkpoint: Checkpoint) -> None:
    """Refuse experts that the model and the checkpoint do not agree on."""
    layouts = checkpoint.experts.layouts
    if modules.keys() != layouts.keys():
        raise CheckpointError(
            f"{checkpoint.path}: the model has experts in layers {sorted(modules)}, the checkpoint in "
            f"{sorted(layouts)}; config.json and the weights are not of one model"
        )
    for layer_idx, experts in modules.items():
        layout, down = layouts[layer_idx], experts.down_proj.shape
        wanted = (layout.num_experts, layout.moe_intermediate_size, layout.hidden_size)
        found = (down[0], *(down[1:] if experts.is_transposed else down[:0:-1]))
        if found != wanted:
            raise CheckpointError(
                f"{checkpoint.path}: layer {layer_idx} has experts of (number, intermediate, hidden size) "
                f"{wanted}, the model {found}"
            )


def _drop_expert_weights(experts: Any) -> None:
    """Keep biases and norms (small, always resident); the matrices stay on disk.

    Without the flag transformers would initialise the module's absent parameters.
    """
    for name in EXPERT_MATRICES & set(experts._parameters):
        experts.register_parameter(name, None)
    experts._is_hf_initialized = True


def _check_expert_sources(model: PreTrainedModel) -> None:
    """Refuse a family whose experts transformers assembles in a way that spans cannot express."""
    for converter in get_model_conversion_mapping(model):
        if not isinstance(converter, WeightConverter) or "experts" not in converter.target_patterns[0]:
            continue
        for operation in converter.operations:
            if not isinstance(operation, (MergeModulelist, Concatenate)):
                raise CheckpointError(
                    f"{model.config.model_type}: expert weights need {type(operation).__name__}, which "
                    "cannot be read in place; supported are per-expert and fused matrices"
                )
        sources = tuple(
            pattern.removesuffix(".weight").split(".")[-1] for pattern in converter.source_patterns
        )
        if sources not in KNOWN_EXPERT_SOURCES:
            raise CheckpointError(f"{model.config.model_type}: unknown expert matrices {', '.join(sources)}")


def _pack_dense_layers(model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Swap Linear and Embedding for packed ones where the file's type is not the compute dtype."""
    tied = model.config.tie_word_embeddings and "lm_head.weight" not in checkpoint.dense
    left = {name for name, info in checkpoint.dense.items() if info.scales is not None}
    for name, module in list(model.named_modules()):
        source_name = "model.embed_tokens.weight" if tied and name == "lm_head" else f"{name}.weight"
        info = checkpoint.dense.get(source_name)
        if info is None or TORCH_DTYPES.get(info.ggml_type) == dtype:
            continue
        if checkpoint.source == "safetensors" and info.scales is None:
            continue
        packed = _packed_module(module, info.ggml_type, dtype)
        if packed is not None:
            packed._is_hf_initialized = True
            parent_name, _, child_name = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child_name, packed)
            left.discard(source_name)
    if left:
        raise CheckpointError(
            f"{checkpoint.path}: {min(left)} is quantized, but no plain linear layer of the model; use an "
            "unquantized checkpoint or a GGUF file of the model"
        )


def _packed_module(module: nn.Module, ggml_type: WeightType, dtype: torch.dtype) -> Any:
    """Return the packed twin of an exact Linear or Embedding on meta, None for anything else."""
    with torch.device("meta"):
        if type(module) is nn.Linear:
            return QuantLinear(module.in_features, module.out_features, ggml_type, module.bias is not None)
        if type(module) is nn.Embedding:
            return QuantEmbedding(module.num_embeddings, module.embedding_dim, ggml_type, dtype)
        if isinstance(module, nn.Embedding) and isinstance(
            scale := getattr(module, "scalar_embed_scale", None), float
        ):
            return ScaledQuantEmbedding(module.num_embeddings, module.embedding_dim, ggml_type, dtype, scale)
    return None


def apply_generation_config(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Set the checkpoint's own generation defaults; compilation is off (experts are not traceable)."""
    if checkpoint.generation_config is not None:
        _check_ends(checkpoint)
        try:
            model.generation_config = GenerationConfig.from_dict(dict(checkpoint.generation_config))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{checkpoint.path}: generation_config cannot be used: {error}") from error
    model.generation_config.disable_compile = True


def _check_ends(checkpoint: Checkpoint) -> None:
    ends = (checkpoint.generation_config or {}).get("eos_token_id")
    if ends is not None and any(type(end) is not int for end in (ends if isinstance(ends, list) else [ends])):
        raise CheckpointError(
            f"{checkpoint.path}: generation_config's eos_token_id is {ends!r:.80}; a token id or a list of "
            "them is wanted: fetch generation_config.json again, or remove it"
        )
