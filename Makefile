# make demo: venv, build, and the bundled model generates text. make test: all that runs without a GPU.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
# The first interpreter of 3.11 or later; a name on PATH may be a shim that does not run.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
# setuptools and pybind11 build the extension once more for the sanitizers.
DEV_TOOLS := pytest pytest-xdist hypothesis ruff mypy clang-format onnxruntime onnx matplotlib setuptools pybind11
# Held in the environment, so that builds in isolation keep to the same versions.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BUILD_INPUTS := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)
CPP_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name '*.cu')

# ggml's own "native" build goes wrong on machines with AMX; name what /proc/cpuinfo lists instead.
GGML_FLAGS := avx2:AVX2 fma:FMA f16c:F16C bmi2:BMI2 avx512f:AVX512 avx512_vnni:AVX512_VNNI
CPU_FLAGS := $(shell grep -m1 ^flags /proc/cpuinfo)
LLAMA_CMAKE_ARGS := -DGGML_NATIVE=OFF $(foreach pair,$(GGML_FLAGS),\
	-DGGML_$(word 2,$(subst :, ,$(pair)))=$(if $(filter $(word 1,$(subst :, ,$(pair))),$(CPU_FLAGS)),ON,OFF))

# Most tests keep one core busy. A file stays with one process, whose fixtures it shares; the order is conftest.py's.
PYTEST := $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.PHONY: help demo test test-quick llama check format fuzz sanitize bench wheel clean

help:
	@echo "make demo        install into $(VENV) and generate with a quarter of the bundled model's experts in memory"
	@echo "make test        every test that runs without a GPU (minutes)"
	@echo "make test-quick  the same without the slow ones"
	@echo "make llama       install llama-cpp-python, the outside reference (compiles for some minutes)"
	@echo "make check       formatting, lint and types"
	@echo "make format      reformat Python and C++"
	@echo "make fuzz        a long run of the header parsers' property tests"
	@echo "make sanitize    native code under AddressSanitizer, UBSan and ThreadSanitizer (builds it twice more)"
	@echo "make bench       speed beside llama.cpp, in RAM and in memory cgroups (half an hour, 20 GB of disk)"
	@echo "make wheel       build dist/*.whl"
	@echo "make clean       delete what the above made"

demo: $(VENV)/.installed
	$(BIN)/moe-offload generate --experts 25% --prompt "The history of the town" --temperature 0.8 --seed 1

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not cuda" $(PYTEST_ARGS)

test-quick: $(VENV)/.installed-dev
	$(PYTEST) -m "not cuda and not slow" $(PYTEST_ARGS)

llama: $(VENV)/.installed-dev
	CMAKE_ARGS="$(strip $(LLAMA_CMAKE_ARGS))" $(BIN)/python -m pip install llama-cpp-python

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP_SOURCES)

fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m hypothesis tests/test_gguf.py tests/test_safetensors.py --hypothesis-profile=fuzz $(PYTEST_ARGS)
	$(BIN)/python tests/fuzz_headers.py --seconds 600

sanitize: $(VENV)/.installed-dev
	$(BIN)/python tests/run_sanitizers.py $(SANITIZE_ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/python bench/end_to_end.py $(BENCH_ARGS)

wheel: $(VENV)/.python
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find moe_offload -name '*.so' -delete
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.python:
	@[ -n "$(PYTHON)" ] || { echo "make: no Python 3.11 or later found; name one: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.python constraints.txt
	$(BIN)/python -m pip install $(TORCH)
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(BUILD_INPUTS)
	$(BIN)/python -m pip install --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install $(DEV_TOOLS)
	touch $@
