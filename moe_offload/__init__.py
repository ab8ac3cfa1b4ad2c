"""Mixture-of-experts inference inside a memory budget. Importing this package imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_offload.errors import BudgetError, CheckpointError, ConfigError

if TYPE_CHECKING:
    from moe_offload.runtime.generate import generate
    from moe_offload.runtime.model import from_pretrained
    from moe_offload.storage.tokenizer import load_tokenizer

__version__ = "0.1.0"
__all__ = ["BudgetError", "CheckpointError", "ConfigError", "from_pretrained", "generate", "load_tokenizer"]

_LAZY = {
    "from_pretrained": "moe_offload.runtime.model",
    "generate": "moe_offload.runtime.generate",
    "load_tokenizer": "moe_offload.storage.tokenizer",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something that needs them is asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moe_offload' has no attribute {name!r}")
