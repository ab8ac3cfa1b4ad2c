"""`moe-offload plan`: will it fit, how fast would it be, what binds, what would change it — from headers.

The bytes are those of the runtime's own placement, so that nothing is called runnable that it would
refuse. The speed is a model (planning/roofline.py, prompt_roofline.py) on a profile's figures: the one that
was asked for, the one that this machine was tuned to, or, without any, what is measured now.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

from moe_offload.cli_inspect import open_measured
from moe_offload.cli_plan_machine import Source, find_source
from moe_offload.cli_session import check_output
from moe_offload.config import DEMO_MODEL, GIB, RuntimeConfig, gib, parse_bytes
from moe_offload.device import DeviceProfile
from moe_offload.errors import ConfigError
from moe_offload.header_costs import resolve_context
from moe_offload.header_sizes import context_bytes
from moe_offload.outlook import Outlook, Planner
from moe_offload.planning.kv_format import KV_PRICE
from moe_offload.planning.roofline import Speed
from moe_offload.profile_store import GIVEN, ProfileInUse
from moe_offload.residency.memory import auto_ram_bytes
from moe_offload.residency.policy_fit import automatic_policy
from moe_offload.storage.checkpoint import Checkpoint
from moe_offload.trace import read_trace

DISPLAY_RESERVE_BYTES = GIB  # of a profile's VRAM, for what draws the screen
SYSTEM_RESERVE_BYTES = 2 * GIB  # of a profile's RAM, for the system and a browser


def run(args: argparse.Namespace) -> int:
    """Print the report, or the JSON object; draw the plot where asked."""
    check_output("--plot", args.plot)
    checkpoints = [open_measured(path, allow_dense=args.allow_dense) for path in args.models or [DEMO_MODEL]]
    _check(args, checkpoints)
    sources = [find_source(args.profile, checkpoint, args.vram) for checkpoint in checkpoints]
    planners = [_planner(*found, args) for found in zip(checkpoints, sources, strict=True)]
    outlooks = [
        planner.outlook(_ram_bytes(args.ram, source.profile))
        for planner, source in zip(planners, sources, strict=True)
    ]
    if args.plot:
        from moe_offload.plan_plot import draw

        draw(planners[0], outlooks[0].ram_bytes, args.plot)
    reports = list(zip(planners, outlooks, sources, strict=True))
    if args.json:
        print(json.dumps({"models": [as_json(*report) for report in reports]}))
        return 0
    print("\n\n".join(as_text(*report) for report in reports))
    if len(planners) > 1:
        print(f"\n{_which_to_take(planners, outlooks)}")
    return 0


def _check(args: argparse.Namespace, checkpoints: list[Checkpoint]) -> None:
    """Refuse what cannot be before the machine is measured, which takes seconds.

    Raises:
        ConfigError: a context that a model was not made for, or a size that is none.
    """
    for checkpoint in checkpoints:
        resolve_context(checkpoint, args.context)
    for size in (args.ram, args.vram):
        if size not in (None, "auto"):
            parse_bytes(size)


def _planner(checkpoint: Checkpoint, source: Source, args: argparse.Namespace) -> Planner:
    trace = read_trace(args.trace, checkpoint.spec.num_experts) if args.trace else None
    config = RuntimeConfig(context_tokens=args.context, kv=args.kv, allow_dense=args.allow_dense)
    found = source.profile
    profile = None if found is None else found.profile
    if found is not None and found.kind != GIVEN and "policy" in found.profile.settings:
        config = replace(config, policy=str(found.profile.settings["policy"]))
    config = replace(config, policy=automatic_policy(config.policy, checkpoint))
    vram_bytes = _vram_bytes(args.vram, profile)
    return Planner(checkpoint, source.machine, config, vram_bytes=vram_bytes, trace=trace)


def _vram_bytes(asked: str | None, profile: DeviceProfile | None) -> int:
    """Return how much of the profile's GPU is used: none unless asked for.

    Raises:
        ConfigError: nothing is known of a GPU, or it has less.
    """
    if asked is None:
        return 0
    capacity = None if profile is None else profile.get("gpu", "vram")
    if profile is None or capacity is None or not profile.has("link"):
        where = "this machine" if profile is None else f"profile {profile.name}"
        raise ConfigError(
            f"--vram {asked}: {where} has no figures of a GPU with its own memory; give a --profile that has"
        )
    vram_bytes = int(capacity) - DISPLAY_RESERVE_BYTES if asked == "auto" else parse_bytes(asked)
    if vram_bytes > capacity:
        raise ConfigError(f"--vram {asked} is more than the {gib(capacity)} of profile {profile.name}")
    return vram_bytes


def _ram_bytes(asked: str, found: ProfileInUse | None) -> int:
    if asked != "auto":
        return parse_bytes(asked)
    if found is None or found.kind != GIVEN:
        return auto_ram_bytes()
    return max(1, int(found.profile.value("ram", "capacity")) - SYSTEM_RESERVE_BYTES)


def as_json(planner: Planner, outlook: Outlook, source: Source) -> dict[str, Any]:
    """Return one model's report; sizes in bytes, times in seconds."""
    return {
        "path": str(planner.checkpoint.path),
        "profile": None if source.profile is None else source.profile.describe(),
        "measured_s_ago": source.age_s,
        "family": planner.checkpoint.spec.model_type,
        "context_tokens": planner.context_tokens,
        "kv": planner.config.kv,
        "smallest_ram_bytes": planner.smallest_ram_bytes,
        "whole_ram_bytes": planner.whole_ram_bytes,
        "token_bytes": asdict(planner.token),
        "machine": asdict(planner.machine),
        **asdict(outlook),
        "changes": [
            {"ram_bytes": change.ram_bytes, "decode_tokens_per_s": change.decode.tokens_per_s}
            for change in planner.changes(outlook)
            if change.decode
        ],
    }


