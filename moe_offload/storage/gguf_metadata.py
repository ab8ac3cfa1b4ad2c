"""Checked access to a GGUF's metadata, and the parts of a config that all decoders share.

A key that nobody asked for is one whose meaning would be lost: ``refuse_unread_keys`` names it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

from moe_offload.errors import CheckpointError
from moe_offload.storage.config_view import MAX_CONTEXT, MAX_EXPERTS, MAX_LAYERS, MAX_VOCAB, ConfigView
from moe_offload.storage.expert_format import FLOAT_TYPES, GgmlType
from moe_offload.storage.gguf import GgufArray, GgufHeader
from moe_offload.storage.header_reader import HeaderReader

# Keys of an architecture that say nothing about its numbers.
_WITHOUT_EFFECT = frozenset({"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"})
# Values at which a key changes nothing: converters write what a model's config.json names, in use or not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_gating_func": (0, 1),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "interleave_moe_layer_step": (1,),
    "leading_dense_block_count": (0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
}


class _ReadKeys(dict[str, Any]):
    """A mapping that remembers which keys were asked for."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        super().__init__(items)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)


class MetadataView(ConfigView):
    """The keys of one architecture; names are given without its prefix."""

    def __init__(self, header: GgufHeader, architecture: str) -> None:
        self.keys = _ReadKeys(header.metadata)
        super().__init__(self.keys, {}, str(header.path))
        self.header, self.architecture = header, architecture

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def fail(self, name: str, message: str) -> CheckpointError:
        """Return the error for a key of the architecture."""
        return CheckpointError(f"{self.where}: {self.key(name)} {message}")

    def count(self, name: str, low: int = 1, **limits: int) -> int:
        """Return an integer that must be there."""
        return self.integer(self.key(name), low=low, **limits)

    def maybe(self, name: str, low: int = 1, **limits: int) -> int | None:
        """Return an integer, None where the key is absent."""
        return self.optional(self.key(name), low=low, **limits)

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive float, or ``default`` when the key is absent."""
        value = self.config.get(self.key(name), default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.fail(name, f"must be a positive number, found {value!r:.80}")
        return _shortest(value)

    def switch(self, name: str, default: bool) -> bool:
        return self.flag(self.key(name), default)

    def counts(self, name: str, length: int) -> list[int]:
        """Return one integer for each layer: the file has an array, or one number for all."""
        value = self.config.get(self.key(name))
        if isinstance(value, GgufArray):
            values = self.header.array(self.key(name), int) or []
            if len(values) != length or any(item < 0 for item in values):
                raise self.fail(name, f"must hold a count for each of {length} layers, found {values!r:.80}")
            return values
        return [self.count(name)] * length

    def has(self, tensor: str) -> bool:
        """Whether the file holds a tensor."""
        return tensor in self.header.tensors

    def has_experts(self, layer_idx: int) -> bool:
        """Whether a layer's feed-forward is made of experts."""
        leaves = ("ffn_down_exps.weight", "ffn_down.0.weight")
        return any(self.has(f"blk.{layer_idx}.{leaf}") for leaf in leaves)

    def layers(self) -> int:
        """Return the decoder's layers, without those that predict further tokens."""
        blocks = self.count("block_count", high=MAX_LAYERS)
        extra = self.maybe("nextn_predict_layers", low=0, high=MAX_LAYERS) or 0
        if extra >= blocks:
            raise self.fail("nextn_predict_layers", f"is {extra}, but block_count is {blocks}")
        return blocks - extra

    def window(self) -> int | None:
        return self.maybe("attention.sliding_window", low=0, high=MAX_CONTEXT) or None

    def vocab_size(self) -> int:
        tokens = self.config.get("tokenizer.ggml.tokens")
        if isinstance(tokens, GgufArray) and tokens.count:
            return tokens.count
        return self.count("vocab_size", high=MAX_VOCAB)

    def refuse_unread_keys(self) -> None:
        """Raise for a key of the architecture that no rule here knows: it may change the model."""
        prefix = f"{self.architecture}."
        unread = sorted(
            key
            for key, value in self.header.metadata.items()
            if key.startswith(prefix)
            and key not in self.keys.read
            and key.removeprefix(prefix) not in _WITHOUT_EFFECT
            and value not in _NEUTRAL.get(key.removeprefix(prefix), ())
        )
        if unread:
            raise CheckpointError(
                f"{self.where}: metadata keys that this version does not know: {', '.join(unread)}; they may "
                "change what the model computes: use its safetensors folder"
            )


