"""GGUF metadata → a Hugging Face config.

Every number that shapes the model is taken from the file; transformers' defaults never stand in
for one, and a key that no rule knows is refused by name. The architectures are described in
``gguf_llama``, ``gguf_qwen``, ``gguf_deepseek``, ``gguf_delta_net`` and ``gguf_hybrid``.
"""

from __future__ import annotations

from typing import Any

from moe_offload.errors import CheckpointError
from moe_offload.storage.config_view import ConfigView
from moe_offload.storage.gguf import GgufHeader
from moe_offload.storage.gguf_architecture import Architecture
from moe_offload.storage.gguf_deepseek import DEEPSEEK2, GLM4MOE
from moe_offload.storage.gguf_delta_net import QWEN3NEXT, QWEN35MOE
from moe_offload.storage.gguf_hybrid import GEMMA4, LFM2MOE
from moe_offload.storage.gguf_llama import GPT_OSS, GRANITEMOE, LLAMA, OLMOE, PHIMOE
from moe_offload.storage.gguf_metadata import MetadataView
from moe_offload.storage.gguf_qwen import QWEN2, QWEN2MOE, QWEN3, QWEN3MOE

MOE_ARCHITECTURES = {
    "qwen3moe": QWEN3MOE,
    "llama": LLAMA,
    "qwen2moe": QWEN2MOE,
    "olmoe": OLMOE,
    "deepseek2": DEEPSEEK2,
    "gpt-oss": GPT_OSS,
    "granitemoe": GRANITEMOE,
    "phimoe": PHIMOE,
    "glm4moe": GLM4MOE,
    "qwen3next": QWEN3NEXT,
    "qwen35moe": QWEN35MOE,
    "lfm2moe": LFM2MOE,
    "gemma4": GEMMA4,
}
DENSE_ARCHITECTURES = {"qwen2": QWEN2, "qwen3": QWEN3}

# Texts that end a turn or a document in the vocabularies of the supported families and their
# tunes; files often name only one of them as eos, and a chat would run past the end of its turn.
END_OF_GENERATION = frozenset({
    "<|endoftext|>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|return|>",
    "<|call|>", "<end_of_turn>", "<turn|>", "<end_of_utterance>", "<EOT>", "<｜end▁of▁sentence｜>", "[EOS]",
    "[e~[", "<|user|>", "<|observation|>", "_<EOT>", "<|END_OF_TURN_TOKEN|>",
})  # fmt: skip
# Of those, what begins a turn in other families, and so ends GLM's only.
_ENDS_IN_GLM = frozenset({"<|user|>", "<|observation|>"})
_GLM_MARKS = frozenset({"[gMASK]", "<sop>"})
# gpt-oss ends each of its channels with <|end|>: the answer comes after the first one.
_HARMONY_MARKS = frozenset({"<|channel|>", "<|message|>"})


def find_architecture(header: GgufHeader) -> Architecture:
    """Return the description of the file's architecture; an unknown one is refused with the known names."""
    name = header.metadata.get("general.architecture")
    known = MOE_ARCHITECTURES | DENSE_ARCHITECTURES
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(
            f"{header.path}: general.architecture {name!r:.80} is not supported; supported are "
            f"{', '.join(MOE_ARCHITECTURES)} and, with allow_dense=True, llama, "
            f"{', '.join(DENSE_ARCHITECTURES)}: use the model's safetensors folder"
        )
    return known[name]


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """Return the config.json of the model that ``header`` describes.

    Raises:
        CheckpointError: unknown architecture, or a key that is missing, unknown or out of range.
    """
    architecture = find_architecture(header)
    view = MetadataView(header, header.metadata["general.architecture"])
    config = architecture.config(view)
    view.refuse_unread_keys()
    return config


def gguf_generation_config(header: GgufHeader, config: dict[str, Any]) -> dict[str, Any]:
    """Return what ends a generation: the file's end tokens and the known end texts in its vocabulary."""
    where = str(header.path)
    view = ConfigView(header.metadata, {}, where)
    ends = {
        view.optional(f"tokenizer.ggml.{name}_token_id", low=0, high=config["vocab_size"] - 1)
        for name in ("eos", "eot", "eom")
    }
    tokens = header.array("tokenizer.ggml.tokens", str) or []
    ends.update(_end_ids(tokens))
    return {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": sorted(token_id for token_id in ends if token_id is not None),
        "pad_token_id": config["pad_token_id"],
    }


def _end_ids(tokens: list[str]) -> list[int]:
    """Return the ids of the known end texts of this vocabulary."""
    texts = set(tokens)
    ends = END_OF_GENERATION - (frozenset() if _GLM_MARKS & texts else _ENDS_IN_GLM)
    if texts >= _HARMONY_MARKS:
        ends -= {"<|end|>"}
    return [token_id for token_id, text in enumerate(tokens) if text in ends]
