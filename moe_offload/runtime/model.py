"""``from_pretrained``: open, measure, plan, build, load, attach — in that order.

Nothing large is allocated before the plan says that it fits.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface
from transformers.modeling_utils import PreTrainedModel

from moe_offload import ops
from moe_offload.config import DEMO_MODEL, RuntimeConfig, parse_bytes, parse_device
from moe_offload.errors import ConfigError
from moe_offload.header_costs import Process, place
from moe_offload.planning.eviction import make_policy
from moe_offload.planning.plans import DevicePlan, PlacementPlan
from moe_offload.planning.scheduler import check_scheduler
from moe_offload.residency.accelerator import check_device
from moe_offload.residency.memory import auto_ram_bytes
from moe_offload.residency.policy_fit import AUTO, automatic_policy
from moe_offload.runtime import machine_profile, quantized, skeleton
from moe_offload.runtime.arguments import LoadArguments, loading_info, read_arguments
from moe_offload.runtime.device_setup import plan_vram
from moe_offload.runtime.executor import offloaded_experts_forward
from moe_offload.runtime.loaded_models import base_bytes, check_not_forked
from moe_offload.runtime.loading import Decided, load
from moe_offload.runtime.predictor_choice import choose_predictor
from moe_offload.runtime.torch_defaults import float32_on_cpu
from moe_offload.storage import quantize_plan
from moe_offload.storage.checkpoint import Checkpoint, open_checkpoint
from moe_offload.storage.quantize import quantize_once
from moe_offload.storage.quantize_rules import check_quant
from moe_offload.storage.tokenizer import tokenizer_was_loaded

ExpertsInterface.register(skeleton.EXPERTS_IMPLEMENTATION, offloaded_experts_forward)


@float32_on_cpu()
def from_pretrained(
    path: str | Path | None = None,
    *,
    ram: str | int = "auto",
    experts: str | int | None = None,
    context: int | None = None,
    policy: str | None = None,
    predictor: str | None = None,
    prefetch: bool | None = None,
    num_threads: int | None = None,
    profile: str | Path | None = None,
    allow_dense: bool = False,
    warm_start: bool = True,
    quant: str | None = None,
    kv: str | None = None,
    device: str | None = None,
    vram: str | int | None = None,
    scheduler: str | None = None,
    dtype: str | torch.dtype = "auto",
    progress: Callable[[int, int], None] | None = None,
    quant_progress: Callable[[int, int], None] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a mixture-of-experts model inside a memory budget.

    Args:
        path: Hugging Face folder (safetensors) or GGUF file; None is the bundled demo model.
        ram: everything the process may hold ("2GiB", bytes), or "auto" for what the machine and
            its cgroup have free; it prints what it took to stderr.
        experts: cap on experts in memory: "25%", a number, or "all".
        context: tokens of key/value cache, over the whole batch; default 4096 or the model's maximum.
        policy: eviction policy by name or import path; default "auto": what was tuned, else "horizon",
            with a fit of this checkpoint if there is one.
        predictor: what guesses the next layers' experts: "auto" is the fit of this checkpoint where
            `moe-offload fit-predictor` made one, else "cross_layer_gate"; others: docs/PREDICTORS.md.
        prefetch: read predicted experts early; changes time, never tokens; default what was tuned, else True.
        num_threads: native threads; default what was tuned, else from affinity, cgroup quota and cores.
        profile: figures of this machine, and settings for what is not given here: default "auto", what
            `moe-offload tune` kept for the checkpoint, or for the machine; where there is nothing, the
            machine is measured (at most two seconds, once). Or a profile's name or file, or "none".
        allow_dense: load a model without experts wholly into memory.
        warm_start: begin with what earlier runs of the checkpoint used most, and keep what this one uses,
            in a small file below XDG_CACHE_HOME (~/.cache); changes time, never tokens.
        quant: "q8_0", "q4_0" or "q4_k": quantize a safetensors folder once, into a file in the user's
            cache, and run that. Lossy: bench/quant_quality.py prints what it costs.
        kv: "q8_0" keeps keys and values as blocks of 34 bytes for 32 numbers, about half of 16 bits.
            Lossy: bench/perplexity.py --kv prints what it costs.
        device: what computes experts beside the CPU: None or "cpu" for nothing, "cuda", "cuda:1", or
            "emulated:vram=512MiB,link=12GB/s", an accelerator without the hardware (docs/ARCHITECTURE.md).
            Changes time, never tokens.
        vram: the device's memory to use, the driver's own included ("6GiB", bytes), or "auto" for what is
            free less a reserve.
        scheduler: who computes an expert, the device or the CPU: default what was tuned, else "hybrid";
            baselines "static_split", "on_demand", "fiddler", "hybrimoe_greedy".
        dtype: of activations and float dense weights; "auto" is the checkpoint's own (float32 for GGUF).
        progress: called with (bytes done, bytes in all) while dense weights are read.
        quant_progress: the same while ``quant`` writes its file, or waits for a process that does.
        **kwargs: transformers' own arguments (``torch_dtype``, ``attn_implementation``, ``gguf_file``,
            ``revision``, ``token``, ``device_map="auto"``, ``generation_config`` ...): runtime/arguments.py
            says of each what it means here, or why it cannot.

    Returns:
        The transformers model of the checkpoint's family, in eval mode, with ``model.offload``; with
        ``output_loading_info=True`` a pair of it and that information, as in transformers.

    Raises:
        CheckpointError: the checkpoint is damaged, unsupported or dense.
        BudgetError: ``ram`` cannot hold the model; names the smallest that would do.
        ConfigError: an argument that cannot work.
    """
    arguments = read_arguments(path, dtype, ram, kwargs, _say)
    config = RuntimeConfig(
        ram_bytes=None if arguments.ram == "auto" else parse_bytes(arguments.ram),
        experts=experts,
        context_tokens=context,
        policy=AUTO if policy is None else policy,
        predictor="auto" if predictor is None else predictor,
        prefetch=True if prefetch is None else prefetch,
        num_threads=num_threads,
        allow_dense=allow_dense,
        warm_start=warm_start,
        kv=kv,
        device=parse_device(device, vram),
        scheduler="hybrid" if scheduler is None else scheduler,
    )
    profile = AUTO if profile is None else profile
    check_not_forked()
    checkpoint = _open(arguments, config, quant)
    chosen = {
        "policy": None if policy == AUTO else policy,
        "predictor": predictor,
        "prefetch": prefetch,
        "num_threads": num_threads,
        "scheduler": scheduler,
    }
    given = [name for name, value in chosen.items() if value is not None]
    found = machine_profile.find_profile(profile, checkpoint, config.device)
    config = machine_profile.with_settings(config, found, given)
    if policy in (None, AUTO):
        config = replace(config, policy=automatic_policy(config.policy, checkpoint))
    make_policy(config.policy)  # a wrong name is an error before anything is read
    wanted = config.predictor if config.prefetch else "none"
    choice = choose_predictor(wanted, checkpoint, insist="predictor" in given)
    model = _build(checkpoint, config, arguments)
    checkpoint = skeleton.measure_cache(model, checkpoint)
    if quant is not None:
        checkpoint = _quantize(model, checkpoint, config, check_quant(quant), quant_progress)
    plan = _plan(model, checkpoint, config)
    vram_plan = plan_vram(checkpoint, config, model.config.dtype.itemsize)
    _say_plans(config, plan, vram_plan)
    found = machine_profile.choose(found, profile, checkpoint, plan, _say)
    load(model, Decided(checkpoint, config, plan, vram_plan, choice, found), progress)
    return _as_transformers_would(model, arguments)


