"""Build the package and its native extension: a C++20 compiler, no torch; CUDA kernels where nvcc is."""

import platform
import re
import sys
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "csrc" / "cuda")]
import nvcc  # noqa: E402  csrc/cuda/nvcc.py
import objects  # noqa: E402  csrc/objects.py

ALL_SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
# Bindings of a folder are included by csrc/bindings*.cpp: pybind11 is compiled three times, not thirteen.
SOURCES = [path for path in ALL_SOURCES if not re.fullmatch(r"csrc/.+/bindings_\w+\.cpp", path)]
# -ffp-contract=off and no fast-math: every ISA and thread count must give the same bits.
FLAGS = ["-O3", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi", "-pthread"]
HEADERS = sorted(
    str(path.relative_to(ROOT)) for ending in ("h", "inc") for path in (ROOT / "csrc").rglob(f"*.{ending}")
)
# One translation unit per instruction set; the CPU decides at run time which one is used.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# gcc warns about its own header, where _mm512_undefined_epi32 is meant to be undefined.
UNDEFINED = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
ISA_FLAGS = {
    "kernels_avx2.cpp": AVX2,
    "token_kernels_avx2.cpp": AVX2,
    "token_kernels_avx512.cpp": [*AVX2, *AVX512, *UNDEFINED],
    "kernels_avxvnni.cpp": [*AVX2, "-mavxvnni"],
    "kernels_avx512vnni.cpp": [*AVX2, *AVX512, "-mavx512vnni", *UNDEFINED],
    "kernels_amx.cpp": [*AVX2, *AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8", *UNDEFINED],
}

ParallelCompile("MOE_OFFLOAD_BUILD_JOBS", default=0).install()


class BuildExt(build_ext):
    """Compile what has changed since any build in this folder, a kernel file for its instruction set.

    On machines of another kind a kernel file is empty.
    """

    def build_extensions(self):
        compile_one = self.compiler._compile
        made_with = f"{sys.version}, pybind11 {pybind11.__version__}"
        # setuptools below 72 has one command for C and C++.
        command = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        kept = objects.KeptObjects(ROOT / "build" / "objects", command, made_with)

        def compile_changed(obj, src, ext, cc_args, extra_postargs, pp_opts):
            isa_flags = ISA_FLAGS.get(Path(src).name, []) if platform.machine() == "x86_64" else []
            flags = [*extra_postargs, *isa_flags]
            # Where other headers lie is made_with's: a build in isolation has a folder of its own for them.
            known = [flag for flag in [*cc_args, *flags] if not flag.startswith("-I/")]
            compile_to = lambda to: compile_one(str(to), src, ext, cc_args, flags, pp_opts)  # noqa: E731
            kept.put(Path(src), known, Path(obj), compile_to)

        self.compiler._compile = compile_changed
        super().build_extensions()

    def run(self):
        """Build the extension and csrc/cuda: for the cards of this machine when in place, else for all."""
        in_place = self.inplace  # the parent resets it while it runs
        super().run()
        folder = ROOT / "moe_offload" if in_place else Path(self.build_lib) / "moe_offload"
        nvcc.build(folder, ROOT / "build" / "cuda", default="native" if in_place else "all")


setup(
    name="moe_offload",
    version="0.1.0",
    description="Run mixture-of-experts models that do not fit, inside a memory budget, with the same tokens",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=[
        *find_packages(include=["moe_offload", "moe_offload.*"]),
        "moe_offload.predictors",
        "moe_offload.device_profiles",
    ],
    package_dir={"moe_offload.predictors": "predictors", "moe_offload.device_profiles": "device_profiles"},
    package_data={
        "moe_offload": ["py.typed", "_native.pyi", "demo/*", "_cuda.so", "_cuda_build.json"],
        "moe_offload.device_profiles": ["*.toml"],
    },
    ext_modules=[
        Pybind11Extension(
            "moe_offload._native",
            SOURCES,
            include_dirs=["csrc"],
            cxx_std=20,
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            depends=[*ALL_SOURCES, *HEADERS, "setup.py"],
        )
    ],
    cmdclass={"build_ext": BuildExt},
    # Ranges that were tested; constraints.txt has the exact versions.
    install_requires=[
        "torch>=2.13,<2.14",
        "transformers>=5.23,<5.24",  # the skeleton loads through calls that transformers keeps private
        "tokenizers>=0.23,<0.24",
        "safetensors>=0.8,<0.9",
        "gguf>=0.19,<0.20",
        "huggingface_hub>=2.4,<3",
        "jinja2>=3.1,<4",
        "numpy>=2.4,<3",
        "psutil>=7.2,<8",
    ],
    extras_require={
        "llama": ["llama-cpp-python==0.3.36"],
        "bench": ["matplotlib"],
        # nvcc 13.0 without a CUDA toolkit; its parts must be of one release, which constraints.txt pins
        "cuda-build": [
            "nvidia-cuda-nvcc>=13.0.88,<13.1",
            "nvidia-cuda-crt>=13.0.88,<13.1",
            "nvidia-nvvm>=13.0.88,<13.1",
            "nvidia-cuda-runtime>=13.0.88,<13.1",
        ],
        "learned": ["onnxruntime>=1.31,<2", "onnx>=1.23,<2"],  # the learned predictor: run it, write it
    },
    entry_points={"console_scripts": ["moe-offload = moe_offload.__main__:entry"]},
    zip_safe=False,
)
