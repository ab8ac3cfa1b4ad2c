"""A loaded decoder described to the native decode step: addresses, types and shapes of its modules.

The door to ``_native.DecodeStep``. Weights are read where they are, packed or float; norms, biases
and sinks are small and kept as float32 copies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_offload import _native, ops
from moe_offload.errors import CheckpointError
from moe_offload.expert_ops import ActivationKind
from moe_offload.runtime.executor import ExpertExecutor
from moe_offload.runtime.expert_kernels import ACTIVATION_KINDS
from moe_offload.runtime.kv_cache import KVCache
from moe_offload.runtime.native_families import NATIVE_FAMILIES, WINDOW_OF_CONFIG
from moe_offload.runtime.quant_modules import QuantEmbedding, QuantLinear
from moe_offload.runtime.skeleton import GGML_TYPES, decoder_layers, router_of
from moe_offload.storage.expert_format import GgmlType

POSITIONS_PER_BLOCK = 64
_SPLIT_ROWS = 2  # csrc/cpu/ops.h: gate, up and down apart

LinearTuple = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class DescribedLayer:
    """A layer in the terms of ``_native.DecodeStep``; addresses are the host's."""

    attention: dict[str, Any]
    router: tuple[LinearTuple, int, bool, bool] | None  # None: the network is dense
    kernel: Any  # _native.ExpertKernel
    matrices: tuple[LinearTuple, ...]  # of a dense network


@dataclass(frozen=True)
class DecoderShape:
    """What the layers of a decoder have in common."""

    hidden_size: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


