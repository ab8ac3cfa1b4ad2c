"""What would happen: one checkpoint on one machine under any budget, from headers and figures.

The bytes are those of ``header_costs.place``, the function that ``from_pretrained`` plans with, so that
nothing is called runnable that would be refused. The speed is planning/roofline.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from moe_offload.config import PREFILL_CHUNK_TOKENS, DeviceChoice, RuntimeConfig
from moe_offload.errors import BudgetError
from moe_offload.header_costs import Process, fixed_costs, fresh_process, place, resolve_context
from moe_offload.header_sizes import attention_heads, bytes_per_token
from moe_offload.hit_outlook import Hits, first_tokens, replayed_hits
from moe_offload.planning.hit_curves import expected_hit_rate
from moe_offload.planning.machine_speed import DecoderShape, MachineSpeed
from moe_offload.planning.placement import FixedCosts, smallest_ram_bytes
from moe_offload.planning.plans import DensePlan, DevicePlan, PlacementPlan, PoolPlan
from moe_offload.planning.prompt_roofline import Chunk, prefill_speed
from moe_offload.planning.roofline import Speed, decode_speed
from moe_offload.prompt_outlook import (
    chunk_sizes,
    expected_chunks,
    prompt_work,
    skips_last_layer,
    traced_chunks,
    with_fresh_slots,
)
from moe_offload.runtime.device_placement import place_on_device
from moe_offload.runtime.native_families import native_step_reason
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.trace import RoutingTrace

STEPS_BYTES = tuple(gibs << 30 for gibs in (1, 2, 4, 8))
GAIN_WORTH_TELLING = 1.05
DRIVER_BYTES = 512 << 20  # what a CUDA context and its kernels take of a card, an estimate
Pools = tuple[PoolPlan, ...]


@dataclass(frozen=True)
class Outlook:
    """What one checkpoint would do under one budget; speeds are None when it does not fit."""

    ram_bytes: int
    fits: bool
    reason: str
    placement: PlacementPlan | None = None
    resident_share: float = 0.0
    hit_rate: float = 0.0
    hit_source: str = ""
    device: DevicePlan | None = None
    device_rate: float | None = None
    decode: Speed | None = None
    prefill: Speed | None = None

    @property
    def device_dense(self) -> DensePlan | None:
        """Which dense layers the accelerator computes."""
        return None if self.device is None else self.device.dense


class Planner:
    """One checkpoint on one machine, for any budget.

    Args:
        config: what the user chose; its budget is not looked at.
        process: of the process that would load; the estimate for a new one otherwise.
        vram_bytes: of the machine's accelerator; 0: it is not used.
        trace: routing of the model, replayed for the hit rate; the family's curve otherwise.
        prompt_tokens: of the prompt that ``prefill`` is about.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        machine: MachineSpeed,
        config: RuntimeConfig,
        *,
        process: Process | None = None,
        vram_bytes: int = 0,
        trace: RoutingTrace | None = None,
        prompt_tokens: int = PREFILL_CHUNK_TOKENS,
    ) -> None:
        if vram_bytes:  # as from_pretrained(device="cuda", vram=...) would plan
            config = replace(config, device=DeviceChoice("cuda", vram_bytes))
        self.checkpoint, self.machine, self.config = checkpoint, machine, config
        self.vram_bytes = vram_bytes
        self.process = replace(process or fresh_process(checkpoint), drives_device=vram_bytes > 0)
        self.context_tokens = resolve_context(checkpoint, config.context_tokens)
        self.prompt_tokens = min(prompt_tokens, self.context_tokens)
        self.token = bytes_per_token(checkpoint, self.context_tokens, config.kv)
        self._trace = None if trace is None else first_tokens(trace, checkpoint)
        self._replayed = lru_cache(maxsize=64)(self._replay)

    @property
    def fixed(self) -> FixedCosts:
        """Everything in memory that is not an expert."""
        return fixed_costs(self.checkpoint, self.context_tokens, kv=self.config.kv, process=self.process)

    @property
    def smallest_ram_bytes(self) -> int:
        spec = self.checkpoint.spec
        return smallest_ram_bytes(self.fixed, self.checkpoint.experts.layouts, spec.top_k)

    @property
    def whole_ram_bytes(self) -> int:
        """The budget at which every expert has a slot of its own."""
        layouts = self.checkpoint.experts.layouts.values()
        return self.fixed.total_bytes + sum(layout.slot_bytes * layout.num_experts for layout in layouts)

    def outlook(self, ram_bytes: int, vram_bytes: int | None = None) -> Outlook:
        """Return what would happen under ``ram_bytes``, and of an accelerator's memory the planner's own."""
        vram_bytes = self.vram_bytes if vram_bytes is None else vram_bytes
        try:
            placement = place(self.checkpoint, self.config, ram_bytes=ram_bytes, process=self.process)
            device = self._place_on_device(vram_bytes)
        except BudgetError as error:
            return Outlook(ram_bytes, False, str(error))
        hits, source = self._hits(placement.pools)
        device_rate = None if device is None else self._hits(device.pools)[0].rate
        return Outlook(
            ram_bytes,
            True,
            "",
            placement,
            resident_share(placement.pools),
            hits.rate,
            source,
            device,
            device_rate,
            self.decode(placement, hits, device_rate, device_dense=None if device is None else device.dense),
            self.prefill(placement),
        )

    def _place_on_device(self, vram_bytes: int) -> DevicePlan | None:
        if not vram_bytes or not self.checkpoint.experts.layouts:
            return None
        element_bytes = self.process.bytes_per_element
        return place_on_device(self.checkpoint, self.config, vram_bytes, DRIVER_BYTES, element_bytes)

    def decode(
        self,
        placement: PlacementPlan,
        hits: Hits,
        device_rate: float | None = None,
        machine: MachineSpeed | None = None,
        device_dense: DensePlan | None = None,
    ) -> Speed:
        """Take the larger of RAM's and VRAM's experts to hold the smaller's: nothing is read that one has."""
        is_in_ram = hits.rate >= (device_rate or 0.0)
        return decode_speed(
            self.token,
            machine or self.machine,
            self.shape(placement),
            hit_rate=max(hits.rate, device_rate or 0.0),
            device_rate=device_rate,
            misses=hits.misses if is_in_ram else None,
            device_dense=device_dense,
        )

    def _hits(self, pools: Pools) -> tuple[Hits, str]:
        share = resident_share(pools)
        if self._trace is not None and share < 1:
            return self._replayed(pools), f"{self._trace.num_tokens} tokens of a trace replayed"
        rate, curve = expected_hit_rate(self.checkpoint.spec.model_type, share)
        return Hits(rate), f"curve {curve!r}"

    def _replay(self, pools: Pools) -> Hits:
        assert self._trace is not None
        return replayed_hits(self.checkpoint, pools, self._trace, self.config.policy)[1]

    def shape(self, placement: PlacementPlan) -> DecoderShape:
        """Return what of model and placement costs a step beside bytes."""
        spec = self.checkpoint.spec
        return DecoderShape(
            num_layers=spec.num_hidden_layers,
            moe_layers=len(spec.moe_layers),
            top_k=spec.top_k,
            num_experts=spec.num_experts,
            hidden_size=spec.hidden_size,
            attention_heads=attention_heads(self.checkpoint),
            attention_scores=attention_heads(self.checkpoint) * self.context_tokens,
            is_native=native_step_reason(self.checkpoint.config) is None,
        )

    def chunks(self, placement: PlacementPlan) -> list[Chunk]:
        """Return the chunks of a first prompt, nothing in memory yet."""
        how = {"is_native": self.shape(placement).is_native, "has_device": self.vram_bytes > 0}
        slots = sum(pool.num_slots for pool in placement.pools) / max(1, len(self.checkpoint.spec.moe_layers))
        sizes = chunk_sizes(self.checkpoint, self.prompt_tokens, context_tokens=self.context_tokens, **how)
        skips_last = skips_last_layer(self.checkpoint.spec, **how)
        if self._trace is not None:
            layouts = self.checkpoint.experts.layouts
            expert_bytes = {i: layout.expert_bytes for i, layout in layouts.items()}
            pools, policy = placement.pools, self.config.policy
            found = traced_chunks(self._trace, pools, policy, sizes, expert_bytes, skips_last=skips_last)
            if found is not None:
                return with_fresh_slots(found, slots)
        share = resident_share(placement.pools)
        found = expected_chunks(self.checkpoint.spec, share, sizes, skips_last=skips_last)
        return with_fresh_slots(found, slots)

    def prefill(self, placement: PlacementPlan, chunks: Sequence[Chunk] | None = None) -> Speed | None:
        """Return the speed of a first prompt."""
        chunks = self.chunks(placement) if chunks is None else chunks
        return prefill_speed(self.machine, self.shape(placement), prompt_work(self.checkpoint), chunks)

    def changes(self, outlook: Outlook) -> list[Outlook]:
        """Return the outlooks of more RAM that would be at least 5% faster, each than the one before."""
        return self._gains(outlook, lambda step: self.outlook(outlook.ram_bytes + step))

    def device_changes(self, outlook: Outlook) -> list[Outlook]:
        """Return the same for more of an accelerator's memory; nothing where there is none."""
        if outlook.device is None:
            return []
        return self._gains(outlook, lambda step: self.outlook(outlook.ram_bytes, self.vram_bytes + step))

    @staticmethod
    def _gains(outlook: Outlook, grown: Callable[[int], Outlook]) -> list[Outlook]:
        if outlook.decode is None:
            return []
        found, best = [], outlook.decode.tokens_per_s
        for step in STEPS_BYTES:
            more = grown(step)
            if more.decode and more.decode.tokens_per_s >= best * GAIN_WORTH_TELLING:
                found.append(more)
                best = more.decode.tokens_per_s
        return found

    def relieved(self, outlook: Outlook) -> dict[str, float]:
        """Return tokens per second if one wall were twice as far away, for each wall of decoding."""
        assert outlook.placement is not None
        placement, hits = outlook.placement, self._hits(outlook.placement.pools)[0]
        machines = {
            "RAM bandwidth": _faster(self.machine, "ram_bytes_per_s", "expert_bytes_per_s"),
            "disk bandwidth": _faster(self.machine, "disk_bytes_per_s"),
        }
        return {
            name: self.decode(
                placement, hits, outlook.device_rate, machine, outlook.device_dense
            ).tokens_per_s
            for name, machine in machines.items()
        }


def _faster(machine: MachineSpeed, *names: str) -> MachineSpeed:
    given: Mapping[str, float | None] = {name: getattr(machine, name) for name in names}
    doubled = {name: 2 * value for name, value in given.items() if value is not None}
    return replace(machine, **doubled)  # type: ignore[arg-type]


def resident_share(pools: Pools) -> float:
    """Return resident experts over all, staging left out; 1 for a dense model."""
    experts = sum(pool.num_experts for pool in pools)
    residents = sum(pool.num_slots - pool.num_staging for pool in pools)
    return residents / experts if experts else 1.0
