"""The command line as a user meets it: output, exit codes, errors in one line, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_offload import cli, cli_chat, cli_session
from moe_offload.cli_chat import Conversation
from moe_offload.config import gib
from moe_offload.terminal import Progress, seconds

LAST_LINE = re.compile(
    r"^prompt \d+ tok .+ s · \d+ tok .+ s( .+ tok/s)? · (hit \d+ % · )?read .+ [MG]B · peak .+ of .+ [GM]iB$"
)


def run_cli(*args: str, env: dict[str, str] | None = None, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "moe_offload", *args],
        capture_output=True, text=True, timeout=120, env={**os.environ, **(env or {})}, **kwargs,
    )  # fmt: skip


def generate(tiny_moe: Path, *args: str) -> int:
    return cli.main(["generate", "--model", str(tiny_moe), *args])


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["inspect", "--model", "MODEL"]])
def test_help_and_inspect_import_neither_torch_nor_transformers(tiny_moe, args):
    args = [str(tiny_moe) if arg == "MODEL" else arg for arg in args]
    code = (
        "import sys\nfrom moe_offload import cli\n"
        "try:\n    code = cli.main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'safetensors', 'gguf'} & set(sys.modules)\n"
        "print(code, sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)
    assert done.stderr == "0 []\n" and done.stdout


def test_inspect_says_what_the_checkpoint_holds(tiny_moe, capsys):
    assert cli.main(["inspect", "--model", str(tiny_moe), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["family"], report["num_experts"], report["top_k"]) == ("qwen3_moe", 8, 2)
    assert report["expert_bytes"] == 2 * 8 * 3 * 64 * 32 * 4
    assert sum(report["bytes_by_format"].values()) == report["expert_bytes"] + report["dense_bytes"]
    smallest, whole = report["budgets"][0], report["budgets"][-1]
    assert smallest["fits"] and smallest["num_slots"] >= 2
    assert whole["expert_share"] == 1 and whole["num_slots"] == 16
    assert cli.main(["inspect", "--model", str(tiny_moe)]) == 0
    assert "2, 2 of them with experts" in capsys.readouterr().out


def test_generate_streams_text_and_ends_with_the_account(tiny_moe, capsys):
    assert generate(tiny_moe, "--prompt", "hello", "--max-new-tokens", "8") == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n") and len(out) > 1
    assert err.splitlines()[0].startswith("ram auto: ")
    assert LAST_LINE.match(err.splitlines()[-1]), err


def test_json_is_one_object_with_the_streamed_text(tiny_moe, capsys):
    args = ["--prompt", "hello", "--max-new-tokens", "8", "--ram", "2GiB", "--temperature", "0"]
    assert generate(tiny_moe, *args) == 0
    streamed = capsys.readouterr().out.removesuffix("\n")
    assert generate(tiny_moe, *args, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == streamed
    assert answer["new_tokens"] == len(answer["token_ids"]) == 8
    assert answer["finish_reason"] == "length" and answer["seed"] is None
    assert answer["plan"]["ram_bytes"] == answer["stats"]["ram_bytes"] == 2 << 30


def test_the_prompt_may_come_from_a_file_or_a_pipe(tiny_moe, capsys, tmp_path, monkeypatch):
    common = ["--max-new-tokens", "4", "--temperature", "0"]
    generate(tiny_moe, "--prompt", "grüß dich", *common)
    wanted = capsys.readouterr().out
    (tmp_path / "prompt.txt").write_text("grüß dich\n", encoding="utf-8")  # as editors end a file
    generate(tiny_moe, "--prompt-file", str(tmp_path / "prompt.txt"), *common)
    assert capsys.readouterr().out == wanted
    with (tmp_path / "prompt.txt").open() as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        generate(tiny_moe, *common)
    assert capsys.readouterr().out == wanted


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(tiny_moe, capsys):
    args = ["--prompt", "hello", "--raw", "--temperature", "0", "--max-new-tokens", "40", "--json"]
    generate(tiny_moe, *args)
    whole = json.loads(capsys.readouterr().out)["text"]
    stop = whole[6:8]
    generate(tiny_moe, *args, "--stop", stop, "--stop", "never to be seen")
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop" and answer["new_tokens"] < 40


def test_a_seed_repeats_a_sampled_answer_and_the_seed_of_a_run_is_told(tiny_moe, capsys):
    args = ["--prompt", "hello", "--temperature", "1.5", "--max-new-tokens", "12", "--json"]
    answers = []
    for seed in ([], [], ["--seed", "SAME"]):
        seed = [str(answers[0]["seed"]) if word == "SAME" else word for word in seed]
        generate(tiny_moe, *args, *seed)
        answers.append(json.loads(capsys.readouterr().out))
    first, second, repeated = answers
    assert first["token_ids"] == repeated["token_ids"]
    assert first["token_ids"] != second["token_ids"]  # the same by chance: about 260^-12


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x" * 3000], "leaves no room for an answer in the context of 2048"),
        (["--prompt", "x", "--max-new-tokens", "5000"], "are beyond the context of 2048; ask for at most"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be 0"),
        (["--prompt", "x", "--top-p", "1.5"], "top_p must be above 0 and at most 1"),
        (["--prompt", "x", "--stop", ""], "stop string is empty"),
        (["--prompt", "x", "--ram", "1MiB"], "the smallest ram that would do is"),
        (["--prompt", "x", "--ram", "lots"], "'lots' is not an amount of memory"),
        (["--prompt", "x", "--experts", "0"], "experts='0'"),
        (["--prompt", "x", "--policy", "nonsense"], "nonsense"),
        (["--prompt", "x", "--context", "9999999"], "beyond the 2048 positions"),
        (["--prompt", "x", "--raw", "--system", "be brief"], "a system message goes into the chat template"),
        (["--prompt-file", "/does/not/exist"], "--prompt-file /does/not/exist"),
        (["--prompt", "caf\udce9 au lait"], r"no UTF-8 text near 'caf\\udce9 au lait'"),
        (["--prompt", "x", "--system", "caf\udce9"], "no UTF-8 text"),
        (["--prompt", "x", "--timeline", "/does/not/exist.json"], "there is no folder /does/not"),
        (["--prompt", "x", "--timeline", "/"], "--timeline / is a folder"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(tiny_moe, capsys, args, message):
    assert generate(tiny_moe, *args) == 2
    out, err = capsys.readouterr()
    *notes, error = err.splitlines()
    assert error.startswith("moe-offload: error: ") and message in error
    assert out == "" and not any("Traceback" in line for line in notes)


def test_a_missing_or_damaged_checkpoint_is_one_line(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    for name in ("nowhere", "broken.gguf"):
        done = run_cli("inspect", "--model", str(tmp_path / name))
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("moe-offload: error: ") and done.stderr.count("\n") == 1
        assert name in done.stderr


def test_a_reader_that_goes_away_is_no_error(tiny_moe):
    """`moe-offload inspect | head -0`: no traceback, and the exit code of SIGPIPE."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "moe_offload", "inspect", "--model", str(tiny_moe)],
        stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    os.close(write_end)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        (">/dev/full", 2, "No space left on device"),
        (">&- 2>&- <&-", 0, ""),
        ("<&-", 0, ""),
    ],
)
def test_streams_that_take_nothing_are_no_traceback(tiny_moe, streams, code, said):
    command = f"{sys.executable} -m moe_offload inspect --model {tiny_moe} {streams}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr.count("\n") <= 1 and said in done.stderr


