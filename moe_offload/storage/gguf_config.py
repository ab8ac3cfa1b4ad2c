"""GGUF metadata → a Hugging Face config: one function per architecture.

Every number that shapes the model is taken from the file; transformers' defaults never stand in
for one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

from moe_offload.errors import CheckpointError
from moe_offload.storage.expert_format import FLOAT_TYPES, GgmlType
from moe_offload.storage.gguf import GgufArray, GgufHeader
from moe_offload.storage.gguf_tensors import has_experts
from moe_offload.storage.header_reader import HeaderReader
from moe_offload.storage.hf_config import MAX_CONTEXT, MAX_EXPERTS, MAX_LAYERS, MAX_VOCAB, ConfigView

_ROPE_FACTORS = "rope_freqs.weight"

# Texts that end a turn or a document in the vocabularies of the supported families and their
# tunes; files often name only one of them as eos, and a chat would run past the end of its turn.
END_OF_GENERATION = frozenset({
    "<|endoftext|>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|return|>",
    "<|call|>", "<end_of_turn>", "<end_of_utterance>", "<EOT>", "<｜end▁of▁sentence｜>",
})  # fmt: skip


class MetadataView(ConfigView):
    """Checked access to the keys of one architecture."""

    def __init__(self, header: GgufHeader, architecture: str) -> None:
        super().__init__(header.metadata, {}, str(header.path))
        self.header, self.architecture = header, architecture

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive float, or ``default`` when the key is absent."""
        value = self.config.get(self.key(name), default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise CheckpointError(
                f"{self.where}: {self.key(name)} must be a positive number, found {value!r:.80}"
            )
        return _shortest(value)

    def vocab_size(self) -> int:
        tokens = self.config.get("tokenizer.ggml.tokens")
        if isinstance(tokens, GgufArray) and tokens.count:
            return tokens.count
        return self.integer(self.key("vocab_size"), high=MAX_VOCAB)


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """Return the config.json of the model that ``header`` describes.

    Raises:
        CheckpointError: unknown architecture, or a key that is missing or out of range.
    """
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{header.path}: general.architecture {architecture!r:.80} is not supported; supported are "
            "qwen3moe, llama (Mixtral) and, with allow_dense=True, llama, qwen2 and qwen3"
        )
    view = MetadataView(header, architecture)
    return _common_config(view) | ARCHITECTURES[architecture](view)


def gguf_generation_config(header: GgufHeader, config: dict[str, Any]) -> dict[str, Any]:
    """Return what ends a generation: the file's end tokens and the known end texts in its vocabulary."""
    where = str(header.path)
    view = ConfigView(header.metadata, {}, where)
    ends = {
        view.optional(f"tokenizer.ggml.{name}_token_id", low=0, high=config["vocab_size"] - 1)
        for name in ("eos", "eot", "eom")
    }
    tokens = header.array("tokenizer.ggml.tokens", str) or []
    ends.update(token_id for token_id, text in enumerate(tokens) if text in END_OF_GENERATION)
    return {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": sorted(token_id for token_id in ends if token_id is not None),
        "pad_token_id": config["pad_token_id"],
    }


def _common_config(view: MetadataView) -> dict[str, Any]:
    """Return what every decoder has; the format itself defines the two defaults used here."""
    hidden_size = view.integer(view.key("embedding_length"))
    heads = view.integer(view.key("attention.head_count"))
    head_dim = view.optional(view.key("attention.key_length")) or hidden_size // heads
    for name in ("attention.value_length", "rope.dimension_count"):
        found = view.optional(view.key(name))
        if found is not None and found != head_dim:
            raise CheckpointError(
                f"{view.where}: {view.key(name)}={found} differs from the head size {head_dim}, "
                f"which {view.architecture} models of this version do not have"
            )
    vocab_size = view.vocab_size()
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": view.integer(view.key("block_count"), high=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": view.optional(view.key("attention.head_count_kv"), high=heads) or heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": view.integer(view.key("context_length"), high=MAX_CONTEXT),
        "rms_norm_eps": view.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_parameters(view),
        # llama.cpp writes the output projection only when it is not the embedding.
        "tie_word_embeddings": "output.weight" not in view.header.tensors,
        "dtype": _dtype(view.header),
        **{
            f"{name}_token_id": view.optional(f"tokenizer.ggml.{key}_token_id", low=0, high=vocab_size - 1)
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }


def _qwen3moe(view: MetadataView) -> dict[str, Any]:
    view.integer(view.key("attention.key_length"))
    layers = range(view.integer(view.key("block_count"), high=MAX_LAYERS))
    window = view.optional(view.key("attention.sliding_window"), low=0, high=MAX_CONTEXT) or None
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": view.integer(view.key("feed_forward_length")),
        "moe_intermediate_size": view.integer(view.key("expert_feed_forward_length")),
        "num_local_experts": view.integer(view.key("expert_count"), high=MAX_EXPERTS),
        "num_experts_per_tok": view.integer(view.key("expert_used_count"), high=MAX_EXPERTS),
        "norm_topk_prob": True,  # the architecture's meaning in llama.cpp; no key says so
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in layers if not has_experts(view.header, layer)],
        "attention_bias": "blk.0.attn_q.bias" in view.header.tensors,
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def _llama(view: MetadataView) -> dict[str, Any]:
    """Mixtral when the file has experts, else a dense Llama (or Mistral, when it has a window)."""
    intermediate_size = view.integer(view.key("feed_forward_length"))
    window = view.optional(view.key("attention.sliding_window"), low=0, high=MAX_CONTEXT) or None
    num_experts = view.optional(view.key("expert_count"), low=0, high=MAX_EXPERTS)
    if num_experts:
        return {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "intermediate_size": intermediate_size,
            "num_local_experts": num_experts,
            "num_experts_per_tok": view.integer(view.key("expert_used_count"), high=num_experts),
            "sliding_window": window,
        }
    if window is not None:
        return {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "intermediate_size": intermediate_size,
            "sliding_window": window,
        }
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": intermediate_size,
        "attention_bias": "blk.0.attn_q.bias" in view.header.tensors,
    }


def _dense_qwen(view: MetadataView) -> dict[str, Any]:
    number = view.architecture.removeprefix("qwen")
    window = view.optional(view.key("attention.sliding_window"), low=0, high=MAX_CONTEXT)
    if window:
        raise CheckpointError(
            f"{view.where}: {view.architecture} with attention.sliding_window={window}: the file does not "
            "say which layers have the window; use the safetensors folder of the model"
        )
    return {
        "model_type": view.architecture,
        "architectures": [f"Qwen{number}ForCausalLM"],
        "intermediate_size": view.integer(view.key("feed_forward_length")),
        "use_sliding_window": False,
    }


ARCHITECTURES: dict[str, Callable[[MetadataView], dict[str, Any]]] = {
    "qwen3moe": _qwen3moe,
    "llama": _llama,
    "qwen2": _dense_qwen,
    "qwen3": _dense_qwen,
}


def _rope_parameters(view: MetadataView) -> dict[str, Any]:
    """Return transformers' rope_parameters; llama.cpp's base is 10000 where the file names none."""
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": view.number("rope.freq_base", 10000.0),
    }
    if _ROPE_FACTORS in view.header.tensors:
        return parameters | _rope_factors(view)
    kind = view.config.get(view.key("rope.scaling.type"), "none")
    if view.key("rope.scale_linear") in view.config:  # files of 2023
        return parameters | {"rope_type": "linear", "factor": view.number("rope.scale_linear")}
    if kind == "none":
        return parameters
    if kind not in ("linear", "yarn"):
        raise CheckpointError(
            f"{view.where}: {view.key('rope.scaling.type')} {kind!r:.80} is unknown; linear and yarn are read"
        )
    factor = view.number("rope.scaling.factor")
    parameters |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = view.optional(view.key("rope.scaling.original_context_length"), high=MAX_CONTEXT)
        scale = view.number("rope.scaling.yarn_attn_factor", view.number("rope.scaling.attn_factor", 1.0))
        parameters |= {
            "original_max_position_embeddings": original
            or view.integer(view.key("context_length"), high=MAX_CONTEXT),
            "beta_fast": view.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": view.number("rope.scaling.yarn_beta_slow", 1.0),
            "attention_factor": scale * (1.0 + 0.1 * math.log(factor)),
        }
    return parameters


def _rope_factors(view: MetadataView) -> dict[str, Any]:
    """Llama 3's frequency divisors, kept as a tensor: transformers' longrope takes such a list."""
    tensor = view.header.tensors[_ROPE_FACTORS]
    head_dim = view.optional(view.key("attention.key_length")) or view.integer(
        view.key("embedding_length")
    ) // view.integer(view.key("attention.head_count"))
    if tensor.ggml_type is not GgmlType.F32 or tensor.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{view.where}: tensor {_ROPE_FACTORS!r} is {tensor.ggml_type.name} {tensor.shape}; "
            f"F32 {(head_dim // 2,)} is wanted: fetch the file again"
        )
    path = view.header.files[tensor.span.file_id]
    with HeaderReader(path) as file:
        data = file.read(tensor.span.offset, tensor.span.num_bytes, f"tensor {_ROPE_FACTORS!r}")
    factors = list(struct.unpack(f"<{head_dim // 2}f", data))
    if all(factor == 1.0 for factor in factors):
        return {}
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": view.integer(view.key("context_length"), high=MAX_CONTEXT),
    }


def _dtype(header: GgufHeader) -> str:
    """The float type to compute in: that of an unquantized file, else float32 as in llama.cpp."""
    types = {tensor.ggml_type for tensor in header.tensors.values()}
    if types <= FLOAT_TYPES and GgmlType.BF16 in types:
        return "bfloat16"
    return "float16" if types <= FLOAT_TYPES and GgmlType.F16 in types else "float32"


def _shortest(value: float) -> float:
    """The shortest decimal that the file's float32 can mean: 1e-06, not 9.999999974752427e-07."""
    for digits in range(6, 9):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("<f", candidate) == struct.pack("<f", value):
            return candidate
    return float(value)