class NativeDecoder:
    """``step`` computes one token of ``model``; it keeps alive what it reads.

    Args:
        model: loaded, of one of NATIVE_FAMILIES.
        executors: by index, of the layers that have experts.
        kv: how keys and values are kept (planning.kv_format).
    """

    def __init__(self, model: Any, executors: Mapping[int, ExpertExecutor], kv: str | None = None) -> None:
        self._kept: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []  # (float32 copy, parameter of 16 bits)
        self.bytes_at: dict[int, int] = {}  # of every tensor described, by address
        self.described: list[DescribedLayer] = []
        config, decoder = model.config, model.get_decoder()
        layers: list[Any] = list(decoder_layers(model))[: config.num_hidden_layers]
        attention = layers[0].self_attn
        self.dtype = config.dtype
        self.rotary = RotaryTable(decoder.rotary_emb)
        self.shape = DecoderShape(
            hidden_size=config.hidden_size,
            num_kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            vocab_size=model.lm_head.weight.shape[0],
        )
        routers = {layer_idx: router_of(model, layer_idx) for layer_idx in executors}
        self.top_k: dict[int, int] = {layer_idx: router.top_k for layer_idx, router in routers.items()}
        self.native_shape: dict[str, float] = {
            "hidden_size": config.hidden_size,
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": attention.head_dim,
            "rotary_dim": 2 * self.rotary.half_dim,
            "eps": decoder.norm.variance_epsilon,
            "scaling": attention.scaling,
            "cache_type": int(GgmlType.Q8_0 if kv else GGML_TYPES[config.dtype]),
            "max_top_k": max((router.top_k for router in routers.values()), default=0),
        }
        self.final_norm, self.head = self._vector(decoder.norm.weight), self._linear(model.lm_head)
        self.step = _native.DecodeStep(
            self.native_shape, self._linear(decoder.embed_tokens), self.final_norm, self.head
        )
        floats = (ctypes.c_float * config.hidden_size).from_address(self.step.router_input)
        self._router_input = torch.frombuffer(floats, dtype=torch.float32)[None]
        for layer_idx, layer in enumerate(layers):
            described = self._attention(layer, config)
            if layer_idx in executors:
                self._add_experts(described, routers[layer_idx], executors[layer_idx], config.model_type)
            else:
                self._add_feed_forward(described, layer.mlp, config)

    def copy_vectors_again(self) -> None:
        """Take over what was changed in place in norms, biases and sinks of 16 bits."""
        for copy, vector in self._copies:
            copy.copy_(vector)

    def cached(self, cache: KVCache) -> list[tuple[int, int]]:
        """Return where each layer's keys and values begin."""
        shape = self.shape
        return [layer.addresses(shape.num_kv_heads, shape.head_dim, self.dtype) for layer in cache.layers]

    def router_input(self) -> Tensor:
        """Return a view of what the last router saw, (1, hidden_size) float32."""
        return self._router_input

    def _add_experts(
        self, attention: dict[str, Any], router: Any, executor: ExpertExecutor, model_type: str
    ) -> None:
        weighing = NATIVE_FAMILIES[model_type]
        normalizes = weighing == "all_normalized" or (weighing == "all" and bool(router.norm_topk_prob))
        described = self._linear(router), router.top_k, weighing == "chosen", normalizes
        self.step.add_moe_layer(attention, *described, executor.kernel.native)
        self.described.append(DescribedLayer(attention, described, executor.kernel.native, ()))

    def _add_feed_forward(self, attention: dict[str, Any], mlp: Any, config: Any) -> None:
        """Describe a dense gated network as the only expert of its layer."""
        if config.hidden_act not in ACTIVATION_KINDS:
            raise CheckpointError(
                f"activation {config.hidden_act!r} is unknown; known are {', '.join(ACTIVATION_KINDS)}"
            )
        linears = [self._linear(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down")]
        biases = [getattr(mlp, f"{name}_proj").bias for name in ("gate", "up", "down")]
        gate_up_bias = None if biases[0] is None else torch.cat([biases[0].float(), biases[1].float()])
        kernel = _native.ExpertKernel(
            [(ggml_type, rows, cols, False) for ggml_type, rows, cols, *_ in linears],
            _SPLIT_ROWS,
            1,
            ACTIVATION_KINDS.get(config.hidden_act, ActivationKind.SILU),
            0.0,
            0.0,
            self._vector(gate_up_bias),
            self._vector(biases[2]),
        )
        self.step.add_dense_layer(attention, kernel, [address for _, _, _, address, _, _ in linears])
        self.described.append(DescribedLayer(attention, None, kernel, tuple(linears)))

    def _attention(self, layer: Any, config: Any) -> dict[str, Any]:
        attention = layer.self_attn
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        window = getattr(attention, "sliding_window", None)
        if config.model_type in WINDOW_OF_CONFIG:
            window = config.sliding_window
        return {
            "norm": self._vector(layer.input_layernorm.weight),
            "query": self._linear(attention.q_proj),
            "key": self._linear(attention.k_proj),
            "value": self._linear(attention.v_proj),
            "out": self._linear(attention.o_proj),
            "q_norm": self._vector(q_norm.weight) if q_norm is not None else 0,
            "k_norm": self._vector(k_norm.weight) if k_norm is not None else 0,
            "norms_heads": q_norm is not None and q_norm.weight.numel() == attention.head_dim,
            "clip": getattr(config, "clip_qkv", None) or 0.0,
            "window": window or 0,
            "sinks": self._vector(getattr(attention, "sinks", None)),
            "feed_forward_norm": self._vector(layer.post_attention_layernorm.weight),
        }

    def _linear(self, module: Any) -> LinearTuple:
        """Describe a Linear, Embedding or router, packed or float, read in place."""
        weight: Tensor = module.weight
        if type(module) is QuantLinear:
            ggml_type, cols = module.ggml_type, module.in_features
        elif type(module) is QuantEmbedding:
            ggml_type, cols = module.ggml_type, module.embedding_dim
        elif type(module) in (nn.Linear, nn.Embedding) or hasattr(module, "top_k"):
            ggml_type, cols = GGML_TYPES[weight.dtype], weight.shape[1]
        else:
            raise CheckpointError(f"{type(module).__name__} is no layer that the native decode step can read")
        assert weight.is_contiguous(), "weights are read row by row"
        ops.set_codebook(ggml_type)
        self._kept.append(weight.detach())
        self.bytes_at[weight.data_ptr()] = weight.nbytes
        bias = self._vector(getattr(module, "bias", None))
        return int(ggml_type), weight.shape[0], cols, weight.data_ptr(), weight.nbytes, bias

    def _vector(self, tensor: Tensor | None) -> int:
        """Return the address of a float32 copy (or of the tensor itself), 0 for None."""
        if tensor is None:
            return 0
        kept = tensor.detach().float().contiguous()
        self._kept.append(kept)
        if kept.data_ptr() != tensor.data_ptr():
            self._copies.append((kept, tensor.detach()))
        self.bytes_at[kept.data_ptr()] = kept.nbytes
        return kept.data_ptr()


class RotaryTable:
    """Cosines and sines by position from the model's own rotary module, a block of positions at a time.

    Blocks begin at multiples of their size, so a position's numbers do not depend on who asked first.
    """

    def __init__(self, rotary: Any) -> None:
        self._rotary = rotary
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}
        self.half_dim: int = rotary.inv_freq.shape[0]

    def addresses(self, position: int) -> tuple[int, int]:
        """Return where the position's (half_dim,) float32 cosines and sines lie."""
        block, row = divmod(position, POSITIONS_PER_BLOCK)
        offset = row * self.half_dim * 4
        cos, sin = self._block(block)
        return cos.data_ptr() + offset, sin.data_ptr() + offset

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines, (count, half_dim) each, of the positions from ``first`` on."""
        numbers = range(first // POSITIONS_PER_BLOCK, (first + count - 1) // POSITIONS_PER_BLOCK + 1)
        skipped = first - numbers[0] * POSITIONS_PER_BLOCK
        cos, sin = zip(*(self._block(number) for number in numbers), strict=True)
        return torch.cat(cos)[skipped:][:count], torch.cat(sin)[skipped:][:count]

    def _block(self, number: int) -> tuple[Tensor, Tensor]:
        if number not in self._blocks:
            self._blocks[number] = self._compute(number * POSITIONS_PER_BLOCK)
        return self._blocks[number]

    @torch.no_grad()
    def _compute(self, first: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(first, first + POSITIONS_PER_BLOCK)[None]
        cos, sin = self._rotary(torch.empty(0, dtype=torch.float32), positions)
        half = self.half_dim  # some families repeat the halves
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
