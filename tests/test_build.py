"""csrc/objects.py: an object is compiled again when what it is made of has changed, and only then."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import run_sanitizers

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location("objects", ROOT / "csrc" / "objects.py")
assert spec is not None and spec.loader is not None
objects = importlib.util.module_from_spec(spec)
spec.loader.exec_module(objects)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Tree:
    """One source and a header, and what was compiled of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.compiled = folder, list[str]()
        self.source, self.header = folder / "unit.cpp", folder / "unit.h"
        self.source.write_text('#include "unit.h"\nint unit() { return UNIT; }\n')
        self.header.write_text("#define UNIT 1\n")

    def build(self, *flags: str, made_with: str = "", compiler: tuple[str, ...] = ("g++",)) -> str:
        """Return the object that a build in a new folder gets."""
        kept = objects.KeptObjects(self.folder / "kept", compiler, made_with)
        to = self.folder / "unit.o"
        to.unlink(missing_ok=True)
        kept.put(self.source, flags, to, self._compile)
        return to.read_text()

    def _compile(self, to: Path) -> None:
        self.compiled.append(self.header.read_text())
        to.write_text(f"object {len(self.compiled)}")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_what_has_not_changed_is_not_compiled_again(tree):
    assert [tree.build("-O1"), tree.build("-O1")] == ["object 1", "object 1"]


def test_a_header_a_flag_a_version_and_the_file_itself_count(tree):
    tree.build("-O1")
    tree.header.write_text("#define UNIT 2\n")
    assert tree.build("-O1") == "object 2"
    assert tree.build("-O2") == "object 3"
    assert tree.build("-O2", made_with="pybind11 9") == "object 4"
    tree.source.write_text("int unit() { return 3; }\n")
    assert tree.build("-O2", made_with="pybind11 9") == "object 5"
    assert tree.build("-O2") == "object 6"


def test_what_a_wrapper_adds_counts(tree):
    """run_sanitizers.py compiles through one; its flags are on no command line that setup.py sees."""
    wrapper = tree.folder / "c++"
    for flags in ("-fsanitize=thread", "-fsanitize=address"):
        wrapper.write_text(f'#!/bin/sh\nexec g++ {flags} -include {tree.header} "$@"\n')
        wrapper.chmod(0o755)
        tree.build(compiler=(str(wrapper),))
    assert len(tree.compiled) == 2
    tree.source.write_text("int unit() { return UNIT; }\n")  # the header comes by -include alone
    tree.build(compiler=(str(wrapper),))
    tree.header.write_text("#define UNIT 5\n")
    tree.build(compiler=(str(wrapper),))
    assert len(tree.compiled) == 4


def test_the_newest_of_each_command_is_kept(tree):
    for number in range(3):
        tree.header.write_text(f"#define UNIT {number}\n")
        tree.build("-O1")
    tree.build("-O2")
    assert len(list((tree.folder / "kept").glob("unit-*.o"))) == 2


def test_what_fails_to_compile_is_not_kept(tree):
    def fail(to: Path) -> None:
        to.write_text("half")
        raise RuntimeError("no room")

    kept = objects.KeptObjects(tree.folder / "kept", ["g++"], "")
    with pytest.raises(RuntimeError, match="no room"):
        kept.put(tree.source, [], tree.folder / "unit.o", fail)
    assert tree.build() == "object 1"


def test_every_source_is_found_to_include_what_the_compiler_reads():
    """A header that the fingerprint misses would be a change that no build sees."""
    for name in ("cpu/kernels_baseline.cpp", "decode/token_kernels_baseline.cpp", "io/direct_read.cpp"):
        source = ROOT / "csrc" / name
        asked = ["g++", "-std=c++20", "-MM", f"-I{ROOT / 'csrc'}", str(source)]
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
        read = {Path(word).resolve() for word in done.stdout.replace("\\\n", " ").split()[1:]}
        assert len(read) > 3
        assert read <= {path.resolve() for path in objects.included(source)}


@pytest.mark.parametrize("name", run_sanitizers.SANITIZERS)
def test_what_no_sanitizer_instruments_is_the_object_of_an_install(name, tmp_path, monkeypatch):
    """Else the largest files were compiled once more; and nothing that runs may be left out."""
    monkeypatch.delenv("CXX", raising=False)
    install = shlex.split(sysconfig.get_config_var("CXX") or "g++")
    runs = run_sanitizers.sanitized_isas(name)
    wrapper = run_sanitizers.write_compiler(name, tmp_path)
    for file in sorted((ROOT / "csrc").rglob("*.cpp")):
        plain = objects.described(install, ["-O3"], file)
        wrapped = objects.described([str(wrapper)], ["-O3"], file)
        isa = file.stem.rpartition("kernels_")[2] if "kernels_" in file.stem else None
        assert (plain == wrapped) == (isa is not None and isa not in runs), file
        assert ("-fsanitize" in wrapped) == (plain != wrapped), file
    assert "-O0" in objects.described([str(wrapper)], ["-O3"], Path("csrc/cpu/bindings_ops.cpp"))
