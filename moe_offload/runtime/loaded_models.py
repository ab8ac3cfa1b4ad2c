"""The models that this process holds, and what it holds besides: what the next one is planned beside."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

from moe_offload.errors import ConfigError
from moe_offload.residency.memory import process_bytes
from moe_offload.runtime.footprint import trim_heap

if TYPE_CHECKING:
    from moe_offload.runtime.offload import OffloadHandle

_library_bytes = 0
_loading_pid: int | None = None  # the process that first loaded a model
live_handles: weakref.WeakSet[OffloadHandle] = weakref.WeakSet()


def check_not_forked() -> None:
    """Refuse to load in a fork of a process that has: neither torch's threads nor ours came along.

    torch would wait for its own without end, holding the interpreter's lock.

    Raises:
        ConfigError: this is such a fork.
    """
    global _loading_pid
    _loading_pid = os.getpid() if _loading_pid is None else _loading_pid
    if os.getpid() != _loading_pid:
        raise ConfigError(
            f"process {_loading_pid} has loaded a model, and this one, {os.getpid()}, is its fork, without "
            "its threads: start it with 'spawn', or load no model before forking"
        )


def base_bytes() -> int:
    """Return what the process holds, or will hold once the models loaded before fill their plans.

    What is not a model's (libraries, the caller's own data) is what the process holds less what the
    models certainly do. Activations that a model left in the heap look like the caller's data and are
    planned for already: an increase counts from beyond them.
    """
    global _library_bytes
    trim_heap()  # what was freed is nobody's
    now, models = process_bytes(), list(live_handles)
    others = now - sum(model.touched_bytes() for model in models)
    activations = sum(model.plan.workspace_bytes for model in models)
    known = _library_bytes if models else others
    _library_bytes = max(min(known, others), others - activations)
    return max(now, _library_bytes + sum(model.planned_bytes for model in models))
