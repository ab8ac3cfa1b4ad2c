"""Which dense layers of a transformers model ``quant=`` packs, and the model with those layers packed.

Experts are known from the checkpoint alone. For the rest the model has to be asked what is a Linear or
an Embedding: a name in a file says nothing of how the family uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key
from transformers.modeling_utils import PreTrainedModel

from moe_offload.config import gib
from moe_offload.errors import BudgetError
from moe_offload.runtime import skeleton
from moe_offload.runtime.loaded_models import base_bytes
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.quantize import default_threads
from moe_offload.storage.quantize_file import workspace_bytes
from moe_offload.storage.quantize_plan import QuantPlan, plan_quantization

# A router's last digits decide which experts run; it stays in float, as do layers with few outputs
# (gates, decay rates of recurrent layers): they are small and everything hangs on them.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_THIN_SHARE = 16  # few: less than a sixteenth of the inputs


@dataclass(frozen=True)
class PackableLayer:
    """A dense tensor of the checkpoint and the modules that use it, more than one when they are tied."""

    modules: tuple[str, ...]
    is_output: bool


def make_plan(model: PreTrainedModel, checkpoint: Checkpoint, quant: str) -> QuantPlan:
    """Return what ``quant`` makes of the checkpoint whose skeleton is ``model``; reads no weight."""
    layers = packable_layers(model, checkpoint)
    return plan_quantization(checkpoint, quant, {name: layer.is_output for name, layer in layers.items()})


def packable_layers(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, PackableLayer]:
    """Map names of dense tensors to the layers that they become, where those can hold packed blocks."""
    modules = dict(model.named_modules())
    embedding, output = (
        _name_of(model, model.get_input_embeddings()),
        _name_of(model, model.get_output_embeddings()),
    )
    tied = bool(model.config.tie_word_embeddings)
    found = {}
    for name, parameter in _renamed(model, checkpoint).items():
        module_name = parameter.removesuffix(".weight")
        module: Any = modules.get(module_name)
        if type(module) not in (nn.Linear, nn.Embedding) or module_name == parameter:
            continue
        if checkpoint.dense[name].shape != tuple(module.weight.shape) or _stays_float(module_name, module):
            continue
        is_shared = tied and module_name in (embedding, output)
        names = (embedding, output) if is_shared else (module_name,)
        found[name] = PackableLayer(tuple(filter(None, names)), is_shared or module_name == output)
    return found


def pack_layers(model: PreTrainedModel, checkpoint: Checkpoint, quantized: Checkpoint) -> None:
    """Give the skeleton of ``checkpoint`` packed layers where ``quantized`` has packed tensors."""
    for name, layer in packable_layers(model, checkpoint).items():
        info = quantized.dense[name]
        for module_name in layer.modules if info.packed else ():
            packed: Any = skeleton._packed_module(
                model.get_submodule(module_name), info.ggml_type, model.config.dtype
            )
            packed._is_hf_initialized = True
            parent_name, _, child_name = module_name.rpartition(".")
            setattr(model.get_submodule(parent_name), child_name, packed)


def threads_within(plan: QuantPlan, ram_bytes: int) -> int:
    """Return how many threads may quantize inside the budget.

    Raises:
        BudgetError: not even one may.
    """
    held_bytes = base_bytes()
    num_threads = default_threads()
    while num_threads > 1 and held_bytes + workspace_bytes(plan, num_threads) > ram_bytes:
        num_threads -= 1
    needed_bytes = held_bytes + workspace_bytes(plan, num_threads)
    if needed_bytes > ram_bytes:
        raise BudgetError(
            f"ram={gib(ram_bytes)} is too little to quantize {plan.source.path} to {plan.quant}: "
            f"{gib(needed_bytes)} are needed, {gib(held_bytes)} of it for the libraries; give ram="
            f"{gib(needed_bytes)} for the first load"
        )
    return num_threads


def _renamed(model: PreTrainedModel, checkpoint: Checkpoint) -> Mapping[str, str]:
    """Map names in the files to parameters of the model, as transformers' loader would.

    Tensors that the loader computes from several, or changes, are left out: blocks cannot follow.
    """
    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    found = {}
    for name in sorted(checkpoint.dense, key=dot_natural_key):
        renamed, converted_by = rename_source_key(name, renamings, converters, prefix, parameters)
        if renamed not in parameters and name in parameters:
            renamed, converted_by = rename_source_key(name, [], [], prefix, parameters)
        if renamed in parameters and converted_by is None:
            found[name] = renamed
    return found


def _stays_float(module_name: str, module: Any) -> bool:
    rows, cols = module.weight.shape
    is_thin = isinstance(module, nn.Linear) and rows * _THIN_SHARE < cols
    return is_thin or not _ROUTERS.isdisjoint(module_name.split("."))


def _name_of(model: PreTrainedModel, wanted: torch.nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)
