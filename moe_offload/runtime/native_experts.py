"""The experts that a layer's router chose for one token: served from RAM's slots, or shared with a device.

Native code has attention and router behind it when it comes here; cache and prefetch decide in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from moe_offload._native import DecodeStep
from moe_offload.residency.expert_cache import Step
from moe_offload.runtime.executor import ExpertExecutor
from moe_offload.runtime.hybrid_step import run_step
from moe_offload.runtime.native_decoder import NativeDecoder


class OneTokenExperts:
    """Serves what ``decoder.step`` chose last, and lets prefetch look ahead from there."""

    def __init__(self, decoder: NativeDecoder) -> None:
        self._decoder, self._step = decoder, decoder.step

    def run(self, executor: ExpertExecutor, *, was_watched: bool = False) -> None:
        """Serve the chosen experts from the caches, those at hand while the others are read.

        Args:
            was_watched: a run came to this layer, and who watched it has heard of the choice.
        """
        expert_ids, weights = self._step.choice()
        if was_watched:
            seen, natively = self._step.router_input, executor.prefetcher.look_ahead_natively
            look_ahead: Callable[[], None] = partial(natively, executor.layer_idx, seen, expert_ids, weights)
        else:
            look_ahead = self._tell_routed(executor, expert_ids, weights)
        if executor.is_hybrid:
            self._share_with_device(executor, expert_ids, weights, look_ahead)
        else:
            self._serve_from_ram(executor, expert_ids, weights, look_ahead)
        executor.on_layer_done(executor.layer_idx)

    def _tell_routed(
        self, executor: ExpertExecutor, expert_ids: list[int], weights: list[float]
    ) -> Callable[[], None]:
        """Tell recorder and prefetcher what a layer chose; return what looks ahead from there."""
        layer_idx, prefetcher = executor.layer_idx, executor.prefetcher
        if executor.on_route is None and not prefetcher.is_on:
            return _nothing
        if executor.on_route is None and prefetcher.serves_one_token:
            prefetcher.routed_one(layer_idx, expert_ids, weights)
            seen = self._step.router_input
            return partial(prefetcher.look_ahead_one, layer_idx, seen, expert_ids, weights)
        router_input = self._decoder.router_input().to(self._decoder.dtype, copy=True)
        chosen, chosen_weights = np.array([expert_ids]), np.array([weights], np.float32)
        if executor.on_route is not None:
            tensors = torch.from_numpy(chosen), torch.from_numpy(chosen_weights)
            executor.on_route(layer_idx, router_input, *tensors)
        prefetcher.routed(layer_idx, expert_ids, chosen, chosen_weights)
        return partial(prefetcher.look_ahead, layer_idx, router_input, chosen, chosen_weights)

    def _share_with_device(
        self,
        executor: ExpertExecutor,
        expert_ids: list[int],
        weights: list[float],
        look_ahead: Callable[[], None],
    ) -> None:
        assert executor.hybrid is not None
        rows = OneTokenRows(self._step, executor.layer_idx, expert_ids, weights)
        done = run_step(executor.hybrid, rows, look_ahead)
        assert done, "a pool has slots for one token's experts"
        self._step.add_expert_rows(executor.layer_idx)

    def _serve_from_ram(
        self,
        executor: ExpertExecutor,
        expert_ids: list[int],
        weights: list[float],
        look_ahead: Callable[[], None],
    ) -> None:
        layer_idx, cache = executor.layer_idx, executor.cache
        step = cache.begin(layer_idx, expert_ids, weights)
        assert step is not None, "a pool has slots for one token's experts"
        try:
            look_ahead()
            if step.pending:
                self._compute_as_they_arrive(executor, step)
            else:
                self._step.experts(layer_idx, cache.step_addresses(step, expert_ids))
        except BaseException:
            cache.abort(step)
            raise
        cache.end(step)

    def _compute_as_they_arrive(self, executor: ExpertExecutor, step: Step) -> None:
        layer_idx, cache = executor.layer_idx, executor.cache
        position_of = {expert_id: i for i, expert_id in enumerate(step.expert_ids)}
        groups = [step.ready, *([expert_id] for expert_id in cache.by_arrival(step))]
        for expert_ids in groups:
            if not expert_ids:
                continue
            if expert_ids is not step.ready:
                cache.wait(step, expert_ids[0])
            positions = [position_of[expert_id] for expert_id in expert_ids]
            self._step.expert_rows(layer_idx, positions, cache.step_addresses(step, expert_ids))
        self._step.add_expert_rows(layer_idx)


class OneTokenRows:
    """The rows of one token's experts inside the native step; a StepRows of hybrid.py."""

    def __init__(self, step: DecodeStep, layer_idx: int, expert_ids: list[int], weights: list[float]) -> None:
        self.step, self._layer_idx = step, layer_idx
        self.expert_ids, self.weights = expert_ids, weights
        self.pair_offsets = list(range(len(expert_ids) + 1))
        self.pair_tokens = [0] * len(expert_ids)
        self.num_tokens = 1
        self.hidden_address, self.rows_address = step.router_input, step.rows_address

    def compute(self, positions: list[int], addresses: list[int]) -> None:
        """Fill in the rows of the experts at ``positions``, from the addresses of their matrices."""
        if positions:
            self.step.expert_rows(self._layer_idx, positions, addresses)


def _nothing() -> None:
    """Look at nothing: nobody prefetches."""
