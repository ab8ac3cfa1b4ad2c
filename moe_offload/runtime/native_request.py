"""Which forwards native code computes, instead of transformers' layers.

By shapes and by what is asked for, never by placement: one sequence, our key/value cache with room, nothing
masked, no output but logits, no hooks, no replaced module.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from moe_offload._native import are_as_noted, are_empty
from moe_offload.runtime.kv_cache import KVCache
from moe_offload.runtime.packed_kv import layer_class
from moe_offload.runtime.transformers_code import LayerCode

SERVED_KEYS = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep",
    "cache_position", "return_dict",
}  # fmt: skip
OUTPUT_FLAGS = ("output_attentions", "output_hidden_states", "output_router_logits")
PLAIN_ATTENTION = ("eager", "sdpa")  # another one was asked for by name, and computes something of its own
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
SLEEPING = "transformers.utils.output_capturing"  # once asked for hidden states, its hooks stay for ever
GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)


class ServedForwards:
    """Tells the forwards of ``model`` that go past its modules.

    Args:
        model: loaded. Not kept, only its parts.
        kv: how keys and values are kept (planning.kv_format).
    """

    def __init__(self, model: Any, kv: str | None) -> None:
        self._cache_layer = layer_class(kv)
        self._config, self._dtype = _Config(model.config), model.config.dtype
        layers = model.get_decoder().layers
        rows = model.config.num_key_value_heads, layers[0].self_attn.head_dim
        self._cache_shape = len(layers), rows
        self._parts, self._code = _Parts(model), LayerCode(model)
        self._began_as_loaded = True

    def accepts(self, inputs: dict[str, Any]) -> bool:
        """Whether native code computes this forward."""
        ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        if not isinstance(ids, Tensor) or ids.dtype is not torch.int64 or ids.ndim != 2 or len(ids) != 1:
            return False
        num_tokens = ids.shape[1]
        return (
            num_tokens > 0
            and isinstance(cache, KVCache)
            and cache.make_layer is self._cache_layer
            and cache.is_of(*self._cache_shape)
            and self._config.brought_up_to_date().has_plain_attention
            and self._wants_only_logits(inputs)
            and cache.has_room_for(num_tokens, self._dtype)
            and _sees_all(inputs.get("attention_mask"), cache.get_seq_length() + num_tokens)
            and _are_consecutive(inputs.get("position_ids"), num_tokens)
            and self._parts.are_untouched()
            and self._began_unchanged(cache)
        )

    def _began_unchanged(self, cache: KVCache) -> bool:
        """Whether modules, weights and code were as loaded when the text began: a look at all of them at
        each token would cost what a layer does."""
        if cache.get_seq_length() == 0:
            self._began_as_loaded = self._parts.are_as_loaded() and self._code.is_transformers_own()
        return self._began_as_loaded

    def _wants_only_logits(self, inputs: dict[str, Any]) -> bool:
        for key, value in inputs.items():
            if key not in SERVED_KEYS and value is not None and value is not False:
                return False
        use_cache, kept = inputs.get("use_cache"), inputs.get("logits_to_keep", 0)
        return (
            bool(self._config.uses_cache if use_cache is None else use_cache)
            and inputs.get("return_dict") is not False
            and isinstance(kept, int)
            and kept >= 0  # of a negative number transformers leaves out the first ones
            and not self._config.wants_more
        )


class _Config:
    """What of a model's configuration decides here; to ask for an attribute takes transformers microseconds.

    Attributes:
        has_plain_attention: no other one was chosen by name.
        uses_cache: unless a forward says otherwise.
        wants_more: than logits.
    """

    def __init__(self, config: Any) -> None:
        self._config, self._values = config, vars(config)
        self._look()

    def brought_up_to_date(self) -> _Config:
        """Look again where any of its values was changed since; returns itself."""
        if self._values != self._seen:
            self._look()
        return self

    def _look(self) -> None:
        self._seen = dict(self._values)
        self.has_plain_attention: bool = self._config._attn_implementation in PLAIN_ATTENTION
        self.uses_cache: bool = self._config.use_cache
        self.wants_more = any(getattr(self._config, flag, False) for flag in OUTPUT_FLAGS)


class _Parts:
    """The modules, parameters and hooks that native code goes past: all must be as they were."""

    def __init__(self, model: Any) -> None:
        modules: list[nn.Module] = [module for module in model.modules() if module is not model]
        registries: list[dict[str, Any]] = [model._modules]
        registries += [registry for m in modules for registry in (m._modules, m._parameters)]
        places = [(registry, name) for registry in registries for name in registry]
        self._registries, self._names = [registry for registry, _ in places], [name for _, name in places]
        self._contents = [registry[name] for registry, name in places]
        self._weights = [part for part in self._contents if isinstance(part, Tensor)]
        self._attributes = [vars(module) for module in modules]
        self._addresses, self._settings = self._current_addresses(), self._current_settings()
        self._hooks = [*GLOBAL_HOOKS, *(getattr(module, name) for module in modules for name in HOOKS)]

    def are_untouched(self) -> bool:
        """Whether no module or parameter was replaced and no hook waits for a forward."""
        if not are_empty(self._hooks) and not self._hooks_sleep():
            return False
        return are_as_noted(self._registries, self._names, self._contents)

    def _hooks_sleep(self) -> bool:
        """Whether all hooks are transformers' own, which wake where more than logits is asked for."""
        return all(hook.__module__ == SLEEPING for hooks in self._hooks for hook in hooks.values())

    def are_as_loaded(self) -> bool:
        """Whether no module has a ``forward`` or setting of its own now, no parameter other memory."""
        settings = self._current_settings()
        return (
            self._current_addresses() == self._addresses
            and len(settings) == len(self._settings)
            and all(map(operator.is_, settings, self._settings))
        )

    def _current_addresses(self) -> list[int]:
        return [weight.data_ptr() for weight in self._weights]

    def _current_settings(self) -> list[Any]:
        return [value for names in self._attributes for name, value in names.items() if name[0] != "_"]


def _sees_all(mask: Any, num_tokens: int) -> bool:
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.shape == (1, num_tokens) and bool(mask.all())


def _are_consecutive(position_ids: Any, num_tokens: int) -> bool:
    """Whether positions count up by one: others would hide tokens from each other (packed sequences)."""
    if position_ids is None:
        return True
    if not isinstance(position_ids, Tensor) or position_ids.numel() != num_tokens:
        return False
    return num_tokens == 1 or bool((position_ids.diff() == 1).all())
