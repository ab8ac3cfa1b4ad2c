"""Dense tensors read into owned memory and handed to transformers' own loader.

No file is memory-mapped: a truncated file must be an error, not a SIGBUS, and a mapping's pages would
fight for the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from moe_offload.errors import CheckpointError
from moe_offload.runtime.dense_tensors import read_float, read_packed
from moe_offload.runtime.quant_modules import QuantEmbedding, QuantLinear
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.storage.expert_store import ExpertStore

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def load_dense(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    store: ExpertStore,
    progress: Progress | None = None,
) -> None:
    """Read every dense tensor and hand them to transformers' own loader as a state dict.

    Raises:
        CheckpointError: a tensor of the model is missing in the checkpoint, or has another shape.
    """
    dtype = model.config.dtype
    state_dict = dict(_read_all(model, checkpoint, store, dtype, progress))
    load_config = LoadStateDictConfig(
        pretrained_model_name_or_path=str(checkpoint.path),
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model) if checkpoint.source == "safetensors" else [],
    )
    with _quiet_transformers():
        report, _ = model._load_pretrained_model(model, state_dict, None, load_config)
        for name, found, wanted in report.mismatched_keys:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {tuple(found)}, the configuration wants "
                f"{tuple(wanted)}"
            )
        missing = sorted(set(report.missing_keys) - tied_weight_names(model))
        if missing:
            raise CheckpointError(
                f"{checkpoint.path}: {len(missing)} tensors of the model are missing, "
                f"the first is {missing[0]}"
            )
        model._finalize_model_loading(model, load_config, report)
    model.eval()
    model.requires_grad_(False)


def tied_weight_names(model: PreTrainedModel) -> set[str]:
    """Names of parameters that share another one's memory and so may be absent from the file."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    return set(model.all_tied_weights_keys)


def _read_all(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    store: ExpertStore,
    dtype: torch.dtype,
    progress: Progress | None,
) -> Iterator[tuple[str, Tensor]]:
    packed = {
        name for name, module in model.named_modules() if isinstance(module, (QuantLinear, QuantEmbedding))
    }
    total_bytes, done_bytes = checkpoint.dense_bytes, 0
    for name, info in checkpoint.dense.items():
        if info.packed or (name.rpartition(".")[0] in packed and name.endswith(".weight")):
            tensor = read_packed(info, store)
        else:
            tensor = read_float(info, store, dtype)
        done_bytes += info.span.num_bytes
        if progress is not None:
            progress(done_bytes, total_bytes)
        yield name, tensor


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' own progress bar and report: ours names what matters."""
    verbosity = transformers_logging.get_verbosity()
    bar_was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar_was_on:
            transformers_logging.enable_progress_bar()
