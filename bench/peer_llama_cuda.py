"""Build llama.cpp with CUDA from a source folder and run it at its best settings, beside gpu.py's rows.

    python bench/peer_llama_cuda.py --source llama.cpp --model big.gguf --vram-gib 2 --into gpu.json

One architecture is compiled (the card's). llama-bench runs each setting; ``--vram-gib`` is what our rows at
the same share had, and decides how many layers keep their experts on the card and how large the expert
cache is. A setting that this source does not know, or that did not fit into the time, reads "not run".
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class Setting:
    """Arguments of a program of llama.cpp's, and the option that it must know for it."""

    name: str
    arguments: tuple[str, ...]
    needs: str = ""
    program: str = "llama-bench"


def settings(moe_layers_on_card: int, num_layers: int, cache_mib: int) -> list[Setting]:
    """Return its best settings for the same VRAM: all without mmap, large batches for prompts."""
    common = ("-ngl", "99", "-fa", "1", "-ub", "2048", "-b", "2048")
    on_cpu = num_layers - moe_layers_on_card
    return [
        Setting("--n-cpu-moe", (*common, "-ncmoe", str(on_cpu)), "-ncmoe"),
        Setting("--fit", ("-fa", "1", "-ub", "2048", "-b", "2048", "-fitt", "1024"), "-fitt"),
        Setting(
            "--moe-cache-mib",
            (*common, "-ncmoe", str(num_layers), "--moe-cache-mib", str(cache_mib)),
            "--moe-cache-mib",
            "llama-completion",  # llama-bench does not take it
        ),
        Setting("all experts on the CPU", (*common, "-ncmoe", str(num_layers)), "-ncmoe"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, help="llama.cpp's source; without it every row reads not run")
    parser.add_argument("--build", type=Path, help="default: SOURCE/build-cuda")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--vram-gib", type=float, required=True, help="for experts, as our rows had")
    parser.add_argument("--prefill-tokens", type=int, default=1024)
    parser.add_argument("--decode-tokens", type=int, default=48)
    parser.add_argument("--arch", help="compute capability, as 90; default: the card's")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--into", type=Path, help="gpu.py's file, into which the rows are written")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    rows: list[dict[str, Any]] = []
    num_layers, layer_bytes = layers_of(args.model)
    on_card = min(num_layers, int(args.vram_gib * 1024 * MIB / layer_bytes))
    wanted = settings(on_card, num_layers, int(args.vram_gib * 1024))
    try:
        programs = build(args, deadline)
    except PeerError as reason:
        rows = [{"setting": s.name, "status": f"not run: {reason}"} for s in wanted]
        save(args.into, rows)
    else:
        for setting in wanted:
            rows.append(run(programs / setting.program, setting, args, deadline))
            save(args.into, rows)
    for row in rows:
        print(f"{row['setting']:24} {row['status']:8} {row.get('decode_tokens_per_s', '')}")
    print(
        json.dumps({"bench": "peer_llama_cuda", "model": args.model.name, "energy": NO_ENERGY, "rows": rows})
    )


NO_ENERGY = "no energy: the programs load, read and write in one process that says nothing in between"


class PeerError(Exception):
    """Why the peer cannot be run here."""


def layers_of(model: Path) -> tuple[int, int]:
    """Return the number of layers with experts, and the bytes of one layer's."""
    from moe_offload.storage.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(model))
    layers = checkpoint.spec.moe_layers
    spans = checkpoint.experts.spans.values()
    return len(layers), sum(span.num_bytes for matrices in spans for span in matrices) // len(layers)


