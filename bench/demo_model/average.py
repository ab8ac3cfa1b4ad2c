"""Average the weights of two models of one shape: after further training, better than either.

    python bench/demo_model/average.py MODEL_A MODEL_B OUT

Takes configuration and tokenizer from MODEL_B; writes float32.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model_a", "model_b", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    average(args.model_a, args.model_b, args.out)


def average(model_a: Path, model_b: Path, out: Path) -> None:
    """Write (a + b) / 2; exits with a message if the two do not have the same tensors."""
    out.mkdir(parents=True, exist_ok=True)
    weights_b = load_file(model_b / "model.safetensors")
    with safe_open(model_a / "model.safetensors", framework="pt") as file:
        if set(file.keys()) != set(weights_b):
            raise SystemExit(f"{model_a} and {model_b} differ in their tensors' names")
        averaged = {name: mean(file.get_tensor(name), weights_b[name]) for name in weights_b}
    save_file(averaged, out / "model.safetensors", metadata={"format": "pt"})
    for name in COPIED:
        if (model_b / name).exists():
            shutil.copy(model_b / name, out / name)


def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.shape != b.shape:
        raise SystemExit(
            f"a tensor has shape {tuple(a.shape)} in one model and {tuple(b.shape)} in the other"
        )
    return (a.float() + b.float()) / 2


if __name__ == "__main__":
    main()
