"""`moe-offload plan`: will it fit, how fast would it be, what binds, what would change it — from headers.

The bytes are those of the runtime's own placement, so that nothing is called runnable that it would
refuse. The speed is a model (planning/roofline.py) on this machine's measured figures or a profile's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_offload.cli_inspect import open_measured
from moe_offload.config import (
    DEMO_MODEL,
    GIB,
    PlacementPlan,
    RuntimeConfig,
    gib,
    parse_bytes,
)
from moe_offload.device import DeviceProfile, load_profile
from moe_offload.errors import BudgetError
from moe_offload.header_costs import bytes_per_token, dense_weights, fixed_costs, place, resolve_context
from moe_offload.planning.hit_curves import expected_hit_rate
from moe_offload.planning.placement import FixedCosts, smallest_ram_bytes
from moe_offload.planning.profile_speed import profile_speed
from moe_offload.planning.roofline import (
    MachineSpeed,
    Speed,
    active_macs,
    decode_speed,
    prefill_speed,
)
from moe_offload.residency.memory import auto_ram_bytes
from moe_offload.storage.checkpoint import Checkpoint

SYSTEM_RESERVE_BYTES = 2 * GIB  # of a profile's RAM, for the system and a browser
STEPS_BYTES = (GIB, 2 * GIB, 4 * GIB, 8 * GIB)
GAIN_WORTH_TELLING = 1.05


@dataclass(frozen=True)
class Outlook:
    """What one checkpoint would do under one budget; speeds are None when it does not fit."""

    ram_bytes: int
    fits: bool
    reason: str
    placement: PlacementPlan | None
    resident_share: float
    hit_rate: float
    curve: str
    decode: Speed | None
    prefill: Speed | None


class Planner:
    """One checkpoint on one machine, for any budget."""

    def __init__(self, checkpoint: Checkpoint, machine: MachineSpeed, context_tokens: int) -> None:
        self.checkpoint, self.machine, self.context_tokens = checkpoint, machine, context_tokens
        self.fixed: FixedCosts = fixed_costs(checkpoint, context_tokens)
        self.token = bytes_per_token(checkpoint, context_tokens)

    @property
    def smallest_ram_bytes(self) -> int:
        spec = self.checkpoint.spec
        return smallest_ram_bytes(self.fixed, self.checkpoint.experts.layouts, spec.top_k)

    @property
    def whole_ram_bytes(self) -> int:
        """The budget at which every expert has a slot of its own."""
        layouts = self.checkpoint.experts.layouts.values()
        return self.fixed.total_bytes + sum(layout.slot_bytes * layout.num_experts for layout in layouts)

    def outlook(self, ram_bytes: int) -> Outlook:
        """Return what would happen under ``ram_bytes``."""
        try:
            placement = place(
                self.checkpoint, RuntimeConfig(context_tokens=self.context_tokens), ram_bytes=ram_bytes
            )
        except BudgetError as error:
            return Outlook(ram_bytes, False, str(error), None, 0.0, 0.0, "", None, None)
        share = resident_share(placement)
        hit_rate, curve = expected_hit_rate(self.checkpoint.spec.model_type, share)
        decode = decode_speed(self.token, self.machine, hit_rate=hit_rate)
        return Outlook(ram_bytes, True, "", placement, share, hit_rate, curve, decode, self._prefill(share))

    def _prefill(self, share: float) -> Speed | None:
        spec, layouts = self.checkpoint.spec, self.checkpoint.experts.layouts
        return prefill_speed(
            self.machine,
            macs_per_token=active_macs(spec, layouts, dense_weights(self.checkpoint)),
            dense_bytes=self.token.dense_bytes,
            expert_bytes=self.checkpoint.experts.total_bytes,
            resident_share=share,
        )


def resident_share(placement: PlacementPlan) -> float:
    """Return resident experts over all, staging left out; 1 for a dense model."""
    experts = sum(pool.num_experts for pool in placement.pools)
    residents = sum(pool.num_slots - pool.num_staging for pool in placement.pools)
    return residents / experts if experts else 1.0


def run(args: argparse.Namespace) -> int:
    """Print the report, or the JSON object; draw the plot where asked."""
    profile = load_profile(args.profile) if args.profile else None
    paths = args.models or [DEMO_MODEL]
    planners = [_planner(path, profile, args) for path in paths]
    ram_bytes = _ram_bytes(args.ram, profile)
    outlooks = [planner.outlook(ram_bytes) for planner in planners]
    if args.plot:
        from moe_offload.plan_plot import draw

        draw(planners[0], ram_bytes, args.plot)
    if args.json:
        print(json.dumps({"models": [as_json(p, o) for p, o in zip(planners, outlooks, strict=True)]}))
        return 0
    print(_machine_line(planners[0].machine, profile))
    print("\n\n".join(as_text(p, o) for p, o in zip(planners, outlooks, strict=True)))
    if len(planners) > 1:
        print(f"\n{_which_to_take(planners, outlooks)}")
    return 0


def _planner(path: Path, profile: DeviceProfile | None, args: argparse.Namespace) -> Planner:
    checkpoint = open_measured(path, allow_dense=args.allow_dense)
    context_tokens = resolve_context(checkpoint, args.context)
    if profile is not None:
        return Planner(checkpoint, profile_speed(profile), context_tokens)
    from moe_offload.measure import measure_machine  # imports torch

    return Planner(checkpoint, measure_machine(checkpoint), context_tokens)


def _ram_bytes(asked: str, profile: DeviceProfile | None) -> int:
    if asked != "auto":
        return parse_bytes(asked)
    if profile is None:
        return auto_ram_bytes()
    return max(1, int(profile.value("ram", "capacity")) - SYSTEM_RESERVE_BYTES)


def as_json(planner: Planner, outlook: Outlook) -> dict[str, Any]:
    """Return one model's report; sizes in bytes, times in seconds."""
    return {
        "path": str(planner.checkpoint.path),
        "family": planner.checkpoint.spec.model_type,
        "context_tokens": planner.context_tokens,
        "smallest_ram_bytes": planner.smallest_ram_bytes,
        "whole_ram_bytes": planner.whole_ram_bytes,
        "token_bytes": asdict(planner.token),
        "machine": asdict(planner.machine),
        **asdict(outlook),
        "changes": [
            {"ram_bytes": change.ram_bytes, "decode_tokens_per_s": change.decode.tokens_per_s}
            for change in what_would_change_it(planner, outlook)
            if change.decode
        ],
    }