def build(args: argparse.Namespace, deadline: float) -> Path:
    """Compile for one architecture; return the folder of programs. What was built is used again."""
    if args.source is None or not (args.source / "CMakeLists.txt").exists():
        raise PeerError(f"no llama.cpp source ({args.source})")
    folder = args.build or args.source / "build-cuda"
    programs = Path(folder) / "bin"
    if (programs / "llama-bench").exists():
        return programs
    arch = args.arch or card_arch()
    configure = ["cmake", "-S", str(args.source), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={arch}", "-DLLAMA_CURL=OFF"]
    compile_it = ["cmake", "--build", str(folder), "-j", str(os.cpu_count() or 1), "--target"]
    for command in (configure, [*compile_it, "llama-bench"], [*compile_it, "llama-completion"]):
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=max(1.0, deadline - time.monotonic())
            )
        except FileNotFoundError:
            raise PeerError("cmake is not installed") from None
        except subprocess.TimeoutExpired:
            raise PeerError("its build did not end in time") from None
        if done.returncode != 0 and command[-1] != "llama-completion":  # older sources have none
            raise PeerError(f"its build failed: {(done.stderr or done.stdout).strip()[-300:]}")
    return programs


def card_arch() -> str:
    """Return the card's compute capability as CMake wants it."""
    from moe_offload import cuda

    report = cuda.describe()
    if not report["on"]:
        raise PeerError(f"no card: {report['reason']}")
    return str(report["devices"][0]["sm"])


def run(program: Path, setting: Setting, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Run one setting; its row, whatever became of it."""
    row: dict[str, Any] = {"setting": setting.name, "arguments": " ".join(setting.arguments)}
    if not program.exists():
        return {**row, "status": f"not run: this source has no {program.name}"}
    helped = subprocess.run([program, "--help"], capture_output=True, text=True)
    known = helped.stdout + helped.stderr
    if setting.needs not in known:
        return {**row, "status": f"not run: this source's {program.name} has no {setting.needs}"}
    left_s = deadline - time.monotonic()
    if left_s < 10:
        return {**row, "status": "not run: no time left"}
    command = [str(program), "-m", str(args.model), *setting.arguments, *no_mmap(known)]
    try:
        done = subprocess.run(
            [*command, *counts(program.name, args)], capture_output=True, text=True, timeout=left_s
        )
    except subprocess.TimeoutExpired:
        return {**row, "status": f"not run: cut off after {left_s:.0f} s"}
    if done.returncode != 0:
        return {**row, "status": f"failed: {done.stderr.strip()[-300:]}"}
    return {**row, "status": "done", **speeds(done.stdout + done.stderr)}


def no_mmap(known: str) -> tuple[str, ...]:
    """Return how this source is told to read the weights into memory of its own."""
    if "--load-mode" in known:
        return ("--load-mode", "none")
    return ("--no-mmap",) if "--no-mmap" in known else ("-mmp", "0")


def counts(program: str, args: argparse.Namespace) -> tuple[str, ...]:
    """Return how many tokens to read and to write."""
    if program == "llama-bench":
        return ("-p", str(args.prefill_tokens), "-n", str(args.decode_tokens), "-r", "3", "-o", "json")
    words = " ".join(f"word{i % 97}" for i in range(args.prefill_tokens // 3))
    return ("-p", words, "-n", str(args.decode_tokens), "-no-cnv", "--ignore-eos", "--temp", "0")


def speeds(output: str) -> dict[str, float]:
    """Return tokens per second, of llama-bench's JSON or of the timings that a completion ends with."""
    found: dict[str, float] = {}
    array = re.search(r"^\[$.*?^\]$", output, re.DOTALL | re.MULTILINE)
    for test in json.loads(array[0]) if array else []:
        name = "prefill_tokens_per_s" if test["n_prompt"] else "decode_tokens_per_s"
        found[name] = float(test["avg_ts"])
    for prompt, speed in re.findall(r"(prompt )?eval time = .*?([0-9.]+) tokens per second", output):
        found["prefill_tokens_per_s" if prompt else "decode_tokens_per_s"] = float(speed)
    return found


def save(into: Path | None, rows: list[dict[str, Any]]) -> None:
    """Put the rows into gpu.py's file, where there is one."""
    if into is None or not into.exists():
        return
    content = json.loads(into.read_text())
    done = sum(row["status"] == "done" for row in rows)
    content["steps"]["llama.cpp"] = {"status": f"{done} of {len(rows)} rows so far", "rows": rows}
    partial = into.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, into)


if __name__ == "__main__":
    main()
