"""Everything there is to learn from a machine with a GPU, in one command and at most eight minutes.

    python bench/gpu.py [--out gpu.json] [--minutes 8] [--model FILE.gguf]
    python bench/gpu.py --device emulated:vram=64MiB,link=2GB/s   # where there is none: small, and labelled

Builds for this machine's cards (and installs in place), checks bits, measures ceilings, kernels and link and
runs ``pytest -m cuda`` (output beside the file, as .tests.log), then a model of random weights (where
emulated: the bundled demo): decode (cold, warm, after a change of topic) and prefill with 25, 50, 12 and 100%
of the experts' bytes in VRAM, for ours and the named baselines, --rounds times in turn. The file is written
after every row, so that a run that is cut off leaves what it had, and the same command with the same --out
goes on from there (--anew: from the beginning); what was not reached reads "not run", with the reason.

``label`` says what a number is: "measured" on a card, "emulated" (order and concurrency, no GPU's speed), or
"modelled" (gpu_modelled.py: the cost model on a profile). Neither of the latter is ever a GPU's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_machine
from card import commit, cpu_name
from gpu_machine import device_text
from gpu_report import NotRun, Report, give_up, phases_of, summary, table

ROOT = Path(__file__).parents[1]
SHARES = (25, 50, 12, 100)  # of the experts' bytes; the one with a goal first, if time is short
METHODS: dict[str, dict[str, Any]] = {
    "ours": {"scheduler": "hybrid"},
    "on_demand": {"scheduler": "on_demand", "prefetch": False},
    "static_split": {"scheduler": "static_split", "prefetch": False},
    "hybrimoe_greedy": {"scheduler": "hybrimoe_greedy", "policy": "mrs"},
    "fiddler": {"scheduler": "fiddler", "prefetch": False},
    "fate_like": {"scheduler": "on_demand", "policy": "fate", "predictor": "cross_layer_gate"},
}
RUN_LIMIT_S = 150.0
TESTS_LIMIT_S = 120.0
PROMPT_TOKENS = 16


def main() -> None:
    args = parse_args()
    is_card = args.device.startswith("cuda")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(args.out, time.monotonic() + 60 * args.minutes)
    report.content = {
        "bench": "gpu",
        "label": "measured" if is_card else "emulated",
        "device": args.device,
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "model": args.model.name if args.model else f"{args.like}, {args.layers} layers",
        "decode_tokens": args.decode_tokens,
        "prefill_tokens": args.prefill_tokens,
        "steps": {},
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a run's process does not outlive this
    if not args.anew:
        report.resume()
    report.write()
    if is_card:
        report.step("build", gpu_machine.build)
        if (status := report.content["steps"]["build"]["status"]) != "done":
            give_up(report, f"no build: {status}")
    report.step("machine", lambda: gpu_machine.machine(report))
    if is_card:
        card = gpu_machine.card_report()
        if not card["on"]:
            give_up(report, f"no card: {card['reason']}")
    report.step("bits", lambda: gpu_machine.bits(args.device), once=True)
    report.step("ceilings", lambda: gpu_machine.ceilings(is_card), once=True)
    report.step("link", lambda: gpu_machine.link(args.device, report), once=True)
    report.step("kernels", lambda: gpu_machine.kernels(is_card, report), needs_s=20, once=True)
    report.step("code", lambda: gpu_machine.code(is_card), needs_s=20, once=True)
    report.step("tests", lambda: gpu_machine.tests(args.device, report, TESTS_LIMIT_S), needs_s=30, once=True)
    report.step("model", lambda: make_model(args), needs_s=60)
    report.step("runs", lambda: runs(args, report), needs_s=30)
    report.step("dense", lambda: dense(args, report), needs_s=30)
    report.step("laptop", lambda: laptop(args, report), needs_s=30)
    report.step("modelled", modelled, once=True)
    report.step("sanitizer", lambda: gpu_machine.sanitizer(args.device, report), needs_s=35, once=True)
    report.not_run("llama.cpp", "bench/peer_llama_cuda.py --source DIR builds and runs it")
    report.end()
    print("\n".join(table(report.content)))
    print(json.dumps(summary(report.content)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help='default: "cuda"; or "emulated:link=2GB/s"')
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--anew", action="store_true", help="keep nothing of an earlier run's file")
    parser.add_argument(
        "--model", type=Path, help="a GGUF; default: random weights, where emulated the bundled demo"
    )
    parser.add_argument("--like", help="shape of random weights; default: qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shares", default=",".join(map(str, SHARES)))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rounds", type=int, default=1, help="of all runs; a file takes more of them later")
    parser.add_argument("--decode-tokens", type=int)
    parser.add_argument("--prefill-tokens", type=int)
    args = parser.parse_args()
    is_card = args.device.startswith("cuda")
    if not is_card and args.model is None and args.like is None:
        args.model = ROOT / "moe_offload" / "demo" / "tiny-moe.gguf"
    args.like = args.like or "qwen3-30b-a3b"
    args.decode_tokens = args.decode_tokens or (48 if is_card else 96)  # a switch needs dozens of tokens
    args.prefill_tokens = args.prefill_tokens or (1024 if is_card else 64)
    args.shares = [int(share) for share in args.shares.split(",")]
    args.methods = args.methods.split(",")
    return args


# Steps that run the model


def make_model(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Write the model of random weights, unless there is one."""
    if args.model is None:
        args.model = ROOT / "bench" / "models" / f"gpu-{args.like}-{args.layers}.gguf"
    if not args.model.exists():
        args.model.parent.mkdir(parents=True, exist_ok=True)
        layers = [] if args.like == "toy" else ["--layers", str(args.layers)]
        command = [sys.executable, str(ROOT / "bench" / "make_synthetic.py"), "--like", args.like, *layers]
        subprocess.run([*command, "--out", str(args.model)], check=True, stdout=subprocess.DEVNULL)
    context = max(args.prefill_tokens, PROMPT_TOKENS + args.decode_tokens) + 8  # as gpu_run.py
    yield {"model": args.model.name, "bytes": args.model.stat().st_size, **shape_of(args.model, context)}


