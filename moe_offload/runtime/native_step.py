"""One token's forward in native code, instead of transformers' layers; a prompt's is native_prompt.

native_request tells which forwards qualify; others take transformers' layers. Routing, cache and
prefetch see the same calls on both ways.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from moe_offload.config import PREFILL_CHUNK_TOKENS
from moe_offload.errors import DeviceError
from moe_offload.planning.dense_prompts import PromptCosts
from moe_offload.planning.plans import DensePlan
from moe_offload.planning.prompt_chunks import constant_chunks, even_chunks
from moe_offload.residency.accelerator import Device
from moe_offload.runtime.device_dense import DeviceDense
from moe_offload.runtime.executor import ExpertExecutor
from moe_offload.runtime.hybrid_run import HybridRun
from moe_offload.runtime.kv_cache import KVCache
from moe_offload.runtime.native_decoder import NativeDecoder
from moe_offload.runtime.native_experts import OneTokenExperts
from moe_offload.runtime.native_prompt import NativePrompt
from moe_offload.runtime.native_request import ServedForwards

REST_AFTER_TOKENS = 2


class NativeStep:
    """Forwards of ``model``, layer by layer: attention and router, then the experts it chose.

    Args:
        model: loaded, of a family that ``native_step_reason`` accepts. Not kept, only its parts.
        executors: by index, of the layers that have experts.
        kv: how keys and values are kept (planning.kv_format).
        longest_chunk: tokens of a prompt that there is memory for at once (planning.prompt_chunks).
    """

    def __init__(
        self,
        model: Any,
        executors: Mapping[int, ExpertExecutor],
        kv: str | None = None,
        longest_chunk: int = PREFILL_CHUNK_TOKENS,
    ) -> None:
        self._longest_chunk = longest_chunk
        self._decoder = NativeDecoder(model, executors, kv)
        self.dense: DeviceDense | None = None  # layers that run on a device
        self._step = self._decoder.step
        self._executors = [executors.get(i) for i in range(model.config.num_hidden_layers)]
        self._moe_executors = [executor for executor in self._executors if executor is not None]
        self._table_addresses: list[int] | None = None  # of the layers' experts, 0 for a dense layer
        self._hybrid_run: HybridRun | None = None  # made when a device is first there
        self._needs_seen, self._tokens_without_need = -1, 0
        self._dtype = model.config.dtype
        self._output = maker_of(MoeCausalLMOutputWithPast if executors else CausalLMOutputWithPast)
        self._served = ServedForwards(model, kv)
        self._prompt = NativePrompt(self._decoder, self._executors)
        self._run_experts = OneTokenExperts(self._decoder).run

    def use_device(
        self, device: Device, plan: DensePlan, address: int, prompt_costs: PromptCosts | None
    ) -> None:
        """Run the plan's layers on a device from now on; arguments as DeviceDense's."""
        self.dense = DeviceDense(device, plan, self._decoder, address, prompt_costs)

    def serves(self, inputs: dict[str, Any]) -> bool:
        """Whether this forward is one that native code computes; depends on no placement."""
        return self._served.accepts(inputs)

    def chunk_sizes(self, num_tokens: int) -> list[int]:
        """Return the chunks of a prompt; a device has room for constant ones."""
        if any(executor.hybrid is not None for executor in self._moe_executors):
            return constant_chunks(num_tokens)
        return even_chunks(num_tokens, self._longest_chunk)

    @torch.no_grad()
    def run(self, inputs: dict[str, Any]) -> Any:
        """Compute a forward that ``serves`` accepted; the cache grows only when all of it is done."""
        dense, num_tokens = self.dense, inputs["input_ids"].shape[1]
        if inputs["past_key_values"].get_seq_length() == 0:
            self._decoder.copy_vectors_again()
        if dense is None:
            return self._run_tokens(inputs)
        step = self._step if num_tokens == 1 else self._prompt.step
        if not dense.takes(num_tokens):
            step.use_device(None, 0, False)
            return self._run_tokens(inputs)
        try:
            dense.begin(step, inputs["past_key_values"])
            out = self._run_tokens(inputs)
        except DeviceError as error:  # the cache has not grown: the CPU begins the tokens anew
            dense.failed(error)
            step.use_device(None, 0, False)
            return self._run_tokens(inputs)
        dense.done(inputs["past_key_values"], num_tokens)
        return out

    def _run_tokens(self, inputs: dict[str, Any]) -> Any:
        cache: KVCache = inputs["past_key_values"]
        num_tokens = inputs["input_ids"].shape[1]
        logits = self._one_token(inputs, cache) if num_tokens == 1 else self._prompt.run(inputs, cache)
        cache.grew_by(num_tokens)
        return self._output(logits.to(self._dtype), cache)

    def _one_token(self, inputs: dict[str, Any], cache: KVCache) -> Tensor:
        shape = self._decoder.shape
        num_tokens = cache.get_seq_length()
        position_ids = inputs.get("position_ids")
        position = num_tokens if position_ids is None else int(position_ids)
        self._step.begin(int(inputs["input_ids"]), *self._decoder.rotary.addresses(position))
        cached = self._decoder.cached(cache)
        tables = self._tables()
        if tables is not None:
            self._run_residents(cached, cache.capacity_tokens, num_tokens, tables)
        elif self._may_share_in_runs():
            self._share_layers(cached, cache.capacity_tokens, num_tokens)
        else:
            self._run_layers(cached, cache.capacity_tokens, num_tokens)
        logits = torch.empty(1, 1, shape.vocab_size)
        self._step.logits(logits.data_ptr())
        if tables is not None and self._moe_executors:
            prefetcher = self._moe_executors[0].prefetcher
            prefetcher.look_at_next_token(partial(self._step.expect_next, logits.data_ptr()))
        return logits

    def _tables(self) -> list[int] | None:
        """Return the addresses of the layers' expert tables, 0 for a dense layer.

        None while a device computes some of them, while the routing is recorded, or while only Python can
        look ahead: then it decides between a layer's router and its experts.
        """
        if not self._moe_executors:
            return [0] * len(self._executors)
        first = self._moe_executors[0]
        if any(executor.is_hybrid for executor in self._moe_executors):
            return None
        looks_natively = first.prefetcher.looks_natively
        if first.on_route is not None or not (self._prefetch_rests(first) or looks_natively):
            return None
        if self._table_addresses is None:
            self._table_addresses = [
                0 if executor is None else executor.cache.resident_table(i).ctypes.data
                for i, executor in enumerate(self._executors)
            ]
        return self._table_addresses

    def _prefetch_rests(self, executor: ExpertExecutor) -> bool:
        """Whether nothing prefetches, or nothing has to leave and no token needed a read for some tokens."""
        needs = executor.prefetcher.needs_not_resident
        self._tokens_without_need = self._tokens_without_need + 1 if needs == self._needs_seen else 0
        self._needs_seen = needs
        rests = self._tokens_without_need > REST_AFTER_TOKENS and executor.cache.has_slots_for_all
        return not executor.prefetcher.is_on or rests

    def _run_residents(
        self, cached: list[tuple[int, int]], capacity: int, num_tokens: int, tables: list[int]
    ) -> None:
        """Compute layer after layer without coming back, but where an expert has to be read."""
        prefetcher = self._moe_executors[0].prefetcher if self._moe_executors else None
        layer_idx = 0
        try:
            while layer_idx < len(self._executors):
                first = layer_idx
                watch = None if prefetcher is None else prefetcher.begin_run(first - 1)
                layer_idx = self._step.run(first, cached, capacity, num_tokens, tables, watch)
                arrived = [] if prefetcher is None else prefetcher.end_run()
                self._count_run(first, layer_idx, arrived)
                if layer_idx < len(self._executors):
                    executor = self._executors[layer_idx]
                    assert executor is not None, "only a layer with experts stops the run"
                    self._run_experts(executor, was_watched=watch is not None)
                    layer_idx += 1
        finally:
            if prefetcher is not None:
                prefetcher.end_run()

    def _may_share_in_runs(self) -> bool:
        """Whether a device computes some experts, and Python has nothing to do but decide who does."""
        if not any(executor.hybrid is not None for executor in self._moe_executors):
            return False
        first = self._moe_executors[0]
        if first.on_route is not None or not self._prefetch_rests(first):
            return False
        if self._hybrid_run is None:
            self._hybrid_run = HybridRun(self._step, self._executors, self._decoder.top_k)
        return self._hybrid_run.is_possible

    def _share_layers(self, cached: list[tuple[int, int]], capacity: int, num_tokens: int) -> None:
        """Compute layer after layer on both sides, coming back where an expert has to be read or copied."""
        assert self._hybrid_run is not None
        layer_idx = 0
        while layer_idx < len(self._executors):
            layer_idx = self._hybrid_run.run(layer_idx, cached, capacity, num_tokens)
            if layer_idx < len(self._executors):
                executor = self._executors[layer_idx]
                assert executor is not None, "only a layer with experts stops the run"
                self._run_experts(executor)
                layer_idx += 1
                if not self._hybrid_run.is_possible:
                    return self._run_layers(cached, capacity, num_tokens, layer_idx)

    def _count_run(self, first: int, end: int, arrived: list[tuple[int, int]]) -> None:
        """Tell cache and handle of layers that were computed in one go."""
        if not self._moe_executors or first == end:
            return
        steps = self._step.choices(first, end)
        if steps:
            executor = self._moe_executors[0]
            executor.cache.used_in_run(steps, arrived)
            executor.on_layer_done(steps[-1][0])

    def _run_layers(
        self, cached: list[tuple[int, int]], capacity: int, num_tokens: int, first: int = 0
    ) -> None:
        """Compute layer by layer, deciding what is read as soon as a router has spoken."""
        for layer_idx in range(first, len(self._executors)):
            executor = self._executors[layer_idx]
            self._step.attend(layer_idx, *cached[layer_idx], capacity, num_tokens)
            if executor is not None:
                self._run_experts(executor)


def maker_of(output_class: type[ModelOutput]) -> Callable[[Tensor, KVCache], Any]:
    """Return what makes an output of logits and cache as its constructor would, which takes microseconds.

    An output is an OrderedDict of what is not None, and has all its fields as attributes.
    """
    attributes = dict.fromkeys(field.name for field in fields(output_class))
    put = OrderedDict.__setitem__  # a class of outputs has its own, which looks all fields up

    def make(logits: Tensor, cache: KVCache) -> Any:
        output: Any = OrderedDict.__new__(output_class)
        put(output, "logits", logits)
        put(output, "past_key_values", cache)
        vars(output).update(attributes, logits=logits, past_key_values=cache)
        return output

    return make