def _open(arguments: LoadArguments, config: RuntimeConfig, quant: str | None) -> Checkpoint:
    """Open the checkpoint; words that nobody knows are an error before."""
    check_scheduler(config.scheduler)
    if config.device is not None:
        check_device(config.device)
    if quant is not None:
        check_quant(quant)
    path = DEMO_MODEL if arguments.path is None else arguments.path
    checkpoint = open_checkpoint(path, allow_dense=config.allow_dense)
    for note in checkpoint.notes:
        _say(note)
    return checkpoint


def _build(checkpoint: Checkpoint, config: RuntimeConfig, arguments: LoadArguments) -> PreTrainedModel:
    """Return the model without weights, the process being as large as it will be without them."""
    dtype = _resolve_dtype(arguments.dtype, checkpoint)
    if config.num_threads is not None:
        ops.set_num_threads(config.num_threads)
    _warm_up(dtype)
    return skeleton.build_skeleton(checkpoint, dtype, arguments.attn_implementation)


def _resolve_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name == "auto" and checkpoint.source == "gguf":
        name = "float32"
    elif name == "auto":
        name = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    resolved: torch.dtype | None = getattr(torch, name, None)
    if resolved not in skeleton.GGML_TYPES:
        where = f" (of {checkpoint.path})" if dtype == "auto" else ""
        raise ConfigError(f"dtype={name!r}{where} is not supported; pass float32, bfloat16 or float16")
    assert resolved is not None
    return resolved


