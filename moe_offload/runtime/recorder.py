"""Record the routing of a model's forward passes (trace.py has the schema).

The executors call ``on_route`` with what the router chose; nobody is called while nothing records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_offload.errors import ConfigError
from moe_offload.runtime.executor import ExpertExecutor
from moe_offload.trace import DECODE, PREFILL, RoutingTrace, make_trace


class RoutingRecorder:
    """Collect routing from ``__enter__`` to ``__exit__``; ``trace()`` gives what was collected so far.

    Args:
        executors: by layer index, of every MoE layer.
        router_of: layer index to router; asked for only with ``router_logits``.
        num_experts: of a layer.
        model: name of the checkpoint.
        metadata: called by ``trace()``: what else belongs into the file.
    """

    def __init__(
        self,
        executors: Mapping[int, ExpertExecutor],
        router_of: Callable[[int], Any],
        num_experts: int,
        model: str,
        metadata: Callable[[], Mapping[str, Any]],
        *,
        router_logits: bool = False,
        router_inputs: bool = False,
    ) -> None:
        self._executors, self._num_experts = dict(sorted(executors.items())), num_experts
        self._model, self._metadata = model, metadata
        self._routers = {layer_idx: router_of(layer_idx) for layer_idx in executors} if router_logits else {}
        self._keep_inputs = router_inputs
        self._calls: dict[int, list[dict[str, NDArray[Any]]]] = {i: [] for i in self._executors}
        self._sequence_starts = [0]  # in forward passes

    def __enter__(self) -> RoutingRecorder:
        for executor in self._executors.values():
            if executor.on_route is not None:
                raise ConfigError("this model's routing is being recorded already; end that recording first")
        for executor in self._executors.values():
            executor.on_route = self._on_route
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for executor in self._executors.values():
            executor.on_route = None

    def begin_sequence(self) -> None:
        """Note that what follows is a new sequence; an empty one before it leaves no mark."""
        self._sequence_starts.append(self._passes())

    def trace(self) -> RoutingTrace:
        """Return the whole forward passes so far; one that was cut short by an error is left out.

        Raises:
            ConfigError: nothing was recorded.
        """
        count = self._passes()
        if count == 0:
            raise ConfigError("no forward pass was recorded; run the model inside the recording")
        layers = list(self._executors)
        calls = [self._calls[layer_idx][:count] for layer_idx in layers]
        step_tokens = [len(call["experts"]) for call in calls[0]]
        arrays = {
            name: np.stack([np.concatenate([call[name] for call in column]) for column in calls], axis=1)
            for name in calls[0][0]
        }
        starts = sorted({start for start in self._sequence_starts if start < count})
        ends = [*starts[1:], count]
        seq_len = [sum(step_tokens[start:end]) for start, end in zip(starts, ends, strict=True)]
        first_passes = set(starts)
        phase = [PREFILL if i in first_passes or n > 1 else DECODE for i, n in enumerate(step_tokens)]
        return make_trace(
            arrays["experts"],
            num_experts=self._num_experts,
            weights=arrays["weights"],
            layers=layers,
            seq_len=seq_len,
            step_tokens=step_tokens,
            phase=np.repeat(np.array(phase, np.uint8), step_tokens),
            model=self._model,
            metadata=self._metadata(),
            router_logits=arrays.get("router_logits"),
            router_inputs=arrays.get("router_inputs"),
        )

    def _passes(self) -> int:
        return min(len(calls) for calls in self._calls.values())

    def _on_route(
        self, layer_idx: int, router_input: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> None:
        """Keep one layer's routing of one step, experts in descending weight (ties: as they came)."""
        if layer_idx == next(iter(self._calls)):  # a pass that an error cut short leaves no ragged end
            count = self._passes()
            for calls in self._calls.values():
                del calls[count:]
        order = np.argsort(-top_k_weights.float().numpy(), axis=1, kind="stable")
        call = {
            "experts": np.take_along_axis(top_k_index.numpy(), order, axis=1).astype(np.uint16),
            "weights": np.take_along_axis(top_k_weights.float().numpy(), order, axis=1),
        }
        if self._keep_inputs:
            call["router_inputs"] = router_input.to(torch.float16).numpy()
        if self._routers:
            call["router_logits"] = (
                self._routers[layer_idx].forward(router_input)[0].to(torch.float16).numpy()
            )
        self._calls[layer_idx].append(call)
