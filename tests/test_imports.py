"""Imports go one way (docs/ARCHITECTURE.md, reading order), and what must be quick imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moe_offload

PACKAGE = Path(moe_offload.__file__).parent
REPOSITORY = PACKAGE.parent

# Each part may import itself and what stands above it.
READING_ORDER = [
    ("errors", "config", "npz", "whole_file"),
    ("storage.expert_format",),
    ("profile_schema",),
    ("profile_parse", "profile_write"),
    ("device", "cuda", "cuda_memory"),
    ("stats", "trace_formats"),
    ("trace",),
    ("_native",),
    ("planning",),
    ("storage",),
    ("residency",),
    ("replay", "replay_layers"),
    ("header_costs", "header_sizes", "hit_outlook", "prompt_outlook"),
    ("profile_store", "rehearsals"),
    ("op_arguments",),
    ("ops",),
    ("expert_ops",),
    ("measure", "expert_bench", "measure_tiers", "measure_experts", "measure_steps", "measure_device"),
    ("predictors",),
    ("runtime",),
    ("tune_tiers",),
    ("tune_facts",),
    ("tune_stage",),
    ("tune",),
    ("tune_profile",),
    (
        "terminal",
        "outlook",
        "plan_plot",
        "cli",
        "cli_chat",
        "cli_fit_predictor",
        "cli_generate",
        "cli_info",
        "cli_inspect",
        "cli_parser",
        "cli_plan",
        "cli_plan_machine",
        "cli_session",
        "cli_trace",
        "cli_tune",
        "__main__",
    ),
]
WITHOUT_TORCH = {
    "errors",
    "config",
    "npz",
    "whole_file",
    "device",
    "profile_schema",
    "profile_parse",
    "profile_write",
    "cuda",
    "cuda_memory",
    "storage.expert_format",
    "stats",
    "trace",
    "trace_formats",
    "planning",
    "storage",
    "residency",
    "header_costs",
    "header_sizes",
    "hit_outlook",
    "prompt_outlook",
    "profile_store",
    "rehearsals",
    "replay",
    "replay_layers",
}
HEAVY = {"torch", "transformers"}


def source_files() -> dict[str, Path]:
    """Every module of the package by dotted name without the package's; predictors/ lies beside it."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path
    for path in sorted((REPOSITORY / "predictors").glob("*.py")):
        files[f"predictors.{path.stem}".removesuffix(".__init__")] = path
    del files["__init__"]
    return files


FILES = source_files()


def part_of(module: str) -> tuple[int, str]:
    """Return the position in the reading order, and the part's name; the longest name that fits."""
    fitting = [
        (position, part)
        for position, parts in enumerate(READING_ORDER)
        for part in parts
        if module == part or module.startswith(f"{part}.")
    ]
    assert fitting, f"{module} is not in the reading order of docs/ARCHITECTURE.md"
    return max(fitting, key=lambda item: len(item[1]))


def imports_of(path: Path) -> set[str]:
    """Return every module that a file imports, also inside functions; not for type checking only."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_there_are_files_to_check() -> None:
    parts = {part_of(module)[1] for module in FILES}
    assert {"planning", "residency", "storage", "runtime", "predictors"} <= parts
    assert len(FILES) >= 15


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_only_go_up_the_reading_order(module: str) -> None:
    position, _ = part_of(module)
    for imported in imports_of(FILES[module]):
        name = imported.removeprefix("moe_offload.")
        if name == imported or name not in {*FILES, "_native"}:
            continue  # another package, or a name inside a module that is checked itself
        assert part_of(name)[0] <= position, f"{module} imports {name}, which is read after it"


@pytest.mark.parametrize("module", [m for m in sorted(FILES) if part_of(m)[1] in WITHOUT_TORCH])
def test_deciding_and_keeping_import_no_torch(module: str) -> None:
    """storage/ may import transformers inside functions that only loading calls."""
    top_level = {
        name.split(".")[0]
        for statement in ast.parse(FILES[module].read_text()).body
        for name in _names(statement)
    }
    assert not top_level & HEAVY, f"{module} imports {top_level & HEAVY}"


def _names(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names}
    if isinstance(statement, ast.ImportFrom):
        return {statement.module or ""}
    return set()


def test_planning_and_residency_load_without_torch() -> None:
    modules = [f"moe_offload.{m}" for m in FILES if part_of(m)[1] in ("planning", "residency")]
    code = f"import sys, {', '.join(modules)}; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert done.stdout.strip() == "[]"