def as_text(planner: Planner, outlook: Outlook) -> str:
    """Return one model's report for people."""
    lines = [str(planner.checkpoint.path), *_rows(_facts(planner, outlook))]
    return "\n".join(lines)


def _facts(planner: Planner, outlook: Outlook) -> dict[str, str]:
    if outlook.placement is None:
        return {"does not fit": outlook.reason}
    facts = {
        "fits": outlook.placement.describe(),
        "hit rate": f"{outlook.hit_rate:.0%} expected with {outlook.resident_share:.0%} of the experts "
        f"resident (curve {outlook.curve!r})",
        "decode": _speed_line(outlook.decode, f"{planner.context_tokens} tokens in context"),
        "prefill": _speed_line(outlook.prefill, "a prompt of 512 tokens"),
    }
    changes = what_would_change_it(planner, outlook)
    facts["to change it"] = "; ".join(_change(outlook, change) for change in changes) or (
        f"more RAM would not: {_binding_words(outlook)}"
    )
    facts["least ram"] = (
        f"{gib(planner.smallest_ram_bytes)}; every expert resident at {gib(planner.whole_ram_bytes)}"
    )
    return facts


def what_would_change_it(planner: Planner, outlook: Outlook) -> list[Outlook]:
    """Return the outlooks of more RAM that would be at least 5% faster, each than the one before."""
    if outlook.decode is None:
        return []
    changes, best = [], outlook.decode.tokens_per_s
    for step in STEPS_BYTES:
        more = planner.outlook(outlook.ram_bytes + step)
        if more.decode and more.decode.tokens_per_s >= best * GAIN_WORTH_TELLING:
            changes.append(more)
            best = more.decode.tokens_per_s
    return changes


def _change(now: Outlook, then: Outlook) -> str:
    assert now.decode and then.decode
    return (
        f"+{gib(then.ram_bytes - now.ram_bytes)} RAM: "
        f"{now.decode.tokens_per_s:.3g} → {then.decode.tokens_per_s:.3g} tok/s"
    )


def _speed_line(speed: Speed | None, condition: str) -> str:
    if speed is None:
        return "not known: the profile has no cpu.int8_throughput"
    walls = ", ".join(f"{wall} {seconds * 1e3:.3g} ms" for wall, seconds in speed.walls_s.items() if seconds)
    return f"{speed.tokens_per_s:.3g} tok/s with {condition}; {speed.binding} binds ({walls})"


def _binding_words(outlook: Outlook) -> str:
    assert outlook.decode
    return f"{outlook.decode.binding} binds"


def _machine_line(machine: MachineSpeed, profile: DeviceProfile | None) -> str:
    source = f"profile {profile.name}" if profile else "this machine, measured now"
    macs = f", {machine.macs_per_s / 1e9:.0f} GMAC/s" if machine.macs_per_s else ""
    return (
        f"{source}: weights from RAM at {machine.ram_bytes_per_s / 1e9:.1f} GB/s, experts from disk at "
        f"{machine.disk_bytes_per_s / 1e9:.2f} GB/s{macs}\n"
    )


def _which_to_take(planners: list[Planner], outlooks: list[Outlook]) -> str:
    """Return the models that fit, fastest first."""
    ranked = sorted(
        (
            (outlook.decode.tokens_per_s, str(planner.checkpoint.path))
            for planner, outlook in zip(planners, outlooks, strict=True)
            if outlook.decode
        ),
        reverse=True,
    )
    if not ranked:
        return "none of them fits"
    return "fastest first: " + ", ".join(f"{path} ({rate:.3g} tok/s)" for rate, path in ranked)


def _rows(facts: dict[str, str]) -> list[str]:
    return [f"  {name:13} {text}" for name, text in facts.items()]
