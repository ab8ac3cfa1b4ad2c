"""One layer's step on device and CPU together: who computes what, at the same time, the same bits.

The scheduler chooses for each expert: on the device where it is, on the device after a copy, or on the
CPU. Launch and copies are under way before the CPU begins its share; the host waits for the device once,
at the end. Both sides leave unweighted rows in their places, and the caller sums them by ascending expert
id: so the choice changes the time and never a bit. What fails on the device is computed again here.
"""

from __future__ import annotations

import sys
import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from moe_offload._native import DecodeStep, DeviceInputs, DeviceKernel
from moe_offload.errors import DeviceError
from moe_offload.expert_ops import ExpertKernel
from moe_offload.planning.scheduler import Choice, LayerWork
from moe_offload.planning.token_moves import divide
from moe_offload.residency.accelerator import wait_launch
from moe_offload.runtime.hybrid_layers import HybridLayers


class StepRows(Protocol):
    """A step of one layer: experts ascending, pairs (token, expert) grouped by them; n experts, P pairs.

    Attributes:
        weights: (n,) the router's, summed over tokens.
        pair_offsets: (n + 1,)
        pair_tokens: (P,)
        num_tokens: T
        hidden_address: of (T, H) float32; stays until the step ends.
        rows_address: of (P, H) float32, where all rows go.
        step: of the one token under way in native code, else None.
    """

    expert_ids: list[int]
    weights: list[float]
    pair_offsets: list[int]
    pair_tokens: list[int]
    num_tokens: int
    hidden_address: int
    rows_address: int

    @property
    def step(self) -> DecodeStep | None: ...

    def compute(self, positions: list[int], addresses: list[int]) -> None:
        """Put the rows of some experts, by position, in their places, on the CPU."""


class HybridLayer:
    """One layer's experts on both sides."""

    def __init__(
        self, layers: HybridLayers, layer_idx: int, kernel: ExpertKernel, device_kernel: DeviceKernel
    ) -> None:
        self.layers, self.layer_idx = layers, layer_idx
        self.kernel, self.device_kernel = kernel, device_kernel

    @property
    def is_on(self) -> bool:
        return self.layers.tier.is_on

    def is_worth(self, num_on_device: int, num_on_cpu: int) -> bool:
        """Whether one more of a token's experts on the device would have paid."""
        return self.layers.are_worth(self.layer_idx, num_on_device + num_on_cpu)[num_on_device]

    def choose(self, rows: StepRows, there: Sequence[bool], room: int) -> tuple[list[int], list[int]]:
        """Return who runs on the device at once, at most ``room``, and who after a copy."""
        if rows.num_tokens == 1:
            resident, to_copy = self._choose_for_one(rows.expert_ids, there)
        else:
            choice = self.layers.scheduler(self.work(rows, there)).on_gpu
            resident, to_copy = divided(rows.expert_ids, there, choice)
        return resident[:room], to_copy

    def work(self, rows: StepRows, there: Sequence[bool]) -> LayerWork:
        """Return a step of several tokens as schedulers see it."""
        on_gpu: Choice = np.array(there, np.bool_)
        in_ram: Choice = np.array(self.layers.ram.are_resident(self.layer_idx, rows.expert_ids), np.bool_)
        num_tokens = np.diff(np.array(rows.pair_offsets))
        return self.layers.costs[self.layer_idx].work(num_tokens, on_gpu, in_ram)

    def _choose_for_one(self, ids: Sequence[int], there: Sequence[bool]) -> tuple[list[int], list[int]]:
        """The same from the scheduler's answers for one token (csrc/hybrid: TokenRun::divide)."""
        in_ram = self.layers.ram.are_resident(self.layer_idx, ids)
        division = divide(there, in_ram, self.layers.moves(self.layer_idx, len(ids)))
        return [ids[i] for i in division.on_device], [ids[i] for i in division.copied]

    def launch_to_stay(
        self, rows: StepRows, expert_ids: list[int], addresses: list[int], after: list[int]
    ) -> int:
        """Queue one token's rows behind dense layers on the device, where they stay.

        Returns:
            The launch that waits for copies; 0 where none has to be waited for.
        """
        assert rows.step is not None
        positions = [bisect_left(rows.expert_ids, i) for i in expert_ids]
        if not any(after):
            rows.step.device_rows(self.device_kernel, positions, addresses)
            return 0
        count = len(expert_ids)
        return self.layers.tier.device.launch(
            self.device_kernel,
            self.kernel.native,
            None,
            expert_ids,
            addresses,
            range(count + 1),
            [0] * count,
            after,
            rows.step.away,
            rows.step.leave_rows(positions),
        )

    def launch(
        self,
        rows: StepRows,
        inputs: DeviceInputs,
        expert_ids: list[int],
        addresses: list[int],
        after: list[int],
    ) -> int:
        """Queue some experts' rows on the device; returns the launch."""
        offsets, tokens = [0], list[int]()
        for expert_id in expert_ids:
            tokens += rows.pair_tokens[pairs_of(rows, expert_id)]
            offsets.append(len(tokens))
        launch = self.layers.tier.device.launch(
            self.device_kernel, self.kernel.native, inputs, expert_ids, addresses, offsets, tokens, after
        )
        if self.layers.launched is not None:
            self.layers.launched[launch] = self.layer_idx, expert_ids
        return launch

    def upload(self, rows: StepRows) -> DeviceInputs:
        """Put a step's inputs on the device."""
        hidden_size = self.kernel.layout.hidden_size
        return self.layers.tier.device.upload(rows.hidden_address, rows.num_tokens, hidden_size)

    def collect(self, rows: StepRows, launch: int, expert_ids: list[int]) -> DeviceError | None:
        """Wait for a launch and put its rows in their places; returns why it failed."""
        device, started = self.layers.tier.device, time.perf_counter()
        wait_launch(device, launch)
        places = [pair for i in expert_ids for pair in _range(pairs_of(rows, i))]
        failure = device.collect(launch, rows.rows_address, places)
        self.layers.counters.device_wait_s += time.perf_counter() - started
        return None if failure is None else DeviceError(failure[0], int(failure[1]))

    def compute(self, rows: StepRows, expert_ids: list[int], addresses: list[int]) -> float:
        """Compute some experts' rows on the CPU; returns the seconds."""
        started = time.perf_counter()
        rows.compute([bisect_left(rows.expert_ids, i) for i in expert_ids], addresses)
        ended = time.perf_counter()
        if self.layers.span is not None:
            self.layers.span(self.layer_idx, expert_ids, started, ended)
        return ended - started

    def failed(self, error: DeviceError) -> None:
        """Take note of a failure between steps, and tell the user what changes."""
        note = self.layers.tier.failed(error)
        if note:
            print(f"moe-offload: note: {note}", file=sys.stderr)


def divided(expert_ids: Sequence[int], there: Sequence[bool], choice: Choice) -> tuple[list[int], list[int]]:
    """Return whom a choice puts on the device at once, and whom after a copy."""
    chosen = [(i, is_there) for i, is_there, on in zip(expert_ids, there, choice, strict=True) if on]
    return [i for i, is_there in chosen if is_there], [i for i, is_there in chosen if not is_there]


def pairs_of(rows: StepRows, expert_id: int) -> slice:
    """Return the pairs of an expert of the step."""
    position = bisect_left(rows.expert_ids, expert_id)
    return slice(rows.pair_offsets[position], rows.pair_offsets[position + 1])


def _range(pairs: slice) -> range:
    return range(pairs.start, pairs.stop)
