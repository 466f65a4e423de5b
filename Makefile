# The house's chores. `make` alone lists them; every target sets up .venv first if it is missing or out of date.
PYTHON ?= python3
# The versions to set up: constraints-lowest.txt for the lowest allowed, /dev/null for the newest.
CONSTRAINTS ?= constraints.txt
# Of `make wheel`: what the wheel's version must be, if given.
VERSION ?=
# Passed to pip at set-up, for instance to choose a CPU build of torch (README, "Set-up").
PIP_ARGS ?=
# Two test processes with one thread each: tiny models gain nothing from more threads.
PYTEST_ARGS ?= -n 2
# For instance --overwrite, to run the quickstart once more in the same folder.
QUICKSTART_ARGS ?=
# For instance --output runs/benchmarks/mine; `python -m benchmarks --help` has them all.
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help venv test check format wheel quickstart bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY)  ## set up .venv with the tested versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ebft needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

test: $(READY)  ## run the tests (CPU, offline)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(READY)  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(READY)  ## build the wheel into dist/, and use it in a fresh environment outside of the clone
	rm -rf dist
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .
	EBFT_WHEEL=dist EBFT_VERSION="$(VERSION)" OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_wheel.py

quickstart: $(READY)  ## base model, SFT and EBFT side by side on Python's own source code
	$(BIN)/python -m ebft.quickstart $(QUICKSTART_ARGS)

bench: $(READY)  ## what an update costs: published scheme, ours, SFT (CPU, two threads, 12 to 18 minutes)
	$(BIN)/python -m benchmarks --threads 2 --setting qa translation \
		--sweep max_length num_generations completion_length --sweep_arms ours_reused $(BENCH_ARGS)

clean:  ## remove .venv and everything the tools leave behind; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
