"""The same GGUF here and in llama.cpp: are the tokens the same?

    python bench/against_llama_cpp.py --model demo --text wikitext2_valid.txt

Two programs that round differently may choose different tokens where the two best are nearly
equal, and only there. Both are held against the same weights in float64 (demo_model/reference.py):

- greedy: every prompt of --prompts is continued by both. Where they part, the logits that each
  program chose from are compared with float64's: parting is allowed only if float64's margin between
  its two best tokens is at most twice the larger of the two errors there.
- teacher forcing: at every position of --text, both must choose float64's best token wherever its
  margin exceeds twice the larger of the two errors there.

Both rules follow from the errors, so the errors themselves are bounded: in decoding and in teacher
forcing, our root mean square error over all positions must not exceed twice llama.cpp's.

Exit code 1 if a rule is broken. The reference holds all weights as float64: for small models.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from greedy_programs import Logits, Program, open_llama, open_ours, open_reference

BENCH = Path(__file__).resolve().parent
ERROR_FACTOR = 2.0


@dataclass(frozen=True)
class Parting:
    """Where two greedy continuations part; ``margin`` and ``error`` are in logits."""

    prompt: str
    position: int  # new tokens in common
    margin: float
    error: float

    @property
    def allowed(self) -> bool:
        return self.margin <= ERROR_FACTOR * self.error


@dataclass(frozen=True)
class Greedy:
    """What greedy decoding showed; errors are over the tokens up to each parting."""

    num_prompts: int
    num_tokens: int
    partings: list[Parting]
    rms_error: dict[str, float]  # "ours", "llama"

    @property
    def passed(self) -> bool:
        accurate = self.rms_error["ours"] <= ERROR_FACTOR * self.rms_error["llama"]
        return accurate and all(parting.allowed for parting in self.partings)


def main() -> None:
    """Compare, print tables and one line of JSON; exit 1 if a rule is broken."""
    args = parse_args()
    import moe_offload

    tokenizer = moe_offload.load_tokenizer(str(args.model))
    ours, llama = open_ours(args), open_llama(args.model, args.window + 1, args.threads)
    reference = open_reference(args.model)
    prompts = read_prompts(args.prompts)
    greedy = compare_greedy(ours, llama, reference, encode_prompts(tokenizer, prompts), args.new_tokens)
    print_greedy(greedy, args.new_tokens)
    forced = compare_forced(ours.logits, llama.logits, reference, text_windows(tokenizer, args))
    print_forced(forced)
    result = {
        "bench": "against_llama_cpp", "model": args.model.name, "new_tokens": args.new_tokens,
        "passed": greedy.passed and forced["passed"], "prompts": greedy.num_prompts,
        "prompts_equal": greedy.num_prompts - len(greedy.partings),
        "partings": [vars(parting) | {"allowed": parting.allowed} for parting in greedy.partings],
        "decode_rms_error": greedy.rms_error, "decode_tokens": greedy.num_tokens, "forced": forced,
    }  # fmt: skip
    print(json.dumps(result))
    sys.exit(0 if result["passed"] else 1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="qwen3moe GGUF, or demo")
    parser.add_argument("--text", type=Path, required=True, help="plain text for teacher forcing")
    parser.add_argument("--positions", type=int, default=2048, help="of teacher forcing")
    parser.add_argument("--window", type=int, default=256, help="tokens of context in teacher forcing")
    parser.add_argument("--prompts", type=Path, default=BENCH / "data" / "greedy_prompts.txt")
    parser.add_argument("--new-tokens", type=int, default=64, help="per prompt")
    parser.add_argument("--ram", default="auto")
    parser.add_argument("--experts", help='"25%%", a number, or all')
    parser.add_argument("--threads", type=int, default=2, help="llama.cpp's threads")
    args = parser.parse_args()
    demo = BENCH.parent / "moe_offload" / "demo" / "tiny-moe.gguf"
    args.model = demo if args.model == "demo" else Path(args.model)
    return args


def read_prompts(path: Path) -> list[str]:
    """Return one prompt per line; ``\\n`` in a line stands for a line break."""
    return [line.replace("\\n", "\n") for line in path.read_text(encoding="utf-8").splitlines()]


def encode_prompts(tokenizer: Any, prompts: list[str]) -> dict[str, list[int]]:
    return {prompt: tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts}


def text_windows(tokenizer: Any, args: argparse.Namespace) -> list[list[int]]:
    """Return whole windows with at least ``args.positions`` tokens in all."""
    text = args.text.read_text(encoding="utf-8")[: 16 * args.positions]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    num_windows = -(-args.positions // args.window)
    if len(ids) < num_windows * args.window:
        raise SystemExit(f"{args.text} has {len(ids)} tokens; --positions needs {num_windows * args.window}")
    return [ids[i * args.window : (i + 1) * args.window] for i in range(num_windows)]


def compare_greedy(
    ours: Program, llama: Program, reference: Logits, prompts: dict[str, list[int]], num_tokens: int
) -> Greedy:
    """Continue every prompt with both; find where they part and how far each is from float64."""
    partings, num_compared = [], 0
    squares = {"ours": 0.0, "llama": 0.0}
    for prompt, ids in prompts.items():
        our_ids, our_logits = ours.continue_greedily(ids, num_tokens)
        llama_ids, llama_logits = llama.continue_greedily(ids, num_tokens)
        common = first_difference(our_ids, llama_ids)
        chosen = min(common + 1, len(our_ids), len(llama_ids))  # the tokens chosen after equal text
        exact = reference(ids + our_ids[: chosen - 1])[len(ids) - 1 :]  # (chosen, vocab_size)
        errors = {"ours": our_logits[:chosen] - exact, "llama": llama_logits[:chosen] - exact}
        for name, error in errors.items():
            squares[name] += float(np.square(error).mean(axis=-1).sum())
        num_compared += chosen
        if our_ids != llama_ids:
            largest = max(float(np.abs(error[-1]).max()) for error in errors.values())
            partings.append(Parting(prompt, common, float(margins(exact[-1])), largest))
    rms_error = {name: math.sqrt(total / num_compared) for name, total in squares.items()}
    return Greedy(len(prompts), num_compared, partings, rms_error)


def first_difference(a: list[int], b: list[int]) -> int:
    """Return how many first elements are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def margins(logits: np.ndarray) -> np.ndarray:
    """Return best minus second best along the last axis."""
    best = np.partition(logits, -2, axis=-1)[..., -2:]
    return best[..., 1] - best[..., 0]


