"""What bench/demo_model/train.py learns from: domains of text, as tokens, and batches of them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from corpus import END_OF_TEXT, domain, sample_documents, text_files

VALIDATION_FRACTION = 0.02

say = partial(print, flush=True)


@dataclass
class Domain:
    """One file's tokens: uint16, documents each ended by END_OF_TEXT."""

    name: str
    weight: float
    train: np.ndarray
    validation: np.ndarray


def load_domains(args: argparse.Namespace) -> list[Domain]:
    """Tokenize a sample of every file; files with weight 0 or too little text are left out."""
    from tokenizers import Tokenizer

    weights = {name: float(weight) for name, weight in (item.split("=") for item in args.weights)}
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    domains = []
    for path in text_files(args.text):
        weight = weights.pop(domain(path), 1.0)
        if weight == 0:
            continue
        tokens = tokenize(tokenizer, path, args)
        num_validation = max(int(len(tokens) * VALIDATION_FRACTION), args.seq_len + 1)
        train, validation = tokens[:-num_validation], tokens[-num_validation:]
        if len(train) > args.seq_len:
            domains.append(Domain(domain(path), weight, train, validation))
    if weights or not domains:
        usable = [item.name for item in domains]
        raise SystemExit(f"--weights names {sorted(weights)} in vain: {args.text} has usable {usable}")
    say(f"{sum(len(d.train) for d in domains) / 1e6:.1f} M tokens of {len(domains)} domains")
    return domains


def tokenize(tokenizer: Any, path: Path, args: argparse.Namespace) -> np.ndarray:
    """Return the token ids of a sample of ``path``."""
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for document in sample_documents(path, int(args.max_mb * 1e6), args.seed):
        ids.extend(tokenizer.encode(document).ids)
        ids.append(end_id)
    return np.array(ids, dtype=np.uint16)


def draw_batch(domains: list[Domain], rng: np.random.Generator, args: argparse.Namespace) -> Any:
    """Return (batch_size, seq_len) token ids."""
    import torch

    weights = np.array([d.weight for d in domains])
    rows = []
    for index in rng.choice(len(domains), args.batch_size, p=weights / weights.sum()):
        tokens = domains[index].train
        first = rng.integers(len(tokens) - args.seq_len)
        rows.append(tokens[first : first + args.seq_len].astype(np.int64))
    return torch.from_numpy(np.stack(rows))
