"""From a path to everything that can be known without reading a weight: spec, spans, config.

``open_checkpoint`` reads headers only and imports neither torch nor transformers, so that
``inspect`` and a refusal come within a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_offload.config import ModelSpec
from moe_offload.errors import CheckpointError
from moe_offload.storage.dense_tensor import TensorInfo
from moe_offload.storage.expert_format import ExpertIndex, WeightType
from moe_offload.storage.families import find_family
from moe_offload.storage.gguf import GgufHeader
from moe_offload.storage.gguf_config import find_architecture, gguf_config, gguf_generation_config
from moe_offload.storage.gguf_parts import read_gguf
from moe_offload.storage.gguf_tensors import map_tensors
from moe_offload.storage.header_reader import read_json_object
from moe_offload.storage.hf_config import model_spec, next_token_layers, text_config
from moe_offload.storage.model_files import locate as locate
from moe_offload.storage.safetensors import (
    WEIGHT_TYPES,
    SafetensorsFolder,
    read_folder,
    table_type,
    weight_type,
)
from moe_offload.storage.safetensors_experts import find_experts, index_experts
from moe_offload.storage.scaled_tensors import pair_scales, quantization_method
from moe_offload.storage.text_only import text_tensors


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds and where; weights are read by span, later."""

    path: Path
    source: str  # "safetensors" | "gguf"
    files: tuple[Path, ...]
    spec: ModelSpec
    config: Mapping[str, Any]  # as a Hugging Face config.json
    generation_config: Mapping[str, Any] | None
    experts: ExpertIndex  # without layouts for a dense model
    dense: Mapping[str, TensorInfo]  # every tensor that is not a routed expert's weight
    gguf: GgufHeader | None = None  # tokenizer and other metadata
    notes: tuple[str, ...] = ()  # what a user should know before it is loaded, one line each

    @property
    def dense_bytes(self) -> int:
        """File bytes of everything that is not a routed expert."""
        return sum(info.span.num_bytes for info in self.dense.values())

    def bytes_by_type(self) -> dict[WeightType, int]:
        """File bytes of all weights, dense and experts, by block format, largest first."""
        totals: Counter[WeightType] = Counter()
        for info in self.dense.values():
            totals[info.ggml_type] += info.span.num_bytes
        for layout in self.experts.layouts.values():
            for matrix in layout.matrices:
                totals[matrix.ggml_type] += matrix.num_bytes * layout.num_experts
        return dict(totals.most_common())


def open_checkpoint(path: str | Path, *, allow_dense: bool = False) -> Checkpoint:
    """Read the headers at ``path``: a Hugging Face folder with safetensors, a GGUF file, or a model's name.

    Raises:
        CheckpointError: nothing readable is there, it is corrupt or unsupported, or it has no
            experts and ``allow_dense`` is False.
    """
    source, path = locate(path)
    checkpoint = _open_gguf(path) if source == "gguf" else _open_folder(path)
    if not checkpoint.spec.moe_layers and not allow_dense:
        raise CheckpointError(
            f"{path}: this {checkpoint.spec.model_type} model is dense: no experts to offload are found in "
            "it; pass allow_dense=True (--allow-dense) to run it wholly in memory"
        )
    return checkpoint


def _open_folder(folder: Path) -> Checkpoint:
    config_path = folder / "config.json"
    config = text_config(read_json_object(config_path))
    spec = model_spec(config, str(config_path))
    method = quantization_method(config, str(config_path))
    shards, left_out = text_tensors(
        read_folder(folder), spec.num_hidden_layers, next_token_layers(config, str(config_path))
    )
    shards = pair_scales(shards, method)
    if find_family(spec.model_type, str(config_path)).found_in_file:
        spec = find_experts(shards, spec)
    found = index_experts(shards, spec)
    generation_path = folder / "generation_config.json"
    return Checkpoint(
        path=folder,
        source="safetensors",
        files=shards.files,
        spec=spec,
        config=config,
        generation_config=read_json_object(generation_path) if generation_path.exists() else None,
        experts=found.index,
        dense={name: _dense_tensor(shards, name) for name in found.dense_names},
        notes=(left_out,) if left_out else (),
    )


def _dense_tensor(folder: SafetensorsFolder, name: str) -> TensorInfo:
    tensor = folder.tensors[name]
    ggml_type = weight_type(tensor)
    if ggml_type is None:
        ggml_type = table_type(tensor)
    if ggml_type is None:
        raise CheckpointError(
            f"{folder.files[tensor.span.file_id]}: tensor {name!r} has dtype {tensor.dtype}; "
            f"{', '.join(WEIGHT_TYPES)} are supported: use an unquantized checkpoint"
        )
    return TensorInfo(name, ggml_type, tensor.shape, tensor.span, scales=tensor.scales)


def _open_gguf(path: Path) -> Checkpoint:
    header = read_gguf(path)
    config = gguf_config(header)
    spec = model_spec(config, str(path))
    dense, experts = map_tensors(header, find_architecture(header), spec, config)
    return Checkpoint(
        path=path,
        source="gguf",
        files=header.files,
        spec=spec,
        config=config,
        generation_config=gguf_generation_config(header, config),
        experts=experts,
        dense={info.name: info for info in dense},
        gguf=header,
    )
