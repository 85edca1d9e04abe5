# `make train` and `make test` need only Python 3.10 to 3.12 and make: they set up what they use, once.

PYTHON ?= python3
NPROC  ?= 1
JOBS   ?= 2
BENCH  ?= $(wildcard tools/bench/[a-z]*.py)
ARGS   ?=

BIN := .venv/bin
# Composer's launcher takes seconds before it starts anything, which a single process does not need.
LAUNCH = $(if $(filter 1,$(NPROC)),$(BIN)/python,$(BIN)/composer -n $(NPROC))
INSTALLED := .venv/.installed
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help install sample train test lint bench lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=python3.11 (for set-up), NPROC=2 (train), JOBS=4 (test),"
	@echo "  BENCH=tools/bench/x.py (bench), ARGS='...' (passed on: train.py, pytest, the benchmarks, uv)"

$(INSTALLED): requirements.lock pyproject.toml tools/bootstrap
	@tools/bootstrap "$(PYTHON)"
	@touch $@

install: $(INSTALLED)  ## make .venv from requirements.lock

sample: $(INSTALLED)  ## make the sample corpus in data/sample
	@$(BIN)/python tools/prepare_sample.py

train: sample  ## train on the sample; ARGS='optimizer.lr=1e-3 max_duration=100ba' overrides keys
	$(LAUNCH) train.py yamls/mixed_pretrain.yaml compose.data=data/sample/data.yaml $(ARGS)

test: $(INSTALLED)  ## run all tests; ARGS='-k plan' chooses
	$(TEST_ENV) $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(INSTALLED)  ## style, types, import arrows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: sample  ## run the benchmarks of tools/bench, or those that BENCH names
	@set -e; for script in $(BENCH); do echo "== $$script"; $(BIN)/python $$script $(ARGS); done

lock: $(INSTALLED)  ## renew requirements.lock from pyproject.toml; ARGS=--upgrade takes newer versions
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 --generate-hashes \
	  --no-annotate --custom-compile-command "make lock" --quiet $(ARGS) -o requirements.lock

clean:  ## remove .venv, the sample, build output and caches; runs/ stays
	rm -rf .venv data/sample dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
