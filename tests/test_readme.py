"""What the documents say that a reader may type: commands, options, files, links, and the Python example."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from moe_offload.cli_parser import build_parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "moe_offload/demo/README.md"]
DOCUMENTS.remove(ROOT / "docs" / "LOG.md")  # a diary: what it names may be gone
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in DOCUMENTS}
README = TEXTS["README.md"]


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    (commands,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(commands.choices)


def options_of(*commands: str) -> set[str]:
    return {option for name in commands for option in parsers()[name]._option_string_actions}


def command_lines() -> list[str]:
    """Return every line of a code block that calls `moe-offload`, comments and optional parts taken off."""
    lines = []
    for text in TEXTS.values():
        for line in re.findall(
            r"^(?: {4})?(moe-offload [a-z-]+ .*|moe-offload [a-z-]+)$", text, re.MULTILINE
        ):
            lines.append(re.sub(r"[\[\]]|\.\.\.$", "", line.split("  #")[0]).strip())
    return lines


def test_there_are_command_lines_to_check() -> None:
    shown = {line.split()[1] for line in command_lines()}
    assert shown == set(parsers()), "README shows every command"


@pytest.mark.parametrize("line", command_lines())
def test_a_command_line_of_the_documents_is_understood(line: str) -> None:
    build_parser().parse_args(shlex.split(line.replace("...", ""))[1:])


def test_every_option_that_is_named_exists() -> None:
    table = README[README.index("| option | meaning |") : README.index("`chat` knows")]
    named = set(re.findall(r"`(--[a-z-]+)", table))
    assert len(named) > 20
    assert named <= options_of("generate"), named - options_of("generate")
    elsewhere = set(re.findall(r"`(?:moe-offload [a-z-]+ )?(--[a-z-]+)", README)) - named
    assert elsewhere <= options_of(*parsers()), elsewhere - options_of(*parsers())


def test_every_option_of_generate_is_in_the_readme() -> None:
    wanted = {option for option in options_of("generate") if option.startswith("--")} - {"--help"}
    missing = sorted(option for option in wanted if not re.search(rf"{option}(?![a-z-])", README))
    assert not missing, missing


@pytest.mark.parametrize("document", TEXTS)
def test_links_and_named_files_lead_somewhere(document: str) -> None:
    text, folder = TEXTS[document], (ROOT / document).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (folder / link).exists()] == []
    files = re.findall(
        r"(?:^|[`\s(])((?:bench|tests|docs|csrc|moe_offload)/[\w/.-]+\.(?:py|md|h|cpp|inc|cu|toml|txt))", text
    )
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_options_of_the_benchmarks_that_are_named_exist() -> None:
    calls = re.findall(r"python (bench/\w+\.py) ?([^`\n#]*)", "\n".join(TEXTS.values()))
    assert len(calls) > 8
    for script, arguments in calls:
        source = (ROOT / script).read_text()
        for option in re.findall(r"(?<!\S)(--[a-z-]+)", arguments):
            assert f'"{option}"' in source, f"{script} has no {option}"


def test_the_python_example_runs(tiny_moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert example.count('ram="2GiB"') == 2
    # The tests of one process hold more than a program that begins with this.
    example = example.replace('"2GiB"', '"auto"')
    names: dict[str, Any] = {"path": tiny_moe}
    exec(compile(example, "README.md", "exec"), names)
    assert names["model"].offload.cache is None, "it was closed"
    printed = capsys.readouterr().out
    assert printed.startswith("Once upon a time") and printed.count("\n") >= 2


def test_make_has_every_target_that_is_named() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert len(named) >= 6 and named <= targets, named - targets
