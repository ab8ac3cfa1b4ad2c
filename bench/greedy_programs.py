"""Ways to run one model that bench/against_llama_cpp.py compares: this package, llama.cpp, float64."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Logits = Callable[[list[int]], np.ndarray]  # token ids -> (num_tokens, vocab_size)


@dataclass(frozen=True)
class Program:
    """A way to run the model: all logits of a text, and greedy continuation.

    ``continue_greedily(token_ids, num_tokens)`` returns the new tokens, an end-of-text token
    included, and the logits each was chosen from, (num_new_tokens, vocab_size).
    """

    logits: Logits
    continue_greedily: Callable[[list[int], int], tuple[list[int], np.ndarray]]


def open_ours(args: argparse.Namespace) -> Program:
    """This package's runtime under the memory limits of the command line."""
    import moe_offload

    model = moe_offload.from_pretrained(str(args.model), ram=args.ram, experts=args.experts)
    return transformers_program(model)


def transformers_program(model: Any) -> Program:
    """Any transformers model; generation ends at its end-of-text token, which is kept."""
    import torch

    def logits(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().numpy()

    def continue_greedily(ids: list[int], num_tokens: int) -> tuple[list[int], np.ndarray]:
        inputs = torch.tensor([ids])
        out = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits).double().numpy()

    return Program(logits, continue_greedily)


def open_llama(path: Path, context: int, threads: int = 2) -> Program:
    """llama.cpp through llama-cpp-python: greedy, no penalties, float32 key-value cache."""
    from llama_cpp import GGML_TYPE_F32, Llama

    llama = Llama(
        str(path), n_ctx=max(512, context), n_threads=threads, n_threads_batch=threads, logits_all=True,
        seed=0, verbose=False, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32,
    )  # fmt: skip

    def logits(ids: list[int]) -> np.ndarray:
        llama.reset()
        llama.eval(ids)
        return llama.scores[: len(ids)].astype(np.float64)

    def continue_greedily(ids: list[int], num_tokens: int) -> tuple[list[int], np.ndarray]:
        llama.reset()
        new_ids: list[int] = []
        for token_id in llama.generate(ids, temp=0.0, repeat_penalty=1.0, reset=False):
            new_ids.append(token_id)
            if token_id == llama.token_eos() or len(new_ids) == num_tokens:
                break
        first = len(ids) - 1  # the prompt's last row chose the first new token
        return new_ids, llama.scores[first : first + len(new_ids)].astype(np.float64)

    return Program(logits, continue_greedily)


def open_reference(path: Path) -> Logits:
    """The same weights in float64."""
    from demo_model.reference import reference_model

    return transformers_program(reference_model(path)).logits
