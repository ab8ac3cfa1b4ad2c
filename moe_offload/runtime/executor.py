"""Run one MoE layer's experts from the cache: what the router asks for, in ascending expert id.

The order of summation and the arithmetic do not depend on where an expert was found, so a budget,
a policy or a prefetch changes the time of a token and never the token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_offload.config import DECODE_STEP_MAX_TOKENS
from moe_offload.errors import ConfigError
from moe_offload.expert_ops import ExpertKernel, weighted_sum
from moe_offload.planning.prompt_chunks import first_needed
from moe_offload.residency.expert_cache import ExpertCache, Step
from moe_offload.residency.prefetch import Prefetcher
from moe_offload.runtime.expert_calls import expert_calls
from moe_offload.runtime.hybrid import HybridLayer
from moe_offload.runtime.hybrid_step import run_step
from moe_offload.runtime.hybrid_stream import stream_layer


class Routing:
    """A step's (token, expert) pairs, grouped by expert in ascending id.

    Attributes:
        expert_ids: (n,) the experts of the step, ascending.
        pair_offsets: (n + 1,) expert i owns pairs [pair_offsets[i], pair_offsets[i + 1]).
        pair_tokens: (P,) row of ``hidden_states`` of each pair.
        pair_weights: (P,) float32 routing weights.
    """

    def __init__(self, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        chosen = top_k_index.numpy().reshape(-1)  # (T * K,)
        order = np.argsort(chosen, kind="stable")
        by_expert = chosen[order]
        if len(top_k_index) == 1:  # a token's experts differ from one another
            starts = np.arange(len(order))
        else:
            starts = np.flatnonzero(np.diff(by_expert, prepend=-1))
        self.expert_ids: NDArray[np.int32] = by_expert[starts].astype(np.int32)
        self.pair_offsets: NDArray[np.int32] = np.append(starts, len(order)).astype(np.int32)
        self.pair_tokens: NDArray[np.int32] = (order // top_k_index.shape[-1]).astype(np.int32)
        self.pair_weights = top_k_weights.float().reshape(-1)[torch.from_numpy(order)].contiguous()

    def pairs_of(self, position: int) -> slice:
        """Pairs of the expert at ``position`` in ``expert_ids``."""
        return slice(int(self.pair_offsets[position]), int(self.pair_offsets[position + 1]))


class TorchRows:
    """A step's unweighted expert outputs (P, H), put together from parts; a StepRows of hybrid.py."""

    def __init__(self, kernel: ExpertKernel, hidden: Tensor, routing: Routing, weights: list[float]) -> None:
        self._kernel, self._hidden, self._routing = kernel, hidden, routing
        self.rows = torch.empty(len(routing.pair_tokens), hidden.shape[-1])
        self.expert_ids: list[int] = routing.expert_ids.tolist()
        self.weights = weights
        self.pair_offsets: list[int] = routing.pair_offsets.tolist()
        self.pair_tokens: list[int] = routing.pair_tokens.tolist()
        self.num_tokens = len(hidden)
        self.hidden_address, self.rows_address = hidden.data_ptr(), self.rows.data_ptr()
        self.step = None

    def compute(self, positions: list[int], addresses: list[int]) -> None:
        """Fill in the rows of the experts at ``positions``, from the addresses of their matrices."""
        if not positions:
            return
        routing = self._routing
        pairs = [routing.pairs_of(position) for position in positions]
        tokens = np.concatenate([routing.pair_tokens[pair] for pair in pairs])
        offsets = np.cumsum([0, *(pair.stop - pair.start for pair in pairs)], dtype=np.int32)
        ids = routing.expert_ids[positions]
        where = np.array(addresses, np.uint64).reshape(len(positions), -1)
        part = self._kernel.rows(self._hidden, ids, where, offsets, tokens)
        for pair, start, end in zip(pairs, offsets, offsets[1:], strict=False):
            self.rows[pair] = part[start:end]


