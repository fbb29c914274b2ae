# IsoDiff: every target makes .venv from requirements.txt where it is missing or older.
PYTHON ?= python3.11
ARGS ?=
BIN := .venv/bin

.PHONY: help compare test test-slurm lint format clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

compare: .venv/installed  ## the embedded comparison; settings as ARGS="budget.train_gflops=4000"
	$(BIN)/python -m bench compare digits $(ARGS)

test: .venv/installed  ## the tests; pytest options as ARGS="-k flops"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-slurm: .venv/installed  ## the tests on a SLURM of their own (apt-get install slurm-wlm munge)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm -rs tests/slurm $(ARGS)

lint: .venv/installed  ## formatting, linter, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed  ## rewrite the files as the formatter wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## caches of the tools; .venv, runs/ and cache/ stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is done again.
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "IsoDiff needs Python 3.11 or newer, but '$(PYTHON)' is not. Install it, or name one: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@
