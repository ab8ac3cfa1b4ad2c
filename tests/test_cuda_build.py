"""How csrc/cuda is found, compiled and refused, and what `info` says of it, on a machine without a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moe_offload import ConfigError, cli, cli_info, cuda
from moe_offload.config import DeviceChoice
from moe_offload.residency.accelerator import check_device

ROOT = Path(__file__).parents[1]
LIBRARY_OF_ONE_ANSWER = """
#include <string.h>
int moe_offload_cuda_info(char* out, int size) {{
    const char* text = {text};
    memcpy(out, text, strlen(text));
    return (int)strlen(text);
}}
"""


def load_nvcc() -> ModuleType:
    spec = importlib.util.spec_from_file_location("moe_nvcc", ROOT / "csrc" / "cuda" / "nvcc.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


nvcc = load_nvcc()


def fake_nvcc(folder: Path, release: str) -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No nvcc on PATH, in CUDA_HOME or in packages."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("MOE_OFFLOAD_CUDA", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(nvcc.sysconfig, "get_path", lambda name: "")
    monkeypatch.setattr(nvcc.sys, "path", [])
    return monkeypatch


def test_nvcc_is_found_in_cuda_home_on_path_and_in_packages(
    nowhere: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(nvcc.NoNvcc, match=r"CUDA_HOME, on PATH and in the packages of moe_offload\[cuda-b"):
        nvcc.find_nvcc()
    in_package = fake_nvcc(tmp_path / "site" / "nvidia" / "cu13", "13.0")
    nowhere.setattr(nvcc.sys, "path", [str(tmp_path / "site")])
    assert nvcc.find_nvcc().path == in_package
    (tmp_path / "site" / "nvidia" / "cu13" / "lib").mkdir()
    assert nvcc.find_nvcc().library_folders() == [f"-L{tmp_path / 'site/nvidia/cu13/lib'}"]
    on_path = fake_nvcc(tmp_path / "toolkit", "12.9")
    nowhere.setenv("PATH", str(on_path.parent))
    assert nvcc.find_nvcc() == nvcc.Nvcc(on_path, (12, 9))
    in_home = fake_nvcc(tmp_path / "home", "13.1")
    nowhere.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert nvcc.find_nvcc().path == in_home


def test_an_old_nvcc_is_named(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = fake_nvcc(tmp_path, "11.8")
    nowhere.setenv("PATH", str(old.parent))
    with pytest.raises(nvcc.NoNvcc, match=r"12\.8 or later \(.*nvcc is release 11\.8\)"):
        nvcc.find_nvcc()


def test_without_nvcc_auto_builds_nothing_and_says_why(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / nvcc.LIBRARY).write_text("of an earlier build")
    assert not nvcc.build(tmp_path, tmp_path / "work")
    assert not (tmp_path / nvcc.LIBRARY).exists(), "it would be loaded, and is not what the sources say"
    report = cuda.describe(tmp_path / nvcc.LIBRARY, tmp_path / nvcc.RECORD)
    assert not report["on"] and report["reason"].startswith("not built: found no nvcc 12.8 or later")
    assert "moe_offload[cuda-build]" in report["reason"]


def test_on_without_nvcc_fails_the_build(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nowhere.setenv("MOE_OFFLOAD_CUDA", "on")
    with pytest.raises(RuntimeError, match="MOE_OFFLOAD_CUDA=on, but found no nvcc"):
        nvcc.build(tmp_path, tmp_path)
    nowhere.setenv("MOE_OFFLOAD_CUDA", "yes")
    with pytest.raises(RuntimeError, match="must be auto, on or off"):
        nvcc.build(tmp_path, tmp_path)


def test_off_is_off(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nowhere.setenv("MOE_OFFLOAD_CUDA", "off")
    assert not nvcc.build(tmp_path, tmp_path)
    assert "MOE_OFFLOAD_CUDA=off" in cuda.describe(tmp_path / nvcc.LIBRARY, tmp_path / nvcc.RECORD)["reason"]


def test_a_failed_compile_names_the_switch(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = fake_nvcc(tmp_path / "home", "13.0")
    broken.write_text(broken.read_text() + 'case "$*" in *-c*) echo "error: no" >&2; exit 1;; esac\n')
    nowhere.setenv("CUDA_HOME", str(tmp_path / "home"))
    with pytest.raises(RuntimeError, match=r"(?s)error: no.*MOE_OFFLOAD_CUDA=off builds without it"):
        nvcc.build(tmp_path, tmp_path / "work", default="native")


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ("", ([75, 80, 86, 87, 89, 90, 120], 120)),
        ("90", ([90], 90)),
        ("86,89", ([86, 89], 89)),
        ("native", ([], 75)),
    ],
)
def test_architectures(monkeypatch: pytest.MonkeyPatch, asked: str, wanted: tuple[list[int], int]) -> None:
    monkeypatch.setattr(nvcc, "_cards", list)
    monkeypatch.setenv("MOE_OFFLOAD_CUDA_ARCHS", asked)
    assert nvcc.architectures() == wanted


def test_cards_between_the_families_have_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code is for one family, and PTX for what is newer than it."""
    monkeypatch.delenv("MOE_OFFLOAD_CUDA_ARCHS", raising=False)
    asked = nvcc.codes(*nvcc.architectures("all"))
    assert asked[-2:] == [
        "-gencode=arch=compute_120,code=compute_120",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert nvcc.codes([86, 89], 89)[-1] == "-gencode=arch=compute_89,code=compute_89"
    assert sum("code=compute" in code for code in nvcc.codes([90], 90)) == 1


def answering(
    tmp_path: Path, answer: dict[str, object], built: dict[str, object] | None = None
) -> dict[str, object]:
    """Return what is said of a library that answers so, and was ``built`` so."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    text = json.dumps(json.dumps(answer))
    source, library = tmp_path / "fake.c", tmp_path / "fake.so"
    source.write_text(LIBRARY_OF_ONE_ANSWER.format(text=text))
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    record = tmp_path / "record"
    if built is not None:
        record.write_text(json.dumps({"built": True, **built}))
    return cuda.describe(library, record)


CARD = {"name": "NVIDIA RTX", "sm": 89, "memory_bytes": 8 << 30}


@pytest.mark.parametrize(
    ("driver", "error", "devices", "reason"),
    [
        (0, "CUDA driver version is insufficient", [], "no NVIDIA driver was found; built with CUDA 13.0"),
        (12080, "insufficient", [], "too old: it runs CUDA up to 12.8; .* needs driver 580 or later"),
        (13000, "out of memory", [], "the driver answers: out of memory"),
        (13000, "", [], "shows no GPU"),
        (13010, "", [CARD], None),
    ],
)
def test_drivers(tmp_path: Path, driver: int, error: str, devices: list[object], reason: str | None) -> None:
    import re

    report = answering(tmp_path, {"runtime": 13000, "driver": driver, "error": error, "devices": devices})
    assert report["on"] == (reason is None) and report["built_with"] == "13.0"
    assert re.search(reason or "^$", str(report["reason"]))


@pytest.mark.parametrize(
    ("sm", "built", "reason"),
    [
        (61, {"sm": [75], "ptx": 75}, "GTX is sm_61, and kernels were built for sm_75; sm_75 is the oldest"),
        (70, {"sm": [75, 80, 86, 87, 89, 90, 120], "ptx": 120}, "GTX is sm_70"),
        (75, {"sm": [86], "ptx": 86}, "GTX is sm_75, and kernels were built for sm_86"),
        (80, {"sm": [86], "ptx": 86}, "GTX is sm_80"),
        (75, {"sm": [], "ptx": 75}, ""),
        (89, {"sm": [86], "ptx": 120}, ""),
        (100, {"sm": [90, 120], "ptx": 120}, ""),
        (100, {"sm": [89, 120], "ptx": 120}, "GTX is sm_100"),
        (121, {"sm": [75, 90, 120], "ptx": 120}, ""),
        (61, {}, ""),
    ],
)
def test_a_card_that_nothing_was_built_for_is_refused_before_it_is_used(
    tmp_path: Path, sm: int, built: dict[str, object], reason: str
) -> None:
    old = {"name": "GTX", "sm": sm, "memory_bytes": 8 << 30}
    answer = {"runtime": 13000, "driver": 13010, "error": "", "devices": [old]}
    alone = answering(tmp_path, answer, built)
    assert alone["on"] == (not reason) and str(alone["reason"]).startswith(reason)
    assert bool(reason) == bool(alone["reason"])


def test_each_card_has_its_own_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old, mute = {"name": "GTX", "sm": 61, "memory_bytes": 4 << 30}, {"error": "unknown error"}
    answer = {"runtime": 13000, "driver": 13010, "error": "", "devices": [CARD, old, mute]}
    report = answering(tmp_path, answer, {"sm": [75, 89], "ptx": 89})
    assert report["on"] and cuda.reason_for(0, report) == ""
    assert cuda.reason_for(1, report).startswith("GTX is sm_61")
    assert cuda.reason_for(2, report) == "a GPU does not say what it is: unknown error"
    assert cuda.reason_for(3, report) == "there is no GPU 3: the driver shows 3, counted from 0"
    monkeypatch.setattr(cuda, "describe", lambda: report)
    shown = cli_info.as_text(cli_info.describe())
    assert "on: NVIDIA RTX (8.00 GiB, sm_89), not usable: GTX is sm_61" in shown
    assert "VRAM 8.00 GiB, RAM" in shown
    with pytest.raises(ConfigError, match="device='cuda:1' is not possible: GTX is sm_61"):
        check_device(DeviceChoice("cuda:1"))


def test_info_shows_cards_and_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on = answering(tmp_path, {"runtime": 13000, "driver": 13010, "error": "", "devices": [CARD]})
    monkeypatch.setattr(cuda, "describe", lambda: on)
    shown = cli_info.as_text(cli_info.describe())
    assert "CUDA         on: NVIDIA RTX (8.00 GiB, sm_89); built with CUDA 13.0, driver runs 13.1" in shown


def test_a_library_that_does_not_load_is_not_the_same_as_none(tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_text("no library")
    assert "built, but does not load" in cuda.describe(tmp_path / "broken.so")["reason"]


def test_info_says_here_why_the_gpu_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["cuda"]
    assert report["on"] or report["reason"]


def resources(log: str) -> list[tuple[str, int, int]]:
    """Read what ptxas says of each kernel and architecture: its name, bytes of stack and of shared memory."""
    found = []
    for part in log.split("Compiling entry function ")[1:]:
        stack, shared = (re.search(rf"(\d+) bytes {what}", part) for what in ("stack frame", "smem"))
        found.append((part.split("'")[1], int(stack[1]) if stack else 0, int(shared[1]) if shared else 0))
    return found


def test_what_the_assembler_says_is_read() -> None:
    log = """ptxas info    : Compiling entry function '_Za' for 'sm_90'
ptxas info    : Function properties for _Za
    16 bytes stack frame, 12 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 4608 bytes smem
ptxas info    : Compiling entry function '_Zb' for 'sm_90'
ptxas info    : Used 32 registers
"""
    assert resources(log) == [("_Za", 16, 4608), ("_Zb", 0, 0)]


@pytest.mark.slow
def test_the_library_is_built_loads_without_a_driver_and_needs_no_cuda_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        nvcc.find_nvcc()
    except nvcc.NoNvcc as reason:
        pytest.skip(str(reason))
    monkeypatch.delenv("MOE_OFFLOAD_CUDA", raising=False)
    numbers, _ = nvcc.architectures("native")
    work = ROOT / "build" / "cuda"  # where installing has compiled the same already
    assert nvcc.build(tmp_path, work, default="native")
    needed = subprocess.run(
        ["ldd", tmp_path / nvcc.LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    assert "cuda" not in needed.replace(str(tmp_path), "") and "torch" not in needed
    ctypes.CDLL(str(tmp_path / nvcc.LIBRARY), os.RTLD_NOW)
    report = cuda.describe(tmp_path / nvcc.LIBRARY, tmp_path / nvcc.RECORD)
    assert report["architectures"] == numbers and report["required_driver"] == "driver 580 or later"
    assert report["on"] or "driver" in report["reason"] or "GPU" in report["reason"]
    objects = nvcc.objects_of(nvcc.find_nvcc(), work, *nvcc.architectures("native"))
    used = [line for path in objects for line in resources(path.with_suffix(".log").read_text())]
    assert len(used) >= 50 * len(numbers), "without a card only PTX is made, of which nothing is known"
    for kernel, stack, shared in used:
        assert shared <= 48 << 10, f"{kernel} has more shared memory than a launch may ask for"
        assert stack <= 1 << 10, (
            f"{kernel}: more stack than a context has makes the driver take more of the card"
        )
    before = {path: path.stat().st_mtime_ns for path in work.iterdir()}
    assert nvcc.build(tmp_path, work, default="native"), "nothing has changed"
    assert {path: path.stat().st_mtime_ns for path in work.iterdir()} == before


def test_wsl2_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There the driver is Windows's, and pinned memory is scarce: both are said."""
    monkeypatch.setattr(cuda, "is_wsl2", lambda: True)
    off = answering(tmp_path, {"runtime": 13000, "driver": 0, "error": "no driver", "devices": []})
    assert "installed in Windows" in str(off["reason"])
    assert "WSL2 often pins half" in str(off["pinned"]) and "1 MiB buffers" in str(off["pinned"])