def decoder_config(view: MetadataView) -> dict[str, Any]:
    """Return what every decoder has and no attention decides."""
    vocab_size = view.vocab_size()
    return {
        "vocab_size": vocab_size,
        "hidden_size": view.count("embedding_length"),
        "num_hidden_layers": view.layers(),
        "num_attention_heads": view.count("attention.head_count"),
        "max_position_embeddings": view.count("context_length", high=MAX_CONTEXT),
        # llama.cpp writes the output projection only when it is not the embedding.
        "tie_word_embeddings": not view.has("output.weight"),
        "dtype": _dtype(view.header),
        **{
            f"{name}_token_id": view.optional(f"tokenizer.ggml.{key}_token_id", low=0, high=vocab_size - 1)
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }


def attention_config(view: MetadataView, *, partial_rotary: bool = False) -> dict[str, Any]:
    """Return ``decoder_config`` with plain attention: one head size, rotary embedding on all of it.

    Args:
        partial_rotary: the rotary embedding may turn only a part of each head.
    """
    config = decoder_config(view)
    heads = config["num_attention_heads"]
    head_dim = view.maybe("attention.key_length") or config["hidden_size"] // heads
    rotated = view.maybe("rope.dimension_count")
    for name, found in (
        ("attention.value_length", view.maybe("attention.value_length")),
        ("rope.dimension_count", None if partial_rotary else rotated),
    ):
        if found is not None and found != head_dim:
            raise CheckpointError(
                f"{view.where}: {view.key(name)}={found} differs from the head size {head_dim}, "
                f"which {view.architecture} models of this version do not have"
            )
    rope = rope_parameters(view, head_dim)
    if partial_rotary:
        rope["partial_rotary_factor"] = (rotated or head_dim) / head_dim
    return config | {
        "num_key_value_heads": view.maybe("attention.head_count_kv", high=heads) or heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": view.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
    }


def experts_config(view: MetadataView, name: str = "num_experts") -> dict[str, Any]:
    """Return the counts of experts under the family's ``name``; a width is the architecture's own matter."""
    num_experts = view.count("expert_count", high=MAX_EXPERTS)
    return {
        name: num_experts,
        "num_experts_per_tok": view.count("expert_used_count", high=num_experts),
    }


def rope_parameters(view: MetadataView, rotary_dim: int) -> dict[str, Any]:
    """Return transformers' rope_parameters; llama.cpp's base is 10000 where the file names none."""
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": view.number("rope.freq_base", 10000.0),
    }
    if view.has("rope_freqs.weight"):
        return parameters | _divided_frequencies(view, rotary_dim)
    kind = view.config.get(view.key("rope.scaling.type"), "none")
    if view.key("rope.scale_linear") in view.config:  # files of 2023
        return parameters | {"rope_type": "linear", "factor": view.number("rope.scale_linear")}
    if kind == "none":
        for name in ("factor", "original_context_length"):  # of no stretching
            view.keys.read.add(view.key(f"rope.scaling.{name}"))
        return parameters
    if kind not in ("linear", "yarn"):
        raise view.fail("rope.scaling.type", f"{kind!r:.80} is unknown; linear and yarn are read")
    factor = view.number("rope.scaling.factor")
    parameters |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scale = view.number("rope.scaling.yarn_attn_factor", view.number("rope.scaling.attn_factor", 1.0))
        parameters |= {
            "original_max_position_embeddings": original_context(view),
            "beta_fast": view.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": view.number("rope.scaling.yarn_beta_slow", 1.0),
            "attention_factor": scale * (1.0 + 0.1 * math.log(factor)),
        }
    return parameters


def original_context(view: MetadataView) -> int:
    """Return the context before stretching; without a key nothing was stretched."""
    original = view.maybe("rope.scaling.original_context_length", high=MAX_CONTEXT)
    return original or view.count("context_length", high=MAX_CONTEXT)


def float_tensor(view: MetadataView, name: str, length: int) -> list[float]:
    """Return the numbers of a small F32 tensor that belongs into the config."""
    tensor = view.header.tensors[name]
    if tensor.ggml_type is not GgmlType.F32 or tensor.shape != (length,):
        raise CheckpointError(
            f"{view.where}: tensor {name!r} is {tensor.ggml_type.name} {tensor.shape}; "
            f"F32 {(length,)} is wanted: fetch the file again"
        )
    with HeaderReader(view.header.files[tensor.span.file_id]) as file:
        data = file.read(tensor.span.offset, tensor.span.num_bytes, f"tensor {name!r}")
    return list(struct.unpack(f"<{length}f", data))


def _divided_frequencies(view: MetadataView, rotary_dim: int) -> dict[str, Any]:
    """Llama 3's frequency divisors, kept as a tensor: transformers' longrope takes such a list."""
    factors = float_tensor(view, "rope_freqs.weight", rotary_dim // 2)
    if all(factor == 1.0 for factor in factors):
        return {}
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": view.count("context_length", high=MAX_CONTEXT),
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
