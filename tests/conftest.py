"""Fixtures that several test files share: toy checkpoints, made here, seconds to load."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from pathlib import Path

import pytest
from cuda_stand_in import build_stand_in
from filelock import FileLock
from hypothesis import settings

from moe_offload import profile_store
from moe_offload.planning.machine_speed import MachineSpeed
from moe_offload.residency import warm_start

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before anything imports torch

# A shell starts what runs in its background deaf to Ctrl-C, which children inherit; tests send it to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# matplotlib lists the fonts of a machine once, which takes seconds; that list is not our cache.
os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))

# What one run leaves behind for the next is not the next test's business; test_warm_start.py asks for it.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="moe_offload_tests_")

warm_start.enabled = False

# No test waits for a first look at the machine; test_machine_profile.py asks for it.
profile_store.keep(profile_store.quick_profile(MachineSpeed(20e9, 1e9, 1e11), num_threads=2), None)

settings.register_profile("default", deadline=None)
settings.register_profile("fuzz", deadline=None, max_examples=5_000)  # make fuzz
settings.load_profile("default")


@pytest.hookimpl(trylast=True)  # after what -m leaves out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of slow tests: one that is begun last keeps one core while the others wait."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> str:
    """csrc/cuda over stand-ins for runtime and grid, as a library; compiled once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    library = folder / "cuda_stand_in.so"
    with FileLock(f"{library}.lock"):
        if not library.exists():
            build_stand_in(library)
    return str(library)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def save_byte_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> int:
    """Write a tokenizer of one token per byte and a few special ones; return the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return len(alphabet) + len(SPECIAL_TOKENS)


def save_tiny_moe(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write a random Qwen3-MoE of 2 layers with 8 experts, top-2, and its byte tokenizer."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = save_byte_tokenizer(folder, chat_template=chat_template)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        eos_token_id=256,
        bos_token_id=None,
    )
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))
    return folder


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE checkpoint folder with a chat template."""
    return save_tiny_moe(tmp_path_factory.mktemp("tiny_moe"))