def compare_forced(
    ours: Logits, llama: Logits, reference: Logits, windows: list[list[int]]
) -> dict[str, Any]:
    """Compare the logits at every position; return the figures and whether both rules hold."""
    names = ("margin", "ours", "llama", "ours_error", "llama_error")
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    squares = {"ours": 0.0, "llama": 0.0}
    for window in windows:
        exact = reference(window)  # (num_tokens, vocab_size)
        best = exact.argmax(axis=-1)
        rows["margin"].append(margins(exact))
        for name, program in (("ours", ours), ("llama", llama)):
            logits = program(window)
            rows[name].append(logits.argmax(axis=-1) == best)
            rows[f"{name}_error"].append(np.abs(logits - exact).max(axis=-1))
            squares[name] += float(np.square(logits - exact).mean(axis=-1).sum())
    return forced_figures({key: np.concatenate(value) for key, value in rows.items()}, squares)


def forced_figures(rows: dict[str, np.ndarray], squares: dict[str, float]) -> dict[str, Any]:
    """Condense per-position rows (see compare_forced) into figures."""
    num_positions = len(rows["margin"])
    decided = rows["margin"] > ERROR_FACTOR * np.maximum(rows["ours_error"], rows["llama_error"])
    broken = int((decided & ~(rows["ours"] & rows["llama"])).sum())
    rms = {name: float(np.sqrt(total / num_positions)) for name, total in squares.items()}
    return {
        "positions": num_positions,
        "decided": int(decided.sum()),
        "broken": broken,
        "ours_top1": float(rows["ours"].mean()),
        "llama_top1": float(rows["llama"].mean()),
        "ours_rms_error": rms["ours"],
        "llama_rms_error": rms["llama"],
        "ours_max_error": float(rows["ours_error"].max()),
        "llama_max_error": float(rows["llama_error"].max()),
        "median_margin": float(np.median(rows["margin"])),
        "passed": broken == 0 and rms["ours"] <= ERROR_FACTOR * rms["llama"],
    }


def print_greedy(greedy: Greedy, num_tokens: int) -> None:
    num_equal = greedy.num_prompts - len(greedy.partings)
    print(f"greedy: {num_equal} of {greedy.num_prompts} prompts equal over {num_tokens} new tokens")
    for parting in greedy.partings:
        verdict = "near-tie" if parting.allowed else "BROKEN"
        figures = f"margin {parting.margin:.5f}, error {parting.error:.5f}"
        print(f"  {verdict} after {parting.position} tokens of {parting.prompt[:40]!r}: {figures}")
    errors = ", ".join(f"{name} {error:.6f}" for name, error in greedy.rms_error.items())
    print(f"  rms error over {greedy.num_tokens} tokens: {errors}")


def print_forced(forced: dict[str, Any]) -> None:
    counts = ", ".join(f"{forced[key]} {key}" for key in ("positions", "decided", "broken"))
    print(f"teacher forcing: {counts}")
    print(f"{'':12} {'top-1 as float64':>18} {'rms error':>12} {'max error':>12}")
    for name, label in (("ours", "moe_offload"), ("llama", "llama.cpp")):
        figures = (forced[f"{name}_{key}"] for key in ("top1", "rms_error", "max_error"))
        print("{:12} {:18.4%} {:12.6f} {:12.6f}".format(label, *figures))


if __name__ == "__main__":
    main()
