"""llama.cpp as the peer of end_to_end.py, through llama-cpp-python: settings and the timed calls."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

NOT_INSTALLED = "llama-cpp-python is not installed (make llama)"


@dataclass(frozen=True)
class Settings:
    """One way to run it. ``repack`` copies weights into an order that its kernels like better."""

    mmap: bool
    flash_attention: bool
    repack: bool
    batch_tokens: int = 512

    @property
    def name(self) -> str:
        parts = [
            "mmap" if self.mmap else "no mmap",
            *(["flash attention"] if self.flash_attention else []),
            "repacked" if self.repack else "not repacked",
            f"-ub {self.batch_tokens}",
        ]
        return ", ".join(parts)


# All in RAM: the default (repacked), with and without flash attention and mmap.
IN_MEMORY = (
    Settings(mmap=False, flash_attention=True, repack=True),
    Settings(mmap=False, flash_attention=False, repack=True),
    Settings(mmap=True, flash_attention=True, repack=False),
)
# A repacked copy is anonymous memory as large as the weights: a smaller cgroup would kill it.
IN_CGROUP = (Settings(mmap=True, flash_attention=True, repack=False),)

BATCHES = (512, 2048, 4096)  # tokens that it may work on at once, of a prompt that has more than the first


def with_batches(candidates: tuple[Settings, ...], prompt_tokens: int) -> tuple[Settings, ...]:
    """Return the settings with every batch that a long prompt can fill; as they are for a short one."""
    batches = [tokens for tokens in BATCHES if tokens <= max(BATCHES[0], prompt_tokens)]
    return tuple(replace(one, batch_tokens=tokens) for one in candidates for tokens in batches)


def is_installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def open_model(path: str, settings: Settings, context: int, threads: int) -> Callable[[list[int]], None]:
    """Load the model; the result evaluates token ids after those before them, ``[]`` begins anew."""
    import llama_cpp

    defaults: Any = llama_cpp.llama_model_default_params

    def with_repacking() -> Any:
        params = defaults()
        params.use_extra_bufts = settings.repack
        return params

    llama_cpp.llama_model_default_params = with_repacking  # Llama() has no argument for it
    import llama_cpp.llama as module

    module.llama_cpp.llama_model_default_params = with_repacking
    llama = llama_cpp.Llama(
        path, n_ctx=context, n_batch=settings.batch_tokens, n_ubatch=settings.batch_tokens,
        n_threads=threads, n_threads_batch=threads, use_mmap=settings.mmap,
        flash_attn=settings.flash_attention, seed=0, verbose=False,
    )  # fmt: skip

    def evaluate(token_ids: list[int]) -> None:
        if not token_ids:
            llama.reset()  # the next call empties the cache
            return
        llama.eval(token_ids)

    return evaluate


def describe(settings: Settings) -> dict[str, Any]:
    return {"name": settings.name, **asdict(settings)}
