"""GGUF checkpoints: three programs agree on their logits, and every trap of a file is met by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE
from three_way import assert_three_way, logits_from_spans, transformers_logits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy_models import save_toy_model

from moe_offload.storage.checkpoint import open_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "bench" / "demo_model"))
from export_gguf import export_gguf

VOCAB_SIZE = 260
IDS = [
    int(token) for token in torch.randint(0, VOCAB_SIZE, (48,), generator=torch.Generator().manual_seed(1))
]


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the 256 bytes, one merge (llama.cpp wants some) and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate([*alphabet, "ab"])}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(family: str, **overrides: Any) -> Path:
        folder = tmp_path_factory.mktemp(family)
        save_tokenizer(folder)
        # llama.cpp always renormalises Qwen3-MoE's routing weights, as every released model does.
        extra = {"norm_topk_prob": True} if family.startswith("qwen3_moe") else {}
        return save_toy_model(family, folder, vocab_size=VOCAB_SIZE, **extra, **overrides)

    return make


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("tied", [False, True])
def test_three_programs_agree(family: str, tied: bool, toy_folder: Any, tmp_path: Path) -> None:
    folder = toy_folder(family, tie_word_embeddings=tied)
    path = export_gguf(folder, tmp_path / "model.gguf", "F32")
    assert open_checkpoint(path).config["tie_word_embeddings"] is tied
    assert_three_way(folder, path, IDS, logits_from_spans)
    assert torch.equal(logits_from_spans(path, IDS), transformers_logits(folder, IDS))
