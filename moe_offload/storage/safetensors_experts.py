"""Finding the experts among a safetensors folder's tensors, by name and without torch.

Two ways of storing them: a tensor per expert and matrix (``experts.7.up_proj.weight``, Mixtral's
``w1`` gate, ``w3`` up, ``w2`` down), or one tensor of all experts (``experts.gate_up_proj``, Granite's
``input_linear``, gate rows first; gpt-oss stores it transposed with gate and up interleaved).
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar

from moe_offload.config import ModelSpec
from moe_offload.errors import CheckpointError
from moe_offload.storage.expert_format import (
    ExpertIndex,
    ExpertKey,
    ExpertLayout,
    MatrixFormat,
    Relayout,
    RowOrder,
    Span,
    WeightType,
)
from moe_offload.storage.families import find_family
from moe_offload.storage.safetensors import WEIGHT_TYPES, SafetensorsFolder, SafetensorsTensor, weight_type

_K = TypeVar("_K")
_EXPERTS = re.compile(
    r"(?:model\.)?layers\.([0-9]{1,6})\."
    r"(?:(?:(?:mlp|block_sparse_moe|feed_forward|moe|ffn|mixer)\.)?experts\.|block_sparse_moe\.(?=(?:in|out)put_linear))(.+)",
    re.DOTALL,
)
_ONE_EXPERT = re.compile(r"([0-9]{1,6})\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_MATRIX = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_FUSED = {
    "gate_up_proj": "gate_up", "down_proj": "down",
    "input_linear.weight": "gate_up", "output_linear.weight": "down",
    "fc1.weight": "gate_up", "fc2.weight": "down",
}  # fmt: skip
_GPT_OSS_BIASES = frozenset({"gate_up_proj_bias", "down_proj_bias"})
_ROUTING = frozenset({"e_score_correction_bias"})  # of the router, though it is named as the experts'
_SPLIT_ORDER, _FUSED_ORDER = ("gate", "up", "down"), ("gate_up", "down")


@dataclass(frozen=True)
class FolderExperts:
    """The experts of a folder, and the names of every other tensor."""

    index: ExpertIndex
    dense_names: tuple[str, ...]


def index_experts(folder: SafetensorsFolder, spec: ModelSpec) -> FolderExperts:
    """Locate every matrix of every expert that ``spec`` promises.

    Raises:
        CheckpointError: one is missing, has another shape or dtype than the others, or is unknown.
    """
    finder = _Finder(folder, spec)
    dense_names = tuple(name for name, tensor in folder.tensors.items() if not finder.take(tensor))
    layouts: dict[int, ExpertLayout] = {}
    spans: dict[ExpertKey, tuple[Span, ...]] = {}
    for layer_idx in spec.moe_layers:
        if finder.fused[layer_idx]:
            layouts[layer_idx] = finder.fused_layer(layer_idx, spans)
        else:
            layouts[layer_idx] = finder.split_layer(layer_idx, spans)
    return FolderExperts(ExpertIndex(layouts, spans, finder.scale_spans), dense_names)


def find_experts(folder: SafetensorsFolder, spec: ModelSpec) -> ModelSpec:
    """Return ``spec`` with the layers and the size of the experts that ``folder`` holds."""
    layers, intermediate_size = set[int](), 0
    transposed = find_family(spec.model_type, str(folder.files[0].parent)).transposed
    for tensor in folder.tensors.values():
        match = _EXPERTS.fullmatch(tensor.name)
        if match is None or match[2] in _ROUTING:
            continue
        layers.add(int(match[1]))
        one = _ONE_EXPERT.fullmatch(match[2])
        if (one is not None and _MATRIX[one[2]] == "down") or _FUSED.get(match[2]) == "down":
            intermediate_size = tensor.shape[-2 if transposed else -1]
    found = tuple(sorted(layer for layer in layers if layer < spec.num_hidden_layers))
    return replace(spec, moe_layers=found, moe_intermediate_size=intermediate_size)


class _Finder:
    def __init__(self, folder: SafetensorsFolder, spec: ModelSpec) -> None:
        self.folder, self.spec = folder, spec
        self.family = find_family(spec.model_type, str(folder.files[0].parent))
        self.moe_layers = frozenset(spec.moe_layers)
        self.split: defaultdict[int, dict[tuple[int, str], SafetensorsTensor]] = defaultdict(dict)
        self.fused: defaultdict[int, dict[str, SafetensorsTensor]] = defaultdict(dict)
        self.scale_spans: dict[ExpertKey, tuple[Span, ...]] = {}

    def take(self, tensor: SafetensorsTensor) -> bool:
        """Keep ``tensor`` if it belongs to routed experts; say whether it does."""
        match = _EXPERTS.fullmatch(tensor.name)
        if match is None:
            return False
        layer_idx, rest = int(match[1]), match[2]
        if self.spec.model_type == "gpt_oss" and rest in _GPT_OSS_BIASES:
            return False
        if rest in _ROUTING:
            return False
        if layer_idx not in self.moe_layers:
            self.fail(tensor, f"holds experts, but by config.json layer {layer_idx} has none")
        if rest in _FUSED:
            self.put(self.fused[layer_idx], _FUSED[rest], tensor)
            return True
        one = _ONE_EXPERT.fullmatch(rest)
        if one is None or self.spec.model_type == "gpt_oss":
            self.fail(tensor, "is no expert weight that can be read here; use a bf16 checkpoint or a GGUF")
        expert_id = int(one[1])
        if expert_id >= self.spec.num_experts:
            self.fail(
                tensor, f"is of expert {expert_id}, but config.json has {self.spec.num_experts} experts"
            )
        self.put(self.split[layer_idx], (expert_id, _MATRIX[one[2]]), tensor)
        return True

    def put(self, found: dict[_K, SafetensorsTensor], key: _K, tensor: SafetensorsTensor) -> None:
        if key in found:
            self.fail(tensor, f"and {found[key].name!r} are one matrix under two names; remove one")
        found[key] = tensor

    def split_layer(self, layer_idx: int, spans: dict[ExpertKey, tuple[Span, ...]]) -> ExpertLayout:
        found, spec = self.split[layer_idx], self.spec
        wanted = [(expert, matrix) for expert in range(spec.num_experts) for matrix in _SPLIT_ORDER]
        missing = [key for key in wanted if key not in found]
        if missing:
            expert_id, matrix = missing[0]
            raise CheckpointError(
                f"{self.folder.files[0].parent}: layer {layer_idx} lacks {len(missing)} of {len(wanted)} "
                f"expert matrices, first the {matrix} projection of expert {expert_id}; "
                f"config.json has {spec.num_experts} experts: fetch the missing shard or the right config"
            )
        up, down = (
            (spec.moe_intermediate_size, spec.hidden_size),
            (spec.hidden_size, spec.moe_intermediate_size),
        )
        shapes = {"gate": up, "up": up, "down": down}
        types = {matrix: self.weight_type(found[0, matrix]) for matrix in _SPLIT_ORDER}
        for (_, matrix), tensor in found.items():
            self.check(tensor, shapes[matrix], types[matrix])
        for expert_id in range(spec.num_experts):
            key = ExpertKey(layer_idx, expert_id)
            spans[key] = tuple(found[expert_id, matrix].span for matrix in _SPLIT_ORDER)
            if found[0, "gate"].scales is not None:
                self.scale_spans[key] = tuple(
                    _scale_span(found[expert_id, matrix]) for matrix in _SPLIT_ORDER
                )
        matrices = tuple(
            MatrixFormat(types[matrix], *shapes[matrix], relayout=_relayout(found[0, matrix]))
            for matrix in _SPLIT_ORDER
        )
        return ExpertLayout(layer_idx, spec.num_experts, RowOrder.SPLIT, matrices)

    def fused_layer(self, layer_idx: int, spans: dict[ExpertKey, tuple[Span, ...]]) -> ExpertLayout:
        found, spec = self.fused[layer_idx], self.spec
        if self.split[layer_idx]:
            tensor = next(iter(self.split[layer_idx].values()))
            self.fail(tensor, f"stands beside fused experts of layer {layer_idx}; keep one of the two")
        missing = [matrix for matrix in _FUSED_ORDER if matrix not in found]
        if missing:
            raise CheckpointError(
                f"{self.folder.files[0].parent}: layer {layer_idx} has {next(iter(found.values())).name!r} "
                f"but not its {missing[0]}_proj; a shard is missing: fetch it"
            )
        transposed = self.family.transposed and found["gate_up"].scales is None
        sizes = {
            "gate_up": (2 * spec.moe_intermediate_size, spec.hidden_size),
            "down": (spec.hidden_size, spec.moe_intermediate_size),
        }
        matrices = []
        for matrix in _FUSED_ORDER:
            tensor, (rows, cols) = found[matrix], sizes[matrix]
            weight_type = self.weight_type(tensor)
            stored = (cols, rows) if transposed else (rows, cols)
            self.check(tensor, (spec.num_experts, *stored), weight_type)
            matrices.append(MatrixFormat(weight_type, rows, cols, transposed, _relayout(tensor)))
        forms = [(found[matrix], form) for matrix, form in zip(_FUSED_ORDER, matrices, strict=True)]
        for expert_id in range(spec.num_experts):
            key = ExpertKey(layer_idx, expert_id)
            spans[key] = tuple(_slice(tensor.span, expert_id, form.code_bytes) for tensor, form in forms)
            if found["gate_up"].scales is not None:
                self.scale_spans[key] = tuple(
                    _slice(_scale_span(tensor), expert_id, form.scale_bytes) for tensor, form in forms
                )
        order = RowOrder.INTERLEAVED if self.family.interleaved else RowOrder.GATE_UP
        return ExpertLayout(layer_idx, spec.num_experts, order, tuple(matrices))

    def weight_type(self, tensor: SafetensorsTensor) -> WeightType:
        found = weight_type(tensor)
        if found is None:
            self.fail(tensor, f"has dtype {tensor.dtype}; experts must be {', '.join(WEIGHT_TYPES)}")
        return found

    def check(self, tensor: SafetensorsTensor, shape: tuple[int, ...], weight_type: WeightType) -> None:
        if tensor.shape != shape:
            self.fail(tensor, f"has shape {tensor.shape}, but by config.json it must have {shape}")
        if self.weight_type(tensor) is not weight_type:
            self.fail(
                tensor,
                f"is {tensor.dtype}, the layer's others are {weight_type.name}; save them in one dtype",
            )

    def fail(self, tensor: SafetensorsTensor, message: str) -> NoReturn:
        raise CheckpointError(f"{self.folder.files[tensor.span.file_id]}: tensor {tensor.name!r} {message}")


def _relayout(tensor: SafetensorsTensor) -> Relayout | None:
    return None if tensor.scales is None else tensor.scales.relayout


def _scale_span(tensor: SafetensorsTensor) -> Span:
    assert tensor.scales is not None, f"{tensor.name} has no scales, its layer's others have"
    return tensor.scales.span


def _slice(span: Span, index: int, num_bytes: int) -> Span:
    return Span(span.file_id, span.offset + index * num_bytes, num_bytes)