def as_text(planner: Planner, outlook: Outlook, source: Source) -> str:
    """Return one model's report for people."""
    facts = {"machine": _machine_line(source), **_facts(planner, outlook)}
    return "\n".join([str(planner.checkpoint.path), *(f"  {name:13} {text}" for name, text in facts.items())])


def _facts(planner: Planner, outlook: Outlook) -> dict[str, str]:
    if outlook.placement is None:
        return {"does not fit": outlook.reason}
    vram = {"vram": f"{outlook.device.describe()}; {outlook.device_rate:.0%} hits"} if outlook.device else {}
    return {
        "fits": outlook.placement.describe(),
        **vram,
        "key/values": _kv_line(planner),
        "hit rate": f"{outlook.hit_rate:.0%} expected with {outlook.resident_share:.0%} of the experts "
        f"resident ({outlook.hit_source})",
        "prefetch": _ahead_line(planner, outlook),
        "decode": _speed_line(outlook.decode, f"{planner.context_tokens} tokens in context"),
        "prefill": _speed_line(outlook.prefill, f"a prompt of {planner.prompt_tokens} tokens"),
        "to change it": _changes(planner, outlook),
        "least ram": f"{gib(planner.smallest_ram_bytes)}; every expert resident at "
        f"{gib(planner.whole_ram_bytes)}",
    }


def _ahead_line(planner: Planner, outlook: Outlook) -> str:
    """Return what of the decoding speed comes from reading ahead."""
    ahead = planner.machine.ahead
    if ahead is None:
        return "not counted: what is guessed of this model has not been measured (moe-offload tune)"
    if outlook.decode is None or not outlook.decode.ahead_gain:
        return f"gains nothing here ({ahead.describe()}), so it is off"
    return f"+{outlook.decode.ahead_gain:.0%} of it, {ahead.describe()}"


def _kv_line(planner: Planner) -> str:
    checkpoint, tokens = planner.checkpoint, planner.context_tokens
    plain, packed = context_bytes(checkpoint, tokens), context_bytes(checkpoint, tokens, "q8_0")
    if planner.config.kv:
        return f"{gib(packed)} as {planner.config.kv} for {tokens} tokens (lossy); {gib(plain)} without --kv"
    return f"{gib(plain)} for {tokens} tokens; {gib(packed)} with --kv q8_0 (lossy: {KV_PRICE})"


def _changes(planner: Planner, outlook: Outlook) -> str:
    """Return what would make decoding faster: more RAM, or a faster part."""
    assert outlook.decode
    now, lines = outlook.decode.tokens_per_s, [_change(outlook, more) for more in planner.changes(outlook)]
    lines += [_device_change(outlook, more) for more in planner.device_changes(outlook)]
    for part, rate in planner.relieved(outlook).items():
        if rate >= 1.05 * now:
            lines.append(f"twice the {part}: {now:.3g} → {rate:.3g} tok/s")
    return "; ".join(lines) or f"neither more RAM nor faster parts: {outlook.decode.binding} binds"


def _change(now: Outlook, then: Outlook) -> str:
    assert now.decode and then.decode
    return (
        f"+{gib(then.ram_bytes - now.ram_bytes)} RAM: "
        f"{now.decode.tokens_per_s:.3g} → {then.decode.tokens_per_s:.3g} tok/s"
    )


def _device_change(now: Outlook, then: Outlook) -> str:
    assert now.decode and then.decode and now.device and then.device
    more_bytes = then.device.vram_bytes - now.device.vram_bytes
    return f"+{gib(more_bytes)} VRAM: {now.decode.tokens_per_s:.3g} → {then.decode.tokens_per_s:.3g} tok/s"


def _speed_line(speed: Speed | None, condition: str) -> str:
    if speed is None:
        return "not known: the profile has no cpu.int8_throughput"
    return f"{speed.tokens_per_s:.3g} tok/s with {condition}; {speed.walls()}"


def _machine_line(source: Source) -> str:
    machine = source.machine
    macs = f", {machine.macs_per_s / 1e9:.0f} GMAC/s" if machine.macs_per_s else ""
    experts = f", experts {machine.expert_bytes_per_s / 1e9:.1f}" if machine.expert_bytes_per_s else ""
    return (
        f"{source.describe()}: weights from RAM at {machine.ram_bytes_per_s / 1e9:.1f} GB/s{experts}, "
        f"experts from disk at {machine.disk_bytes_per_s / 1e9:.2f} GB/s{macs}"
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
