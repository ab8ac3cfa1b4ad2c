"""Perplexity of a model on a text file: what do quantization or a memory budget cost in quality?

    python bench/perplexity.py --model demo --text wikitext2_valid.txt --window 512

The text is cut into windows that do not overlap; every token of a window but the first is
predicted from those before it in the window. --backend transformers measures a Hugging Face
folder, or a qwen3moe GGUF dequantized to float32, without this package's runtime: the floor that
the quantized file and the runtime are held against.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from energy import measured_energy


def main() -> None:
    """Print a card, the running perplexity and one line of JSON."""
    args = parse_args()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    forward, tokenizer, stats = load(args)
    windows = cut_windows(tokenizer, args)
    print(f"model    {args.model} ({model_bytes(args.model) / 2**20:.1f} MiB), backend {args.backend}")
    print(f"text     {args.text}, {len(windows)} windows of {args.window} tokens")
    print(f"machine  {platform.processor() or platform.machine()}, torch {torch.__version__}")
    energy = measured_energy()
    energy.begin()
    begin = time.perf_counter()
    nll, num_tokens = 0.0, 0
    for index, window in enumerate(windows):
        nll += window_nll(forward, window)
        num_tokens += len(window) - 1
        if (index + 1) % max(1, len(windows) // 8) == 0 or index + 1 == len(windows):
            print(f"{num_tokens:8d} tokens  perplexity {math.exp(nll / num_tokens):8.2f}", flush=True)
    seconds = time.perf_counter() - begin
    result = {
        "bench": "perplexity", "model": args.model.name, "model_bytes": model_bytes(args.model),
        "text": args.text.name, "backend": args.backend, "experts": args.experts, "ram": args.ram,
        "kv": args.kv, "dtype": args.dtype,
        "window": args.window, "num_tokens": num_tokens, "nats_per_token": nll / num_tokens,
        "perplexity": math.exp(nll / num_tokens),
        "seconds": seconds, "tokens_per_s": num_tokens / seconds, "stats": stats(),
        "energy": energy.meter.describe(), **energy.prompt_only(num_tokens),
    }  # fmt: skip
    energy.meter.close()
    print(result["energy"])
    print(json.dumps(result))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="GGUF file, Hugging Face folder, or demo")
    parser.add_argument(
        "--text", type=Path, required=True, help="plain text, for example WikiText-2 validation"
    )
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--max-tokens", type=int, help="stop after about so many tokens of the text")
    parser.add_argument("--ram", default="auto")
    parser.add_argument("--experts", help='"25%%", a number, or all')
    parser.add_argument("--backend", choices=["runtime", "transformers"], default="runtime")
    parser.add_argument("--kv", choices=["q8_0"], help="keys and values in fewer bits")
    parser.add_argument("--dtype", default="auto", help="of activations and plain keys and values")
    parser.add_argument("--threads", type=int, help="torch's threads")
    args = parser.parse_args()
    args.model = demo_path() if args.model == "demo" else Path(args.model)
    if args.window < 2:
        parser.error("--window must be at least 2 tokens")
    for path in (args.model, args.text):
        if not path.exists():
            parser.error(f"{path} does not exist")
    return args


def demo_path() -> Path:
    """Return the bundled model's path without importing the package."""
    return Path(__file__).resolve().parents[1] / "moe_offload" / "demo" / "tiny-moe.gguf"


def model_bytes(path: Path) -> int:
    """Bytes of the weights on disk."""
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def load(args: argparse.Namespace) -> tuple[Callable[[Any], Any], Any, Callable[[], dict[str, Any]]]:
    """Return (token ids (1, window) -> logits (window, vocab)), tokenizer, and a source of counters."""
    import moe_offload

    if args.backend == "transformers":
        model, tokenizer = load_with_transformers(args.model)
    else:
        model = moe_offload.from_pretrained(
            str(args.model),
            ram=args.ram,
            experts=args.experts,
            context=args.window,
            kv=args.kv,
            dtype=args.dtype,
        )
        tokenizer = moe_offload.load_tokenizer(str(args.model))

    def forward(input_ids: Any) -> Any:
        return model(input_ids=input_ids, use_cache=args.kv is not None).logits[0]

    def stats() -> dict[str, Any]:
        return {} if args.backend == "transformers" else model.offload.stats().as_dict()

    return forward, tokenizer, stats


def load_with_transformers(path: Path) -> tuple[Any, Any]:
    """Load a folder as it is, or a GGUF dequantized; float32 weights."""
    import torch

    if path.is_file():
        from demo_model.reference import reference_model

        import moe_offload

        return reference_model(path, torch.float32), moe_offload.load_tokenizer(str(path))
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")
    return model.eval(), PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))


def cut_windows(tokenizer: Any, args: argparse.Namespace) -> list[list[int]]:
    """Return whole windows only: a short last one would be predicted from less context."""
    text = args.text.read_text(encoding="utf-8")
    if args.max_tokens is not None:
        text = text[: 16 * args.max_tokens]  # no tokenizer needs tokenizing a whole book for a page
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: args.max_tokens]
    windows = [ids[i : i + args.window] for i in range(0, len(ids) - args.window + 1, args.window)]
    if not windows:
        raise SystemExit(f"{args.text} has {len(ids)} tokens, fewer than one window of {args.window}")
    return windows


def window_nll(forward: Callable[[Any], Any], window: list[int]) -> float:
    """Return the summed negative log-likelihood in nats of window[1:]."""
    import torch

    ids = torch.tensor([window])
    with torch.no_grad():
        logits = forward(ids)[:-1].double()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))


if __name__ == "__main__":
    main()
