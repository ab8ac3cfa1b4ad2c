"""Checked access to a configuration: each value is in range, or a CheckpointError that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_offload.errors import CheckpointError

MAX_LAYERS, MAX_EXPERTS, MAX_WIDTH, MAX_VOCAB, MAX_CONTEXT = 4096, 1 << 16, 1 << 22, 1 << 24, 1 << 31

LEGACY_LAYER_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}


class ConfigView:
    """A configuration, read from ``where``, with transformers' ``defaults`` for absent keys."""

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

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.config.get(name, default)
        if type(value) is not bool:
            raise CheckpointError(f"{self.where}: {name} must be true or false, found {value!r:.80}")
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

    def names(self, name: str, count: int, *aliases: str) -> tuple[str, ...] | None:
        """Return a list of ``count`` words, one for each layer; None when it is absent."""
        values: Any = next((v for key in (name, *aliases) if (v := self.config.get(key)) is not None), None)
        if values is None:
            return None
        if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) for value in values):
            raise CheckpointError(f"{self.where}: {name} must be a list of words, found {values!r:.80}")
        if len(values) != count:
            raise CheckpointError(
                f"{self.where}: {name} has {len(values)} entries, but there are {count} layers"
            )
        return tuple(LEGACY_LAYER_TYPES.get(str(value), str(value)) for value in values)

    def of_layer(self, layer_idx: int) -> ConfigView:
        """Return the view of one layer: ``per_layer_config`` (gemma4) overrides the common values."""
        per_layer = self.config.get("per_layer_config") or {}
        if not isinstance(per_layer, Mapping) or not all(str(key).isdecimal() for key in per_layer):
            raise CheckpointError(
                f"{self.where}: per_layer_config must map layer indices to objects, found {per_layer!r:.80}"
            )
        own = next((value for key, value in per_layer.items() if int(key) == layer_idx), None)
        if own is None:
            return self
        if not isinstance(own, Mapping):
            raise CheckpointError(f"{self.where}: per_layer_config[{layer_idx}] must be an object")
        return ConfigView({**self.config, **own}, self.defaults, self.where)
