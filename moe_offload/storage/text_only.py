"""The language model's tensors among those of a whole folder, under the names of the text model.

Official folders hold more than is run here: vision and audio towers beside a nested language model,
and layers that predict the token after the next. Those are left out by name, and counted.
"""

from __future__ import annotations

import re
from dataclasses import replace

from moe_offload.config import gib
from moe_offload.storage.safetensors import SafetensorsFolder, SafetensorsTensor

_NESTED = re.compile(r"(?:model\.)?language_model\.(?:model\.)?")
_OTHER_PARTS = {
    "next-token prediction": re.compile(r"(?:model\.)?mtp[._]"),
    "vision or audio": re.compile(
        r"(?:model\.)?(?:visual|vision_\w+|audio_\w+|embed_(?:vision|audio)|multi_modal_projector|"
        r"sound_\w+|image_newline|view_seperator)(?:\.|$)"
    ),
}
_LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.")


def text_tensors(
    folder: SafetensorsFolder, num_hidden_layers: int, next_token_layers: int
) -> tuple[SafetensorsFolder, str | None]:
    """Return the folder's text tensors, renamed, and one line on what was left out.

    Args:
        next_token_layers: how many layers after the decoder's own predict further tokens.
    """
    is_nested = any(_NESTED.match(name) for name in folder.tensors)
    kept: dict[str, SafetensorsTensor] = {}
    left_out: dict[str, list[SafetensorsTensor]] = {}
    for name, tensor in folder.tensors.items():
        text_name = _text_name(name) if is_nested else name
        part = _other_part(name, text_name, num_hidden_layers, next_token_layers)
        if text_name is None or part is not None:
            left_out.setdefault(part or "vision or audio", []).append(tensor)
        else:
            kept[text_name] = replace(tensor, name=text_name)
    return SafetensorsFolder(folder.files, kept), _describe(left_out)


def _text_name(name: str) -> str | None:
    """``model.language_model.layers.0...`` -> ``model.layers.0...``; None for another part's tensor."""
    match = _NESTED.match(name)
    if match is None:
        return (
            name if name.startswith("lm_head.") or _OTHER_PARTS["next-token prediction"].match(name) else None
        )
    rest = name[match.end() :]
    return rest if rest.startswith("lm_head.") else f"model.{rest}"


def _other_part(
    name: str, text_name: str | None, num_hidden_layers: int, next_token_layers: int
) -> str | None:
    for part, pattern in _OTHER_PARTS.items():
        if pattern.match(name) or (text_name is not None and pattern.match(text_name)):
            return part
    layer = _LAYER.match(text_name or "")
    if layer and num_hidden_layers <= int(layer[1]) < num_hidden_layers + next_token_layers:
        return "next-token prediction"
    return None


def _describe(left_out: dict[str, list[SafetensorsTensor]]) -> str | None:
    if not left_out:
        return None
    parts = [
        f"{len(tensors)} tensors of {part} ({gib(sum(tensor.span.num_bytes for tensor in tensors))})"
        for part, tensors in sorted(left_out.items())
    ]
    return f"text only: left out {', '.join(parts)}"