class ExpertExecutor:
    """What stands in for the experts module's forward of one layer."""

    def __init__(
        self,
        kernel: ExpertKernel,
        layer_idx: int,
        cache: ExpertCache,
        prefetcher: Prefetcher,
        on_layer_done: Callable[[int], None],
    ) -> None:
        self.kernel, self.layer_idx = kernel, layer_idx
        self.cache, self.prefetcher, self.on_layer_done = cache, prefetcher, on_layer_done
        self._pair_macs = sum(matrix.rows * matrix.cols for matrix in kernel.layout.matrices)
        self.on_route: Callable[[int, Tensor, Tensor, Tensor], None] | None = None  # recorder.py
        self.hybrid: HybridLayer | None = None  # the layer's share on a device

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, K), (T, K) -> (T, H) in the input's dtype: one rounding at the end.

        Raises:
            ConfigError: gradients are asked for, or ids or shapes are not those of the layer.
        """
        self._check(hidden_states, top_k_index, top_k_weights)
        hidden = hidden_states.float().contiguous()
        out = torch.zeros_like(hidden)
        self._add(hidden_states, hidden, top_k_index, top_k_weights, out)
        return out.to(hidden_states.dtype)

    def _check(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Refuse what only code from outside can ask for: a router or a call of one's own."""
        if hidden_states.requires_grad or top_k_weights.requires_grad:
            raise ConfigError(
                "gradients are not possible on an offloaded model, whose experts torch does not compute; "
                "call it under torch.no_grad()"
            )
        shapes = [tuple(tensor.shape) for tensor in (hidden_states, top_k_index, top_k_weights)]
        if shapes[1] != shapes[2] or shapes[0][0] != shapes[1][0]:
            raise ConfigError(f"layer {self.layer_idx}: shapes {shapes} are not (T, H), (T, K) and (T, K)")
        low, high = (int(end) for end in top_k_index.aminmax()) if top_k_index.numel() else (0, 0)
        num_experts = self.kernel.layout.num_experts
        if low < 0 or high >= num_experts:
            wrong = low if low < 0 else high
            raise ConfigError(f"layer {self.layer_idx} has {num_experts} experts and no expert {wrong}")

    def add_experts(
        self,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        out: Tensor,
        dtype: torch.dtype,
        *,
        is_part: bool = False,
    ) -> None:
        """Add the experts' weighted outputs to ``out`` (T, H) in ascending id; all float32 but the ids.

        Args:
            dtype: the model's, in which recorder and predictors see ``hidden``.
            is_part: these are a few of many tokens, so the caches are gone past however few they are.
        """
        watched = self.on_route is not None or (len(hidden) <= DECODE_STEP_MAX_TOKENS and not is_part)
        router_input = hidden.to(dtype, copy=True) if watched else hidden
        self._add(router_input, hidden, top_k_index, top_k_weights, out, is_part)

    def first_needed(self, num_tokens: int, num_kept: int, top_k: int) -> int:
        """Return from which token of a prompt on this layer is computed, when it is the last one.

        A recorder is told of all tokens, and a device is given work by layers alike.
        """
        if self.on_route is not None or self.hybrid is not None:
            return 0
        return first_needed(num_tokens, num_kept, self.cache.num_newcomers(self.layer_idx), top_k)

    def _add(
        self,
        router_input: Tensor,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        out: Tensor,
        is_part: bool = False,
    ) -> None:
        if self.on_route is not None:
            self.on_route(self.layer_idx, router_input, top_k_index, top_k_weights)
        routing = Routing(top_k_index, top_k_weights)
        chosen = top_k_index.numpy(), top_k_weights.float().numpy()
        self.prefetcher.routed(self.layer_idx, routing.expert_ids, *chosen)
        look_ahead = partial(self.prefetcher.look_ahead, self.layer_idx, router_input, *chosen)
        if is_part or not self._decode(look_ahead, hidden, routing, out):
            self._stream(hidden, routing, out)
        self.on_layer_done(self.layer_idx)

    @property
    def is_hybrid(self) -> bool:
        """Whether a device computes some of the layer's experts."""
        return self.hybrid is not None and self.hybrid.is_on

    @staticmethod
    def _scores(routing: Routing) -> list[float]:
        """Routing weight of each expert, summed over the step's tokens."""
        sums: list[float] = np.add.reduceat(routing.pair_weights.numpy(), routing.pair_offsets[:-1]).tolist()
        return sums

    def _decode(self, look_ahead: Callable[[], None], hidden: Tensor, routing: Routing, out: Tensor) -> bool:
        """Serve a small step from the caches; False when it is not small, or RAM has no slots for it."""
        if len(hidden) > DECODE_STEP_MAX_TOKENS:
            return False
        if self.is_hybrid:
            assert self.hybrid is not None
            rows = TorchRows(self.kernel, hidden, routing, self._scores(routing))
            if not run_step(self.hybrid, rows, look_ahead):
                return False
            weighted_sum(out, rows.rows, routing.pair_tokens, routing.pair_weights)
            return True
        step = self.cache.begin(self.layer_idx, routing.expert_ids.tolist(), self._scores(routing))
        if step is None:
            return False
        self._from_ram(step, look_ahead, hidden, routing, out)
        return True

    def _from_ram(
        self, step: Step, look_ahead: Callable[[], None], hidden: Tensor, routing: Routing, out: Tensor
    ) -> None:
        """Serve a step from the cache: experts at hand compute while the others are read."""
        try:
            look_ahead()
            if step.pending:
                rows = self._rows_as_they_arrive(step, hidden, routing)
                weighted_sum(out, rows, routing.pair_tokens, routing.pair_weights)
            else:
                self._sum(hidden, routing, out)
        except BaseException:
            self.cache.abort(step)
            raise
        self.cache.end(step)

    def _rows_as_they_arrive(self, step: Step, hidden: Tensor, routing: Routing) -> Tensor:
        """Return the unweighted expert outputs (P, H) in the order of ``routing``."""
        rows = TorchRows(self.kernel, hidden, routing, [])
        position_of = {expert_id: i for i, expert_id in enumerate(rows.expert_ids)}
        rows.compute([position_of[i] for i in step.ready], self.cache.step_addresses(step, step.ready))
        for expert_id in step.pending:
            self.cache.wait(step, expert_id)
            rows.compute([position_of[expert_id]], self.cache.step_addresses(step, [expert_id]))
        return rows.rows

    def _sum(self, hidden: Tensor, routing: Routing, out: Tensor) -> None:
        """Compute and add all experts of a step in one call."""
        ids, weights = routing.expert_ids, routing.pair_weights
        pairs = routing.pair_offsets, routing.pair_tokens
        self.kernel.sum(hidden, ids, self._addresses(ids), *pairs, weights, out)

    def _addresses(self, expert_ids: NDArray[np.int32]) -> NDArray[np.uint64]:
        addresses = [self.cache.addresses(self.layer_idx, expert_id) for expert_id in expert_ids.tolist()]
        return np.array(addresses, np.uint64)

    def _stream(self, hidden: Tensor, routing: Routing, out: Tensor) -> None:
        """Serve many tokens: each expert once, past the decode cache, added in ascending id."""
        if self.is_hybrid:
            assert self.hybrid is not None
            shared = TorchRows(self.kernel, hidden, routing, [])
            stream_layer(self.hybrid, shared)
            weighted_sum(out, shared.rows, routing.pair_tokens, routing.pair_weights)
            return
        self._stream_from_ram(hidden, routing, out)

    def _stream_from_ram(self, hidden: Tensor, routing: Routing, out: Tensor) -> None:
        """Compute what is in memory in one call while the rest is being read."""
        offsets, ids = routing.pair_offsets, routing.expert_ids
        batches = self.cache.stream_batches(self.layer_idx, ids.tolist(), np.diff(offsets).tolist())
        start = 0
        with closing(batches):
            for batch in batches:
                end = start + len(batch)
                addresses = np.array([there for _, there in batch], np.uint64)
                for which, part in expert_calls(offsets[start : end + 1], self._pair_macs):
                    pairs = slice(int(part[0]), int(part[-1]))
                    chosen = ids[start:end][which], addresses[which], part - part[0]
                    weighted = routing.pair_tokens[pairs], routing.pair_weights[pairs]
                    self.kernel.sum(hidden, *chosen, *weighted, out)
                start = end


def offloaded_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Stand in for an experts module's forward (transformers' ExpertsInterface).

    Args:
        experts: its ``moe_offload_executor`` was attached at load.
        hidden_states: (T, H), what the router saw.
        top_k_index: (T, K), not sorted.
        top_k_weights: (T, K), bf16 or float32 by family.
    """
    executor: ExpertExecutor = experts.moe_offload_executor
    return executor(hidden_states, top_k_index, top_k_weights)
