"""The command line on full disks, with streams that take nothing, empty and endless input, odd models."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_offload import cli, cli_generate
from moe_offload.cli_generate import MOST_PROMPT_BYTES


def generate(model: Path, *args: str) -> int:
    return cli.main(["generate", "--model", str(model), "--max-new-tokens", "2", *args])


def shell(line: str) -> subprocess.CompletedProcess[str]:
    line = line.replace("moe-offload", f"{sys.executable} -m moe_offload")
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)


def test_a_log_on_a_full_disk_does_not_cost_the_answer(tiny_moe) -> None:
    """Notes were written there first, and the command died of them, in silence."""
    line = f"moe-offload generate --model {tiny_moe} --max-new-tokens 2 --prompt x --json"
    done = shell(f"{line} 2>/dev/full")
    assert done.returncode == 0
    assert json.loads(done.stdout)["new_tokens"] == 2


def test_a_full_disk_under_the_answer_is_named(tiny_moe) -> None:
    done = shell(f"moe-offload inspect --model {tiny_moe} >/dev/full")
    assert done.returncode == 2
    assert done.stderr == "moe-offload: error: standard output: No space left on device\n"


@pytest.mark.parametrize("command", ["generate", "inspect", "plan", "trace"])
def test_an_empty_model_is_not_the_folder_one_is_in(command, capsys) -> None:
    """`--model "$UNSET"` loaded any model below the working folder."""
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--model", ""])
    assert end.value.code == 2
    assert "argument --model: it is empty" in capsys.readouterr().err


def test_a_prompt_without_an_end_is_refused(tiny_moe, tmp_path, monkeypatch, capsys) -> None:
    """/dev/zero was read until the machine had no memory left."""
    monkeypatch.setattr(cli_generate, "MOST_PROMPT_BYTES", 1 << 20)
    assert generate(tiny_moe, "--prompt-file", "/dev/zero") == 2
    assert "the prompt has more than 1 MiB" in capsys.readouterr().err
    assert MOST_PROMPT_BYTES >= 1 << 24


def test_line_ends_of_a_pipe_are_those_of_a_file(tiny_moe, tmp_path, monkeypatch, capsys) -> None:
    content, path = b"\xef\xbb\xbfone\r\ntwo\r\n", tmp_path / "prompt.txt"
    path.write_bytes(content)
    answers = []
    for given in (["--prompt-file", str(path)], [], ["--prompt", "one\ntwo"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert generate(tiny_moe, "--raw", "--json", *given) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert [answer["prompt_tokens"] for answer in answers] == [7, 7, 7]
    assert answers[0]["token_ids"] == answers[1]["token_ids"] == answers[2]["token_ids"]


@pytest.mark.parametrize("command", [["tune", "--seconds", "2"], ["fit-predictor", "--text", "TEXT"]])
def test_a_dense_model_has_nothing_to_tune_or_fit(tmp_path, command, capsys) -> None:
    """It was told to pass --allow-dense, which it had."""
    from conftest import save_byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab_size = save_byte_tokenizer(tmp_path)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"{number} words " * 60 for number in range(12)))
    words = [str(text) if word == "TEXT" else word for word in command]
    for more in ([], ["--allow-dense"]):
        assert cli.main([*words, "--model", str(tmp_path), *more]) == 2
        assert "has no experts, so there is nothing to" in capsys.readouterr().err
    assert generate(tmp_path, "--prompt", "x") == 2
    assert "(--allow-dense)" in capsys.readouterr().err


def test_fit_predictor_looks_first_whether_it_can_keep_what_it_finds(tiny_moe, tmp_path, monkeypatch, capsys):
    """It recorded and fitted for minutes, and then could not write."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"{number} words " * 60 for number in range(12)))
    assert cli.main(["fit-predictor", "--model", str(tiny_moe), "--text", str(text)]) == 2
    said = capsys.readouterr().err
    assert "Not a directory; set XDG_CACHE_HOME to another folder or pass -o" in said
    assert "planned" not in said  # no model was loaded


@pytest.fixture
def changed(tiny_moe, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_moe, tmp_path / "changed"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "fails with this conversation (ZeroDivisionError: division by zero)"),
        ("{{ messages[7].content + 1 }}", "the model's chat template"),
        ("{{ raise_exception('no') }}", "refuses this conversation: no"),
    ],
)
def test_a_template_that_fails_is_named(changed, template, message, capsys) -> None:
    (changed / "chat_template.jinja").write_text(template)
    assert generate(changed, "--prompt", "x") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[1]", '{"model_type": "\udcff"}'])
def test_a_broken_config_is_not_called_a_broken_tokenizer(changed, content, capsys) -> None:
    (changed / "config.json").write_bytes(os.fsencode(content))
    assert generate(changed, "--prompt", "x") == 2
    said = capsys.readouterr().err
    assert f"{changed / 'config.json'}: " in said and "tokenizer" not in said