def _quantize(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    config: RuntimeConfig,
    quant: str,
    progress: Callable[[int, int], None] | None,
) -> Checkpoint:
    """Return the quantized checkpoint and pack the skeleton's layers for it.

    A budget that cannot hold the result is refused before minutes are spent on making it.
    """
    plan = quantized.make_plan(model, checkpoint, quant)
    result = quantize_plan.quantized_checkpoint(plan)
    quantized.pack_layers(model, checkpoint, result)
    ram_bytes = _plan(model, result, config).ram_bytes
    return quantize_once(
        plan,
        say=_say,
        progress=progress,
        num_threads=lambda: quantized.threads_within(plan, ram_bytes),
    )


def _say(line: str) -> None:
    """Tell the user on stderr; on a terminal, over what a progress line has drawn there."""
    clear_line = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{clear_line}moe-offload: {line}", file=sys.stderr, flush=True)


def _plan(model: PreTrainedModel, checkpoint: Checkpoint, config: RuntimeConfig) -> PlacementPlan:
    """Divide the budget; the skeleton has no weights yet, so nothing is lost when it does not fit."""
    process = Process(
        base_bytes=base_bytes(),
        bytes_per_element=model.config.dtype.itemsize,
        stores_scores=model.config._attn_implementation == "eager",
        loads_tokenizer=not tokenizer_was_loaded(checkpoint.path),
    )
    ram_bytes = config.ram_bytes if config.ram_bytes is not None else auto_ram_bytes()
    return place(checkpoint, config, ram_bytes=ram_bytes, process=process)


def _warm_up(dtype: torch.dtype) -> None:
    """Touch the code and buffers that every forward touches, so that the base is measured with them."""
    with torch.no_grad():
        x = torch.ones(1, 4, 64, 64, dtype=dtype)
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        x = torch.nn.functional.linear(x, torch.ones(64, 64, dtype=dtype))
        x.float().softmax(-1).topk(4)


def _say_plans(config: RuntimeConfig, plan: PlacementPlan, vram_plan: DevicePlan | None) -> None:
    if config.ram_bytes is None:
        print(f"ram auto: {plan.describe()}", file=sys.stderr)
    if config.device is not None:
        _say(
            f"vram: {vram_plan.describe()}" if vram_plan else "device= changes nothing: there are no experts"
        )


def _as_transformers_would(model: PreTrainedModel, arguments: LoadArguments) -> Any:
    """Return what the caller of transformers' ``from_pretrained`` gets for these arguments."""
    if arguments.generation_config is not None:
        model.generation_config = copy.deepcopy(arguments.generation_config)
        model.generation_config.disable_compile = True
    if torch.accelerator.is_available():
        model.hf_device_map = {"": "cpu"}  # or a pipeline would try to move it there
    return (model, loading_info()) if arguments.output_loading_info else model