def shape_of(path: Path, context: int) -> dict[str, int]:
    """Return what vram_bytes needs of the model; bytes of experts as they lie in slots."""
    from moe_offload.header_sizes import dense_sizes, element_bytes
    from moe_offload.planning.cost_model import device_workspace_bytes
    from moe_offload.planning.dense_placement import place_dense
    from moe_offload.storage.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(path))
    layouts = checkpoint.experts.layouts.values()
    sizes = dense_sizes(checkpoint, element_bytes(checkpoint), context)
    dense = place_dense(sizes, context_tokens=context, room_bytes=1 << 60)
    return {
        "slots_bytes": sum(layout.num_experts * layout.slot_bytes for layout in layouts),
        "workspace_bytes": device_workspace_bytes(checkpoint.spec),
        "dense_bytes": dense.held_bytes + dense.workspace_bytes,
        "vocab_size": checkpoint.spec.vocab_size,
    }


def runs(args: argparse.Namespace, report: Report) -> Iterator[dict[str, Any]]:
    """Yield every method at every share of the experts' bytes, ours and the baselines in turn."""
    for number, share, method in itertools.product(range(args.rounds), args.shares, args.methods):
        yield run(args, report, "runs", method, {"vram_percent": share, "round": number})


def dense(args: argparse.Namespace, report: Report) -> Iterator[dict[str, Any]]:
    """Yield ours with dense layers there, too, in memory that comes on top: as many slots as without."""
    for share in args.shares:
        yield run(args, report, "dense", "ours", {"vram_percent": share, "dense": "on"})


def laptop(args: argparse.Namespace, report: Report) -> Iterator[dict[str, Any]]:
    """Yield 25% of the experts, eight threads, and a card that copies no faster than 12 GB/s."""
    if not args.device.startswith("cuda"):
        raise NotRun("the emulated device's link is what --device says")
    for method in args.methods:
        limits = {"vram_percent": 25, "link_bytes_per_s": 12e9, "threads": 8}
        yield run(args, report, "laptop", method, limits)


def run(
    args: argparse.Namespace, report: Report, step: str, method: str, what: dict[str, Any]
) -> dict[str, Any]:
    """Run one configuration in a process of its own; return its row, whatever became of it."""
    row = {"method": method, **what, "label": report.content["label"]}
    if (kept := report.kept_row(step, row)) is not None:
        return kept
    limit_s = min(RUN_LIMIT_S, report.left_s() - 5)
    if limit_s < 10:
        return {**row, "status": "not run: no time left"}
    shape = report.content["steps"]["model"]["rows"][0]
    where = what.get("dense", "off")
    vram = vram_bytes(shape, what["vram_percent"], report.context_bytes)
    vram += shape["dense_bytes"] if where == "on" else 0
    spec = {
        "model": str(args.model),
        "vocab_size": shape["vocab_size"],
        "prompt_tokens": PROMPT_TOKENS,
        "decode_tokens": args.decode_tokens,
        "prefill_tokens": args.prefill_tokens,
        "threads": what.get("threads"),
        "options": {"device": device_text(args.device, vram, where), "vram": vram, **METHODS[method]},
    }
    command = [sys.executable, str(ROOT / "bench" / "gpu_run.py"), json.dumps(spec)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    if "link_bytes_per_s" in what:
        environment["MOE_OFFLOAD_LINK_LIMIT"] = str(what["link_bytes_per_s"])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        out, err = process.communicate(timeout=limit_s)
        status = "done" if process.returncode == 0 else f"failed: {err.strip().splitlines()[-1:]}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        status = f"cut off after {limit_s:.0f} s"
    finally:
        process.kill()  # where this process is being ended; nothing otherwise
    return {**row, "status": status, **phases_of(out)}


def vram_bytes(shape: dict[str, int], percent: int, context_bytes: int) -> int:
    """Return the budget in which so many percent of the experts have a slot."""
    return shape["slots_bytes"] * percent // 100 + shape["workspace_bytes"] + context_bytes


def modelled() -> Iterator[dict[str, Any]]:
    import gpu_modelled

    yield from gpu_modelled.rows()


if __name__ == "__main__":
    main()
