"""Train a byte-level BPE tokenizer (GPT-2's pre-tokenization) on a folder of text.

    python bench/demo_model/train_tokenizer.py --text FOLDER --out OUT/tokenizer.json

Every file gives the same amount of text at most, so that small domains get tokens of their own.
``<|endoftext|>`` is token 0.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus import END_OF_TEXT, domain, sample_documents, text_files


def main() -> None:
    """Train, write OUT and print each domain's bytes per token."""
    args = parse_args()
    tokenizer = train(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_name(args.out.name + ".partial")
    tokenizer.save(str(partial))
    os.replace(partial, args.out)
    print(f"{args.out}: {tokenizer.get_vocab_size()} tokens")
    for path in text_files(args.text):
        text = "".join(sample_documents(path, 100_000, args.seed + 1))
        print(f"{domain(path):16} {len(text.encode()) / len(tokenizer.encode(text).ids):.2f} bytes per token")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="folder of *.txt and *.txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="tokenizer.json to write")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--max-mb", type=float, default=4, help="of text per file, chosen at random")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(args: argparse.Namespace) -> Any:
    """Return a tokenizers.Tokenizer: all 256 bytes, END_OF_TEXT and the learned merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(args), trainer)
    return tokenizer


def texts(args: argparse.Namespace) -> Iterator[str]:
    for path in text_files(args.text):
        yield from sample_documents(path, int(args.max_mb * 1e6), args.seed)


if __name__ == "__main__":
    main()
