"""Build the package and its native extension; needs a C++20 compiler, no torch, no nvcc."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
# -ffp-contract=off and no fast-math: every ISA and thread count must give the same bits.
FLAGS = ["-O3", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread"]

ParallelCompile("MOE_OFFLOAD_BUILD_JOBS", default=0).install()

setup(
    name="moe_offload",
    version="0.1.0",
    description="Run mixture-of-experts models that do not fit, inside a memory budget, with the same tokens",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["moe_offload", "moe_offload.*"]), "moe_offload.predictors"],
    package_dir={"moe_offload.predictors": "predictors"},
    package_data={"moe_offload": ["py.typed", "_native.pyi", "demo/*"]},
    ext_modules=[
        Pybind11Extension(
            "moe_offload._native", SOURCES, include_dirs=["csrc"], cxx_std=20,
            extra_compile_args=FLAGS, extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
    install_requires=[
        "torch>=2.9",
        "transformers>=5.23,<5.24",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "gguf>=0.17",
        "jinja2>=3.1",
        "numpy>=2.0",
        "psutil>=6.0",
    ],
    extras_require={"llama": ["llama-cpp-python==0.3.36"]},
    entry_points={"console_scripts": ["moe-offload = moe_offload.cli:main"]},
    zip_safe=False,
)
