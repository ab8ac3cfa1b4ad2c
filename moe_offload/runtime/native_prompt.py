"""A prompt's chunk in native code, layer by layer, instead of transformers' layers.

The bits of a token are those of NativeStep after the tokens before it, whatever else is in its chunk. What
is here for every token of a chunk, and what for a tile of it, planning/prompt_chunks.py counts. Between two
tiles Python runs, so that Ctrl-C does not wait for a long chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_offload._native import PromptStep
from moe_offload.planning.prompt_chunks import TILE_TOKENS
from moe_offload.runtime.executor import ExpertExecutor
from moe_offload.runtime.kv_cache import KVCache
from moe_offload.runtime.native_decoder import NativeDecoder


class NativePrompt:
    """Several new tokens of one sequence.

    Args:
        decoder: the model.
        executors: of every layer, None where it has no experts.
    """

    def __init__(self, decoder: NativeDecoder, executors: Sequence[ExpertExecutor | None]) -> None:
        self._decoder, self._executors = decoder, executors
        self.step = PromptStep(decoder.step)

    def run(self, inputs: dict[str, Any], cache: KVCache) -> Tensor:
        """Compute a forward of several tokens and return (1, kept tokens, vocab_size) float32 logits.

        Keys and values are written behind the cache's; it does not count them.
        """
        ids = inputs["input_ids"].contiguous()
        num_tokens, past_tokens = ids.shape[1], cache.get_seq_length()
        position_ids = inputs.get("position_ids")
        first = past_tokens if position_ids is None else int(position_ids.flatten()[0])
        cos, sin = self._decoder.rotary.rows(first, num_tokens)
        states = ChunkStates(
            num_tokens, self._decoder.shape.hidden_size, max(self._decoder.top_k.values(), default=0)
        )
        self.step.begin(ids.data_ptr(), num_tokens, (*states.addresses(), cos.data_ptr(), sin.data_ptr()))
        cached = self._decoder.cached(cache)
        num_kept = min(inputs.get("logits_to_keep") or num_tokens, num_tokens)
        for layer_idx, executor in enumerate(self._executors):
            needed = self._first_needed(layer_idx, num_tokens, num_kept)
            for start in range(0, num_tokens, TILE_TOKENS):
                tile = start, min(TILE_TOKENS, num_tokens - start), needed
                self.step.attend(layer_idx, *cached[layer_idx], cache.capacity_tokens, past_tokens, *tile)
            if executor is not None:
                routed = states.routed(self._decoder.top_k[layer_idx], needed)
                out, dtype = states.residual[needed:], self._decoder.dtype
                executor.add_experts(*routed, out, dtype, is_part=needed > 0)
        logits = torch.empty(1, num_kept, self._decoder.shape.vocab_size)
        self.step.logits(num_tokens - num_kept, logits.data_ptr())
        return logits

    def _first_needed(self, layer_idx: int, num_tokens: int, num_kept: int) -> int:
        """Return from which token on a layer has to be computed; before it, keys and values are."""
        if layer_idx < len(self._executors) - 1:
            return 0
        executor = self._executors[layer_idx]
        if executor is None:
            return num_tokens - num_kept
        return executor.first_needed(num_tokens, num_kept, self._decoder.top_k[layer_idx])


class ChunkStates:
    """What goes between native code and the experts of a layer.

    Attributes:
        residual: (T, H) float32, which experts are added to.
    """

    def __init__(self, num_tokens: int, hidden_size: int, top_k: int) -> None:
        self.residual = torch.empty(num_tokens, hidden_size)
        self._normed = torch.empty(num_tokens, hidden_size)
        self._top_k_index = torch.empty(num_tokens * top_k, dtype=torch.int32)
        self._top_k_weights = torch.empty(num_tokens * top_k)

    def addresses(self) -> tuple[int, int, int, int]:
        """Return where native code writes: residual, router input, choices, weights."""
        tensors = self.residual, self._normed, self._top_k_index, self._top_k_weights
        return tuple(tensor.data_ptr() for tensor in tensors)  # type: ignore[return-value]

    def routed(self, top_k: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the last router saw and chose: (T, H), (T, K) int32, (T, K), all float32 but ids.

        Of T tokens, those from ``first`` on.
        """
        num_tokens = len(self.residual)
        chosen = (part[: num_tokens * top_k] for part in (self._top_k_index, self._top_k_weights))
        top_k_index, top_k_weights = (part.view(num_tokens, top_k) for part in chosen)
        return self._normed[first:], top_k_index[first:], top_k_weights[first:]
