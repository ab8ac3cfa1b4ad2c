"""Run a text through a model and keep what fitting a predictor needs: router inputs, choices, token ids."""

from __future__ import annotations

import lzma
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.predictors.fit import Recording
from moe_offload.runtime.predictor_inputs import embed, norms_of

SEPARATOR = "<|endoftext|>"
WINDOW_TOKENS = 256
LEAST_DOCUMENT_CHARS = 400
CHARS_PER_TOKEN = 12  # more than a window ever needs

Documents = list[str]


def read_documents(paths: Sequence[Path]) -> Documents:
    """Return the documents of text files: parts between lines <|endoftext|>, or else pieces of equal size.

    Raises:
        ConfigError: a file cannot be read, is no UTF-8, or there is too little text.
    """
    documents: Documents = []
    for path in paths:
        try:
            raw = path.read_bytes()
            text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
        except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
            raise ConfigError(
                f"--text {path}: {getattr(error, 'strerror', None) or error}; plain text in UTF-8 is wanted"
            ) from error
        parts = [part.strip() for part in text.split(SEPARATOR)]
        parts = [part for part in parts if len(part) >= LEAST_DOCUMENT_CHARS]
        documents += parts if len(parts) > 1 else _pieces(text)
    if len(documents) < 8:
        raise ConfigError(
            f"--text holds {len(documents)} documents of {LEAST_DOCUMENT_CHARS} characters or more; a fit "
            f"needs at least 8 (separate them by lines {SEPARATOR})"
        )
    return documents


def split_documents(documents: Documents, held_out_share: float, seed: int) -> tuple[Documents, Documents]:
    """Return (for the fit, held out), shuffled; a document is in one of them only."""
    shuffled = sorted(set(documents))
    random.Random(seed).shuffle(shuffled)
    count = max(2, round(held_out_share * len(shuffled)))
    return shuffled[count:], shuffled[:count]


def record(
    model: Any,
    tokenizer: Any,
    documents: Documents,
    num_tokens: int,
    *,
    window_tokens: int = WINDOW_TOKENS,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Recording:
    """Run windows of the documents, one of each before a second of any, until ``num_tokens`` are there."""
    chooser, pieces, done = random.Random(seed), [], 0
    layers = list(model.offload.spec.moe_layers)
    with (
        _residual_sizes(model, layers) as sizes,
        model.offload.trace(router_inputs=True) as recorder,
        torch.no_grad(),
    ):
        for document in _endless(documents):
            if done >= num_tokens:
                break
            span = window_tokens * CHARS_PER_TOKEN
            start = chooser.randrange(max(1, len(document) - span))
            input_ids = tokenizer(document[start : start + span], return_tensors="pt").input_ids
            input_ids = input_ids[:, :window_tokens]
            if input_ids.shape[1] < 2:
                continue
            recorder.begin_sequence()
            model(input_ids, logits_to_keep=1)
            pieces.append(input_ids[0])
            done += input_ids.shape[1]
            if on_progress is not None:
                on_progress(min(done, num_tokens), num_tokens)
        trace = recorder.trace()
    token_ids = torch.cat(pieces)
    assert trace.router_inputs is not None and trace.weights is not None, "the recording has no inputs"
    embedded = torch.cat([embed(model, piece).half() for piece in pieces])
    same_width = embedded.shape[1] == trace.router_inputs.shape[2]
    return Recording(
        layers=trace.layers,
        router_inputs=trace.router_inputs,
        experts=trace.experts.astype(np.int64),
        weights=trace.weights.astype(np.float32),
        seq_len=trace.seq_len.astype(np.int64),
        token_ids=token_ids.numpy(),
        embeddings=embedded.numpy() if same_width else None,
        residual_rms={i: float(np.mean(values)) for i, values in sizes.items() if values},
    )


def recording_bytes_per_token(num_layers: int, hidden_size: int, top_k: int) -> int:
    """Return what one recorded token takes, the copy that joins the passes included."""
    return 2 * num_layers * (2 * hidden_size + 12 * top_k) + 2 * hidden_size


@contextmanager
def _residual_sizes(model: Any, layers: list[int]) -> Iterator[dict[int, list[float]]]:
    """Collect the residual's root mean square before each router's norm, one value a pass."""
    sizes: dict[int, list[float]] = {layer_idx: [] for layer_idx in layers}
    try:
        norms = norms_of(model, layers)
    except CheckpointError:
        norms = {}

    def keeper(layer_idx: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            sizes[layer_idx].append(float(args[0].float().square().mean(dim=-1).sqrt().mean()))

        return keep

    hooks = [norm.register_forward_pre_hook(keeper(layer_idx)) for layer_idx, norm in norms.items()]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def _endless(documents: Documents) -> Iterator[str]:
    while True:
        yield from documents


def _pieces(text: str) -> Documents:
    size = max(LEAST_DOCUMENT_CHARS, len(text) // 64)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    return [piece for piece in pieces if len(piece) >= LEAST_DOCUMENT_CHARS]
