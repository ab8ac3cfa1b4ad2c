"""One layer's step of few tokens on device and CPU together; hybrid.py says what it promises."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from moe_offload._native import DeviceInputs
from moe_offload.errors import ConfigError, DeviceError
from moe_offload.residency.expert_cache import Step
from moe_offload.runtime.hybrid import HybridLayer, StepRows
from moe_offload.storage.expert_format import ExpertKey


def run_step(layer: HybridLayer, rows: StepRows, look_ahead: Callable[[], None]) -> bool:
    """Compute all rows of a step.

    Args:
        look_ahead: called once the demands are queued.

    Returns:
        False when RAM has no slots for the step: stream it; nothing has happened.
    """
    layer.layers.tier.absorb()
    run = _Run(layer, rows)
    try:
        if not run.begin():
            return False
        look_ahead()
        run.compute()
    except BaseException:
        run.abort()
        raise
    run.end()
    return True


@dataclass
class _Run:
    """A step under way."""

    layer: HybridLayer
    rows: StepRows
    ram_step: Step | None = None
    device_step: Step | None = None
    inputs: DeviceInputs | None = None
    launches: list[tuple[int, list[int]]] = field(default_factory=list)  # (ticket, expert ids)
    copied: list[int] = field(default_factory=list)
    on_device: set[int] = field(default_factory=set)  # chosen for it
    failure: DeviceError | None = None
    cpu_s: float = 0.0

    def __post_init__(self) -> None:
        self.layers = self.layer.layers
        self.tier, self.ram = self.layers.tier, self.layers.ram
        self.counters_before = self.tier.device_counters()
        # The timeline shows launches, and those are of rows that come home.
        step, is_shown = self.rows.step, self.layers.launched is not None
        self.away = None if step is None or is_shown else step.away

    def begin(self) -> bool:
        """Decide, queue what must be read and copied, launch what can be."""
        layer_idx, ids = self.layer.layer_idx, self.rows.expert_ids
        room = self.tier.cache.room(layer_idx)
        cache = self.tier.cache  # frozen, what is staged would take a resident's place
        there = (cache.are_resident if self.layers.is_frozen else cache.has_bytes)(layer_idx, ids)
        resident, to_copy = self.layer.choose(self.rows, there, room)
        to_copy = to_copy[: room - len(resident)]
        self.on_device = {*resident, *to_copy}
        routed = ids, self.rows.weights
        others = [i for i in ids if i not in resident]
        self.ram_step = self.ram.begin(layer_idx, others, routed=routed)
        if self.ram_step is None:
            return False
        self.device_step = self.tier.cache.begin(layer_idx, resident, routed=routed)
        assert self.device_step is not None, "the choice is within the device's slots"
        self._send(resident, [i for i in self.ram_step.ready if i in to_copy])
        return True

    def _send(self, resident: list[int], to_copy: list[int]) -> None:
        """Queue copies and launch: what is on the device first, then the copies as they come."""
        if not resident and not to_copy:
            return
        assert self.device_step is not None
        try:
            if to_copy:
                misses_before = self.tier.stats.misses
                self.tier.cache.extend(self.device_step, to_copy)
                # A copy that was on its way when the step was planned may have arrived meanwhile.
                self.layers.counters.copied_experts += self.tier.stats.misses - misses_before
            self.copied += to_copy
            self._launch([*resident, *to_copy])
        except DeviceError as error:  # the inputs found no memory
            self.failure = error
            self.launches.append((0, [*resident, *to_copy]))

    def _launch(self, expert_ids: list[int]) -> None:
        assert self.device_step is not None
        arrivals = self.tier.cache.arrivals(self.device_step, expert_ids)
        if self.away is not None:
            launch = self.layer.launch_to_stay(self.rows, expert_ids, *arrivals)
            if launch:
                self.launches.append((launch, expert_ids))
            return
        if self.inputs is None:
            self.inputs = self.layer.upload(self.rows)
        launch = self.layer.launch(self.rows, self.inputs, expert_ids, *arrivals)
        self.launches.append((launch, expert_ids))

    def compute(self) -> None:
        """Do the CPU's share while device and disk work, then wait for the device."""
        assert self.ram_step is not None
        self._on_cpu([i for i in self.ram_step.ready if i not in self.on_device])
        for expert_id in list(self.ram_step.pending):
            self.ram.wait(self.ram_step, expert_id)
            if expert_id in self.on_device:
                self._send([], [expert_id])
            else:
                self._on_cpu([expert_id])
        failed = self._collect()
        if failed:
            self._redo(failed)

    def _on_cpu(self, expert_ids: list[int]) -> None:
        if expert_ids:
            assert self.ram_step is not None
            addresses = self.ram.step_addresses(self.ram_step, expert_ids)
            self.cpu_s += self.layer.compute(self.rows, expert_ids, addresses)

    def _collect(self) -> list[int]:
        """Wait for the device's rows and put them in their places; returns the experts that failed."""
        failed = list[int]()
        while self.launches:
            launch, expert_ids = self.launches[0]
            error = self.layer.collect(self.rows, launch, expert_ids) if launch else self.failure
            del self.launches[0]
            if error is not None:
                self.failure = error
                failed += expert_ids
        return failed

    def _redo(self, expert_ids: list[int]) -> None:
        """Compute on the CPU what the device did not; of RAM's step nothing else is left to do."""
        assert self.ram_step is not None and self.device_step is not None
        self.layers.counters.redone_experts += len(expert_ids)
        self.tier.cache.abort(self.device_step)
        self._end_ram_step()
        room = self.ram.room(self.layer.layer_idx)
        for start in range(0, len(expert_ids), room):
            self.ram_step = self.ram.begin(self.layer.layer_idx, sorted(expert_ids)[start : start + room])
            assert self.ram_step is not None
            for expert_id in self.ram_step.expert_ids:
                self.ram.wait(self.ram_step, expert_id)
            self._on_cpu(list(self.ram_step.expert_ids))
            if start + room < len(expert_ids):
                self._end_ram_step()

    def _end_ram_step(self) -> None:
        assert self.ram_step is not None
        self.ram.end(self.ram_step)
        self.ram_step = None  # for abort()

    def end(self) -> None:
        """Let both caches see the step; then what missed may be copied for later."""
        assert self.ram_step is not None and self.device_step is not None
        self._count()
        if self.failure is None:
            for expert_id in self.copied:
                self.tier.cache.wait(self.device_step, expert_id)
            self.tier.cache.end(self.device_step)
            self.tier.worked()
        self.ram.end(self.ram_step)
        if self.failure is not None:
            self.layer.failed(self.failure)
        if self.tier.is_on:
            layer_idx, of_cpu = self.layer.layer_idx, self._of_cpu()
            is_worth = self.rows.num_tokens > 1 or self.layer.is_worth(len(self.on_device), len(of_cpu))
            missed = of_cpu if self.tier.has_room or is_worth else []
            self.tier.stats.misses += len(of_cpu)
            self.tier.ran_on_cpu([ExpertKey(layer_idx, i) for i in missed])

    def _of_cpu(self) -> list[int]:
        return [expert_id for expert_id in self.rows.expert_ids if expert_id not in self.on_device]

    def _count(self) -> None:
        """Bring counters and costs up to date."""
        counters, costs = self.layers.counters, self.layers.costs[self.layer.layer_idx]
        counters.cpu_s += self.cpu_s
        counters.cpu_experts += len(self.rows.expert_ids) - len(self.on_device)
        counters.device_experts += len(self.on_device)
        if self.failure is not None:
            return
        num_tokens = np.diff(np.array(self.rows.pair_offsets))
        of_device = np.array([i in self.on_device for i in self.rows.expert_ids], np.bool_)
        after, before = self.tier.device_counters(), self.counters_before
        costs.saw_cpu(float(costs.cpu_s(num_tokens)[~of_device].sum()), self.cpu_s)
        if self.away is not None:  # of the layers before: nobody has waited for this one's rows
            self.layers.count_stayed(self.layer.layer_idx, *self.away.take_rows_done())
        else:
            costs.saw_gpu(
                float(costs.gpu_s(num_tokens)[of_device].sum()),
                after["compute_seconds"] - before["compute_seconds"],
            )
        copied = (after["bytes_copied"] - before["bytes_copied"]) / self.tier.cache.expert_bytes(
            self.layer.layer_idx
        )
        costs.saw_copies(copied * costs.copy_s, after["busy_seconds"] - before["busy_seconds"])

    def abort(self) -> None:
        """Give the step up after an error or an interrupt, on both sides."""
        for launch, _ in self.launches:
            with suppress(ConfigError):  # its rows were collected, and then the interrupt came
                self.tier.device.abandon(launch)
        if self.device_step is not None:
            self.tier.cache.abort(self.device_step)
        if self.ram_step is not None:
            self.ram.abort(self.ram_step)