def test_a_terminal_that_cannot_show_a_character_is_shown_its_number(tiny_moe, tmp_path):
    folder = tmp_path / "modèle"
    folder.symlink_to(tiny_moe)
    done = run_cli("inspect", "--model", str(folder), env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "mod\\xe8le" in done.stdout


def test_download_asks_for_a_name(capsys):
    assert cli.main(["inspect", "--download"]) == 2
    assert "which model" in capsys.readouterr().err


def test_ctrl_c_while_the_command_line_is_imported_is_no_traceback(tmp_path):
    """It was one of importlib's, or was swallowed there and the command went on."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == os.environ['INTERRUPTED_IMPORT']:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
    )
    for module in ("moe_offload.cli_parser", "moe_offload.planning.kv_format", "moe_offload.cli_inspect"):
        done = run_cli("inspect", env={"PYTHONPATH": str(tmp_path), "INTERRUPTED_IMPORT": module})
        assert done.returncode == 130 and done.stdout == done.stderr == "", module


@pytest.fixture(scope="module")
def interrupted(tiny_moe, tmp_path_factory) -> tuple[dict[str, dict], Path]:
    """What came of Ctrl-C in each scenario of interrupt_child.py, and its TMPDIR."""
    temporary = tmp_path_factory.mktemp("interrupted")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "interrupt_child.py"), str(tiny_moe)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 3, done.stderr
    return {result["when"]: result for result in results}, temporary


@pytest.mark.parametrize("when", ["load", "prefill", "decode"])
def test_ctrl_c_ends_a_command_whose_disk_does_not_answer(interrupted, when):
    result = interrupted[0][when]
    assert result["code"] == 130
    assert result["threads"] == ["MainThread"] and result["files"] == 0
    assert "Traceback" not in result["err"]
    assert list(interrupted[1].iterdir()) == []


def test_what_was_said_before_ctrl_c_stays_and_is_accounted_for(interrupted):
    result = interrupted[0]["decode"]
    assert result["out"].strip()
    assert LAST_LINE.match(result["err"].splitlines()[-1])


class FakeTerminal(list):
    """A stream that says it is a terminal and keeps what was written."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.append(text)

    def flush(self) -> None:
        pass


def test_progress_shows_amounts_and_the_time_left(monkeypatch):
    monkeypatch.setattr("moe_offload.terminal.FIRST_SHOWN_S", 0.0)
    terminal = FakeTerminal()
    with Progress("loading", terminal, gib) as progress:
        progress.update(1 << 30, 4 << 30)
        while not terminal:
            pass
    assert terminal[-1] == "\r\x1b[K"  # nothing is left of it
    assert progress.line(10.0) == "loading · 1.00 GiB of 4.00 GiB · 30.0 s left"


def test_a_step_of_a_progress_has_its_own_label_and_start():
    progress = Progress("loading", FakeTerminal(), gib)
    loading, quantizing = progress.step("loading"), progress.step("quantizing")
    started = progress._started
    quantizing(1 << 30, 4 << 30)
    assert progress.line(10.0) == "quantizing · 1.00 GiB of 4.00 GiB · 30.0 s left"
    assert progress._started > started
    loading(0, 2 << 30)
    assert progress.line(1.0) == "loading · 0 B of 2.00 GiB · 1.0 s"


def test_progress_is_silent_when_nobody_looks(monkeypatch, capsys):
    monkeypatch.setattr("moe_offload.terminal.FIRST_SHOWN_S", 0.0)
    with Progress("loading", sys.stderr) as progress:
        progress.update(1, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("duration_s", "text"), [(3.14, "3.1 s"), (125, "2 min 05 s"), (59.97, "60.0 s"), (3720, "1 h 02 min")]
)
def test_durations_are_for_people(duration_s, text):
    assert seconds(duration_s) == text


@pytest.fixture
def chat_model(tiny_moe):
    """A loaded model and its tokenizer."""
    import moe_offload

    model = moe_offload.from_pretrained(tiny_moe, ram="2GiB", context=400)
    yield model, moe_offload.load_tokenizer(tiny_moe)
    model.offload.close()


def greedy():
    from moe_offload.runtime.generate import Sampling

    return Sampling(temperature=0)


def test_a_conversation_keeps_its_cache_and_answers_as_if_it_did_not(chat_model):
    from moe_offload.runtime.generate import encode_chat, run

    model, tokenizer = chat_model
    conversation = Conversation(model, tokenizer, "be brief")
    first = conversation.ask("hello", greedy(), cli_session.print_piece, max_new_tokens=6)
    second = conversation.ask("and now?", greedy(), cli_session.print_piece, max_new_tokens=6)
    assert first.cached_tokens == 0
    assert second.cached_tokens > first.prompt_tokens
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "be brief"}]
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "and now?"},
    ]
    afresh = run(
        model, tokenizer, encode_chat(tokenizer, messages), greedy(), lambda piece: None, max_new_tokens=6
    )
    assert afresh.text == second.text


