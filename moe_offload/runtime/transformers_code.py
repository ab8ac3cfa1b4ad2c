"""Whether a model's layers are still the code that native layers stand for.

Libraries patch transformers for everybody: a class's ``forward``, a class in a modeling module, a function
beside it, an attention under a name that is taken. Asked once a text, so patching after loading counts, too.
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TRUSTED = ("moe_offload", "torch", "transformers")  # packages


class LayerCode:
    """The classes of ``model``'s modules, and what stands beside them in their source files.

    Args:
        model: loaded. Not kept, only its classes.
    """

    def __init__(self, model: Any) -> None:
        self._config = model.config
        parts: set[Any] = {type(module) for module in model.modules() if module is not model}
        self._classes = [*parts, *type(model).__bases__]
        files = {cls.__module__ for cls in self._classes if cls.__module__.startswith("transformers.models.")}
        self._namespaces = [vars(sys.modules[name]) for name in files]

    def is_transformers_own(self) -> bool:
        """Whether no class, ``forward`` or function of them comes from elsewhere."""
        attention = ALL_ATTENTION_FUNCTIONS.get(self._config._attn_implementation)
        beside = [value for names in self._namespaces for value in names.values()]
        return (
            all(_package(cls.__module__) in TRUSTED and _is_trusted(cls.forward) for cls in self._classes)
            and all(_is_trusted(value) for value in beside if isinstance(value, FunctionType))
            and (attention is None or _is_trusted(attention))  # eager's is beside the classes
        )


def _is_trusted(function: Any) -> bool:
    """Whether a function, and all that it wraps, was written in a trusted package.

    By its globals: ``__module__`` is what ``functools.wraps`` copies.
    """
    while function is not None:
        if _package(getattr(function, "__globals__", {}).get("__name__", "")) not in TRUSTED:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _package(module_name: str) -> str:
    return module_name.partition(".")[0]
