"""The scripts that make the demo model, run as a user would run them, on a few kilobytes of text."""

import json
import lzma
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).resolve().parents[1] / "bench" / "demo_model"
SHAPE = [
    *("--num-hidden-layers", "2", "--num-experts", "4", "--top-k", "2", "--hidden-size", "32"),
    *("--moe-intermediate-size", "32", "--num-attention-heads", "2", "--num-key-value-heads", "1"),
    *("--head-dim", "16"),
]
RUN = [
    *("--seq-len", "32", "--batch-size", "8", "--lr", "0.01", "--warmup-steps", "2"),
    *("--threads", "1", "--log-every", "1", "--seed", "3"),
]


def run_script(name, *args, check=True):
    command = [sys.executable, str(SCRIPTS / name), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


def losses(done):
    return [float(value) for value in re.findall(r"^step \d+ \d+ s loss ([\d.]+)", done.stdout, re.MULTILINE)]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """Two domains, one compressed: counting in words, and rows of a multiplication table."""
    folder = tmp_path_factory.mktemp("text")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    lines = [f"{words[i % 10]} and then {words[(i + 1) % 10]}, naïvely counted.\n" for i in range(300)]
    (folder / "words.txt").write_text("".join(lines[:150]) + "<|endoftext|>\n" + "".join(lines[150:]))
    rows = "".join(f"{i} times {j} is {i * j}\n" for i in range(30) for j in range(10))
    (folder / "table.txt.xz").write_bytes(lzma.compress(rows.encode()))
    return folder


@pytest.fixture(scope="module")
def tokenizer_file(text_folder):
    path = text_folder / "made" / "tokenizer.json"
    run_script("train_tokenizer.py", "--text", text_folder, "--out", path, "--vocab-size", 300)
    return path


@pytest.fixture(scope="module")
def trained(text_folder, tokenizer_file):
    out = text_folder / "made" / "model"
    args = ["--text", text_folder, "--tokenizer", tokenizer_file, "--out", out, "--steps", 40]
    return out, run_script("train.py", *args, *SHAPE, *RUN)


def test_the_tokenizer_gives_every_byte_back_and_has_end_of_text_as_token_0(tokenizer_file):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    text = "naïve 白日\n\t{x} 🎈"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.get_vocab_size() == 300


def test_training_lowers_the_loss(trained):
    values = losses(trained[1])
    assert len(values) == 40
    assert sum(values[-5:]) < 0.7 * sum(values[:5])


def test_a_trained_folder_loads_in_transformers(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained[0])
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    assert model.config.model_type == "qwen3_moe"
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0


def test_a_resumed_run_goes_on_where_it_stopped(trained, text_folder):
    out, first = trained
    again = text_folder / "made" / "resumed"
    args = ["--text", text_folder, "--out", again, "--steps", 45, *RUN]
    resumed = run_script("train.py", "--resume", out, *args)
    assert "from step 40" in resumed.stdout
    assert len(losses(resumed)) == 5
    assert losses(resumed)[0] < 0.7 * losses(first)[0]
    assert json.loads((again / "config.json").read_text())["num_experts_per_tok"] == 2
    assert sorted(path.name for path in again.parent.iterdir()) == ["model", "resumed", "tokenizer.json"]


def test_a_new_run_from_a_model_starts_at_step_0_with_its_weights(trained, text_folder):
    out, first = trained
    args = ["--text", text_folder, "--out", text_folder / "made2" / "model", "--steps", 2, *RUN]
    done = run_script("train.py", "--init-from", out, *args)
    assert "from step 0" in done.stdout
    assert losses(done)[0] < 0.7 * losses(first)[0]


def test_an_unknown_domain_in_the_weights_is_named(text_folder, tokenizer_file):
    args = ["--text", text_folder, "--tokenizer", tokenizer_file, "--out", text_folder / "x"]
    done = run_script("train.py", *args, "--weights", "wrods=2", *SHAPE, *RUN, check=False)
    assert done.returncode != 0
    assert "wrods" in done.stderr


def test_a_folder_without_text_is_named(tmp_path):
    done = run_script("train_tokenizer.py", "--text", tmp_path, "--out", tmp_path / "t.json", check=False)
    assert done.returncode != 0
    assert f"{tmp_path} holds no *.txt" in done.stderr


def test_the_average_of_a_model_and_a_further_trained_one_lies_between_them(trained, text_folder):
    from safetensors.torch import load_file

    out = trained[0]
    further, averaged = text_folder / "made3" / "further", text_folder / "made3" / "averaged"
    run_script("train.py", "--init-from", out, "--text", text_folder, "--out", further, "--steps", 2, *RUN)
    run_script("average.py", out, further, averaged)
    a, b, mean = (load_file(folder / "model.safetensors") for folder in (out, further, averaged))
    assert mean.keys() == a.keys()
    name = "model.embed_tokens.weight"
    assert not a[name].equal(b[name])
    assert mean[name].equal((a[name] + b[name]) / 2)
