"""transformers' own arguments to ``from_pretrained``: kept, answered with a note, or refused with a reason.

Code that loads with transformers passes what it always passed. An argument that cannot mean anything
here is accepted where it asks for nothing (its default), and refused by name where it asks for
something: none is dropped in silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from moe_offload.errors import ConfigError

# Without effect, since what they ask for is always so: (argument, why).
_ALWAYS_SO = {
    "low_cpu_mem_usage": "weights are read piece by piece",
    "offload_folder": "experts are read where they are; nothing is written",
    "offload_state_dict": "experts are read where they are; nothing is written",
    "offload_buffers": "the memory budget places the model",
    "disable_mmap": "no file is ever mapped",
    "weights_only": "pickled weights are never read",
}

# Refused unless they are at their default (None, False or empty): (argument, what to do instead).
_REFUSED = {
    "config": "the checkpoint's own config.json is used; change it there",
    "state_dict": "weights are read from the checkpoint's files",
    "quantization_config": 'pass quant="q8_0", "q4_0" or "q4_k", or open a GGUF file',
    "load_in_8bit": 'pass quant="q8_0"',
    "load_in_4bit": 'pass quant="q4_k" or "q4_0"',
    "trust_remote_code": "code from a checkpoint is never run; transformers must know the family",
    "from_tf": "only safetensors and GGUF are read",
    "from_flax": "only safetensors and GGUF are read",
    "variant": "give the folder that holds the files of that variant",
    "key_mapping": "tensors must have the names that transformers knows",
    "ignore_mismatched_sizes": "tensors must have the shapes of config.json",
    "force_download": "fetch the model again with the hub's own client",
    "proxies": "fetch the model with the hub's own client first",
    "tp_plan": "one process runs the model",
    "tp_size": "one process runs the model",
    "device_mesh": "one process runs the model",
    "distributed_config": "one process runs the model",
    "adapter_kwargs": "merge the adapter into the checkpoint first",
    "adapter_name": "merge the adapter into the checkpoint first",
    "use_kernels": "experts and packed layers are computed by moe_offload's own kernels",
    "kernel_config": "experts and packed layers are computed by moe_offload's own kernels",
    "allow_all_kernels": "experts and packed layers are computed by moe_offload's own kernels",
    "fusion_config": "the model's layers are kept as they are",
}
_OWN = (
    "ram", "experts", "context", "policy", "predictor", "prefetch", "num_threads", "allow_dense", "quant",
    "dtype", "progress", "quant_progress", "profile", "device", "vram", "scheduler", "kv", "warm_start",
)  # fmt: skip
_HONOURED = (
    "torch_dtype", "attn_implementation", "device_map", "max_memory", "gguf_file", "subfolder",
    "generation_config", "output_loading_info", "use_safetensors", "experts_implementation",
    "pretrained_model_name_or_path", "revision", "cache_dir",
    "token", "use_auth_token", "local_files_only",  # nothing is fetched here, so nothing asks for them
)  # fmt: skip


@dataclass(frozen=True)
class LoadArguments:
    """What transformers' arguments come to."""

    path: str | Path | None
    dtype: str | torch.dtype
    ram: str | int
    attn_implementation: str | None
    generation_config: Any
    output_loading_info: bool


def read_arguments(
    path: str | Path | None,
    dtype: str | torch.dtype,
    ram: str | int,
    kwargs: Mapping[str, Any],
    note: Callable[[str], None],
) -> LoadArguments:
    """Return what ``kwargs`` ask for; ``note`` is called with a line for each that changes nothing.

    Raises:
        ConfigError: an unknown argument, or one that asks for something impossible.
    """
    _refuse_unknown(kwargs)
    for name, reason in _REFUSED.items():
        if kwargs.get(name) not in (None, False, "", "default") and kwargs[name] != {}:
            raise ConfigError(f"from_pretrained: {name}={kwargs[name]!r:.80} is not possible: {reason}")
    for name, reason in _ALWAYS_SO.items():
        if kwargs.get(name) not in (None, False, True):
            note(f"{name}={kwargs[name]!r:.80} changes nothing: {reason}")
    _check_devices(kwargs, note)
    _check_implementations(kwargs)
    _check_generation_config(kwargs.get("generation_config"))
    return LoadArguments(
        path=_path(path, kwargs, note),
        dtype=_dtype(dtype, kwargs),
        ram=_ram(ram, kwargs, note),
        attn_implementation=kwargs.get("attn_implementation"),
        generation_config=kwargs.get("generation_config"),
        output_loading_info=bool(kwargs.get("output_loading_info")),
    )


