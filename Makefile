# Every target sets up its own virtual environment first (once; the stamp file makes re-runs fast).
# Another interpreter: `make test PYTHON=python3.12`; another environment: `make test VENV=/some/venv`.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.sparse-bwd-ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE := $(wildcard csrc/*.cpp csrc/cpu/* csrc/cpu/kernels/*)
# The native CPU code where there is a compiler; `make native` adds CUDA, which takes minutes to compile.
ifndef SPARSE_BWD_NATIVE
export SPARSE_BWD_NATIVE := $(if $(shell command -v $${CXX:-c++}),cpu,0)
endif
# The CPU kernels and their checks, without torch.
HOST := tests/native_host/*.cpp csrc/cpu/isa*.cpp
HOST_FLAGS := -std=c++20 -Wall -Wextra -Wno-psabi -Icsrc

.PHONY: help setup native demo test test-long sanitize neon lint format types docs build bench suites kernels results clean

help:
	@echo "make demo | test | test-long | sanitize | neon | lint | format | types | docs | build | native | bench | suites | kernels | results | clean"

# The package is built against the torch of the environment, which therefore comes first.
$(READY): pyproject.toml setup.py build_native.py requirements/test.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c requirements/test.txt torch ninja
	$(PIP) -c requirements/test.txt -e ".[all]"
	touch $@

setup: $(READY)

native: $(READY)
	SPARSE_BWD_NATIVE=cuda $(PIP) --no-deps -e .

demo: $(READY)
	$(BIN)/python -m benchmarks.demo --out demo-results

test: $(READY)
	$(BIN)/python -m pytest -q -n $(JOBS) --cov --cov-report=term

test-long: $(READY)
	$(BIN)/python -m pytest -q -m long --timeout=0

sanitize:
	@command -v $(firstword $(CXX)) || { echo "make sanitize needs a C++ compiler: apt-get install g++"; exit 1; }
	mkdir -p build
	$(CXX) -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all $(HOST_FLAGS) $(HOST) -o build/sanitize
	build/sanitize

neon:
	@command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64-static || \
		{ echo "make neon needs a compiler for 64-bit Arm and an emulator: apt-get install" \
			"g++-aarch64-linux-gnu qemu-user-static"; exit 1; }
	mkdir -p build
	aarch64-linux-gnu-g++ -O3 -static $(HOST_FLAGS) $(HOST) -o build/neon
	qemu-aarch64-static build/neon

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

# The site; a warning is an error. Needs no network. Open build/docs/index.html.
docs: $(READY)
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs . build/docs

build: $(READY)
	$(BIN)/python -m build

bench: $(READY)
	$(BIN)/python -m benchmarks.step --out benchmarks/results --name step

# For `python -m benchmarks.regression BEFORE.json AFTER.json`.
suites: $(READY)
	$(BIN)/python -m pytest -q benchmarks/suites --timeout=0 --benchmark-json benchmark.json

# Compiles every Triton kernel for every architecture; needs no GPU.
kernels: $(READY)
	$(BIN)/python -m benchmarks.kernels --static --out benchmarks/results

results: $(READY)
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf build dist *.egg-info demo-results .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
