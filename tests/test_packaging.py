"""What is shipped: the wheel's content, its metadata, and constraints that install as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that MOE_OFFLOAD_WHEEL names, or one built with the tools of this environment."""
    if os.environ.get("MOE_OFFLOAD_WHEEL"):
        return Path(os.environ["MOE_OFFLOAD_WHEEL"])
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    environment = {"MOE_OFFLOAD_CUDA_ARCHS": "75", **os.environ}  # of CUDA one card's kernels do
    done = subprocess.run([*build, str(ROOT)], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_what_a_run_needs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"moe_offload"}
    wanted = {
        "moe_offload/cli.py",
        "moe_offload/demo/tiny-moe.gguf",
        "moe_offload/py.typed",
        "moe_offload/_native.pyi",
        "moe_offload/predictors/cross_layer_gate.py",
        "moe_offload/device_profiles/cpu-laptop-16gb.toml",
    }
    assert wanted <= set(names)
    assert any(re.fullmatch(r"moe_offload/_native\.[^/]*\.so", name) for name in names)
    packaged = {name for name in names if name.endswith(".py")}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "moe_offload").rglob("*.py")}
    sources |= {
        f"moe_offload/{path.relative_to(ROOT).as_posix()}"
        for folder in ("predictors", "device_profiles")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert packaged == sources


@pytest.mark.slow
def test_the_metadata_names_licence_python_and_ranges(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata["Requires-Python"].split(",")) == {">=3.11", "<3.14"}
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert all("<" in line and ">=" in line for line in required), required


def test_constraints_pin_this_environment_and_name_no_host():
    text = (ROOT / "constraints.txt").read_text()
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins), pins
    assert "torch==2.13.0" in pins


def test_every_requirement_is_pinned_inside_its_range():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    text = (ROOT / "setup.py").read_text()
    requirements = [
        Requirement(found) for found in re.findall(r'"([a-z0-9_-]+>=[^"]+)"', text) if "python" not in found
    ]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}
    assert len(requirements) >= 8
    for requirement in requirements:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