def loading_info() -> dict[str, Any]:
    """Return what ``output_loading_info`` asks for: loading stops at the first such problem."""
    return {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def _refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    known = {*_OWN, *_HONOURED, *_ALWAYS_SO, *_REFUSED}
    for name in kwargs:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ConfigError(
                f"from_pretrained does not take {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
                + "; settings of the model itself go on model.config or model.generation_config afterwards"
            )


def _path(
    path: str | Path | None, kwargs: Mapping[str, Any], note: Callable[[str], None]
) -> str | Path | None:
    """Return which model: on disk a path, on the hub a name as open_checkpoint reads it."""
    name = kwargs.get("pretrained_model_name_or_path")
    if path is not None and name is not None:
        raise ConfigError(f"two models are named: {str(path)!r} and {str(name)!r}; give one")
    path = name if path is None else path
    if path is not None and not isinstance(path, str | os.PathLike):
        raise ConfigError(f"a model is named by a path or org/name, got {path!r:.80} ({type(path).__name__})")
    revision, gguf_file, subfolder = (kwargs.get(key) for key in ("revision", "gguf_file", "subfolder"))
    if path is None:
        if gguf_file or subfolder:
            raise ConfigError(f"{gguf_file or subfolder!r} is in which model? Give it as the first argument")
        return None
    if not str(path):
        raise ConfigError("the model's path is empty; None is the bundled demo model")
    if os.path.exists(os.path.expanduser(path)):  # False of a name that no file can have
        if revision not in (None, "main"):
            note(f"revision={revision!r:.80} changes nothing: {path} is on this disk")
        return Path(path, *filter(None, (subfolder, gguf_file)))
    for key, value, remedy in (
        ("subfolder", subfolder, "give that folder's own path"),
        ("cache_dir", kwargs.get("cache_dir"), "set HF_HUB_CACHE, or give the folder's own path"),
    ):
        if value:
            raise ConfigError(
                f"{key}={value!r:.80} of {path}, which is no path here, is not looked up: {remedy}"
            )
    return f"{path}{f'@{revision}' if revision else ''}{f'/{gguf_file}' if gguf_file else ''}"


def _dtype(dtype: str | torch.dtype, kwargs: Mapping[str, Any]) -> str | torch.dtype:
    other = kwargs.get("torch_dtype")
    dtype = "auto" if dtype is None else dtype
    if other is None:
        return dtype
    if dtype != "auto" and str(dtype).removeprefix("torch.") != str(other).removeprefix("torch."):
        raise ConfigError(f"dtype={dtype} and torch_dtype={other} are names of one setting; give one")
    wanted: str | torch.dtype = other
    return wanted


def _ram(ram: str | int, kwargs: Mapping[str, Any], note: Callable[[str], None]) -> str | int:
    """accelerate's ``max_memory={"cpu": "8GiB"}`` is our ``ram``."""
    limits = kwargs.get("max_memory") or {}
    if not isinstance(limits, Mapping):
        raise ConfigError(f'max_memory must be a mapping such as {{"cpu": "8GiB"}}, got {limits!r:.80}')
    unused = sorted(str(device) for device in limits if device != "cpu")
    if unused:
        note(f"max_memory of {', '.join(unused)} changes nothing: the model runs on the CPU")
    wanted: str | int = limits.get("cpu", ram)
    if "cpu" in limits and ram != "auto" and wanted != ram:
        raise ConfigError(
            f'ram={ram!r} and max_memory={{"cpu": {wanted!r}}} are names of one setting; give one'
        )
    return wanted


def _check_devices(kwargs: Mapping[str, Any], note: Callable[[str], None]) -> None:
    value = kwargs.get("device_map")
    devices = value.values() if isinstance(value, Mapping) else (value,)
    if not _all_cpu(devices):
        raise ConfigError(
            f"device_map={value!r:.80} is not possible: the memory budget places the model; pass ram="
        )
    if value == "auto":
        note('device_map="auto": the memory budget places the model, see ram; experts stay on disk')


def _all_cpu(devices: Iterable[Any]) -> bool:
    return all(device is None or str(device) in ("cpu", "auto", "-1") for device in devices)


def _check_implementations(kwargs: Mapping[str, Any]) -> None:
    attention = kwargs.get("attn_implementation")
    if attention not in (None, "eager", "sdpa"):
        raise ConfigError(
            f'attn_implementation={attention!r:.80} is not possible here; "sdpa" and "eager" are'
        )
    experts = kwargs.get("experts_implementation")
    if experts not in (None, "moe_offload"):
        raise ConfigError(
            f"experts_implementation={experts!r:.80} is not possible: experts are read on demand and "
            "computed by moe_offload's own"
        )
    if kwargs.get("use_safetensors") is False:
        raise ConfigError("use_safetensors=False is not possible: pickled weights are never read")


def _check_generation_config(config: Any) -> None:
    if config is not None and not isinstance(config, GenerationConfig):
        raise ConfigError(f"generation_config must be a GenerationConfig, got {type(config).__name__}")