def test_a_conversation_survives_ctrl_c(chat_model):
    """The interrupted pass has filled some layers' caches further than others."""
    model, tokenizer = chat_model
    conversation = Conversation(model, tokenizer, None)

    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    cut = conversation.ask("hello", greedy(), interrupt, max_new_tokens=50)
    assert cut.finish_reason == "interrupted" and cut.new_tokens >= 1
    after = conversation.ask("go on", greedy(), lambda piece: None, max_new_tokens=5)
    assert after.cached_tokens > 0 and after.new_tokens == 5


def test_a_full_context_is_told_and_leaves_the_conversation_as_it_was(tiny_moe, monkeypatch, capsys):
    lines = iter(["hello", "x" * 900, "/nonsense", "caf\udce9", "/reset", "hello"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError))
    code = cli.main(
        ["chat", "--model", str(tiny_moe), "--context", "300", "--temperature", "0", "--max-new-tokens", "5"]
    )
    out, err = capsys.readouterr()
    assert code == 0
    first, again = out.splitlines()[0], out.splitlines()[-1]
    assert first == again and first
    assert "leaves no room for an answer in the context of 300" in err and "/reset" in err
    assert "commands are /reset and /exit" in err and r"no UTF-8 text near 'caf\\udce9'" in err


def test_the_prompt_is_no_part_of_answers_that_go_to_a_file(monkeypatch, capsys):
    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Typed("hello\n"))
    assert cli_chat._read_line() == "hello"
    assert capsys.readouterr() == ("", "> ")


def test_chat_without_a_template_names_the_way_out(tmp_path, capsys):
    from conftest import save_tiny_moe

    folder = save_tiny_moe(tmp_path / "base", chat_template=None)
    assert cli.main(["chat", "--model", str(folder)]) == 2
    assert "no chat template" in capsys.readouterr().err
    assert cli.main(["generate", "--model", str(folder), "--prompt", "x", "--max-new-tokens", "2"]) == 0
