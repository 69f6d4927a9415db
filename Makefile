# Every target sets up its own virtual environment first (once; the stamp file makes re-runs fast).
# Another interpreter: `make test PYTHON=python3.12`; another environment: `make test VENV=/some/venv`.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.sparse-bwd-ready

.PHONY: help setup demo test test-long lint format types build bench results clean

help:
	@echo "make demo | test | test-long | lint | format | types | build | bench | results | clean"

$(READY): pyproject.toml setup.py requirements/test.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/test.txt -e ".[all]"
	touch $@

setup: $(READY)

demo: $(READY)
	$(BIN)/python -m benchmarks.demo --out demo-results

test: $(READY)
	$(BIN)/python -m pytest -q -n $(JOBS) --cov --cov-report=term

test-long: $(READY)
	$(BIN)/python -m pytest -q -m long --timeout=0

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

build: $(READY)
	$(BIN)/python -m build

bench: $(READY)
	$(BIN)/python -m benchmarks.step --out benchmarks/results --name step

results: $(READY)
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf build dist *.egg-info demo-results .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
