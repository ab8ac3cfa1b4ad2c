"""What do fewer bits cost? Size and perplexity of a folder as it is, and in each format of ``quant=``.

    python bench/quant_quality.py --model FOLDER --text wikitext2_valid.txt

Every row is loaded as a user would load it, and sees the same windows of text; "top-1" is the share of
positions at which the most probable token is the one that the unquantized model names.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from card import commit, cpu_name
from perplexity import cut_windows


def main() -> None:
    """Print a card, one row for each format and one line of JSON."""
    args = parse_args()
    import moe_offload

    windows = cut_windows(moe_offload.load_tokenizer(args.model), args)
    print(f"model    {args.model.name}, dtype {args.dtype}")
    print(f"text     {args.text.name}, {len(windows)} windows of {args.window} tokens")
    print(f"machine  {cpu_name()}, commit {commit()}\n")
    print("| format | weights | bits each | perplexity | against the first | top-1 | made in |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rows: list[dict[str, Any]] = []
    best: list[Any] = []
    for quant in [None, *args.quants]:
        row = measure(args, quant, windows, best)
        rows.append(row)
        print(
            f"| {row['format']} | {row['weight_bytes'] / 2**20:.1f} MiB | {row['bits_per_weight']:.2f} | "
            f"{row['perplexity']:.2f} | {row['perplexity'] / rows[0]['perplexity'] - 1:+.2%} | "
            f"{row['top1_agreement']:.1%} | {row['load_s']:.1f} s |",
            flush=True,
        )
    print(
        json.dumps(
            {
                "bench": "quant_quality",
                "model": args.model.name,
                "text": args.text.name,
                "window": args.window,
                "num_tokens": sum(len(window) - 1 for window in windows),
                "dtype": args.dtype,
                "rows": rows,
            }
        )
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder with safetensors")
    parser.add_argument("--text", type=Path, required=True, help="plain text, for example WikiText-2")
    parser.add_argument("--quants", nargs="+", default=["q8_0", "q4_k", "q4_0"])
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--max-tokens", type=int, help="stop after about so many tokens of the text")
    parser.add_argument("--dtype", default="auto", help="of activations; auto is the folder's own")
    parser.add_argument("--ram", default="auto")
    args = parser.parse_args()
    for path in (args.model, args.text):
        if not path.exists():
            parser.error(f"{path} does not exist")
    return args


def measure(
    args: argparse.Namespace, quant: str | None, windows: list[list[int]], best: list[Any]
) -> dict[str, Any]:
    """Return size and quality of one format; the first call fills ``best`` with the reference's top-1."""
    import torch

    import moe_offload

    started = time.perf_counter()
    model: Any = moe_offload.from_pretrained(
        args.model, quant=quant, dtype=args.dtype, ram=args.ram, context=args.window
    )
    load_s = time.perf_counter() - started
    is_first, nll, agreed, num_tokens = not best, 0.0, 0, 0
    for index, window in enumerate(windows):
        ids = torch.tensor([window])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        nll += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        top1 = logits.argmax(-1)
        if is_first:
            best.append(top1)
        agreed += int((top1 == best[index]).sum())
        num_tokens += len(top1)
    model.offload.close()
    weight_bytes, num_weights, name = weights(args.model, quant)
    return {
        "format": name,
        "weight_bytes": weight_bytes,
        "bits_per_weight": 8 * weight_bytes / num_weights,
        "perplexity": math.exp(nll / num_tokens),
        "top1_agreement": agreed / num_tokens,
        "load_s": load_s,
    }


def weights(folder: Path, quant: str | None) -> tuple[int, float, str]:
    """Return bytes of all weights, how many weights there are, and the format's name with its types."""
    import torch

    from moe_offload.runtime import quantized, skeleton
    from moe_offload.storage.checkpoint import open_checkpoint
    from moe_offload.storage.expert_format import BLOCK_SIZES
    from moe_offload.storage.quantize_plan import quantized_checkpoint

    checkpoint = open_checkpoint(folder)
    if quant is not None:
        model = skeleton.build_skeleton(checkpoint, torch.float32)
        checkpoint = quantized_checkpoint(quantized.make_plan(model, checkpoint, quant))
    by_type = checkpoint.bytes_by_type()
    num_weights = sum(
        num_bytes * BLOCK_SIZES[kind].elements / BLOCK_SIZES[kind].num_bytes
        for kind, num_bytes in by_type.items()
    )
    kinds = ", ".join(
        f"{kind.name} {num_bytes / sum(by_type.values()):.0%}" for kind, num_bytes in by_type.items()
    )
    return sum(by_type.values()), num_weights, f"{quant or 'as it is'} ({kinds})"


if __name__ == "__main__":
    main()
