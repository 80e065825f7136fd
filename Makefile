# Everything sets itself up: `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
# The CPU build. For a GPU: make demo TORCH=torch (or an index of your choice in PIP_EXTRA_INDEX_URL).
TORCH ?= torch==2.13.0
# Small models are fastest on one thread; set it higher for larger ones.
export OMP_NUM_THREADS ?= 1

ifdef VIRTUAL_ENV
BIN := $(VIRTUAL_ENV)/bin
else
BIN := .venv/bin
endif
BENCH := .venv-bench/bin

.PHONY: demo test test-slow check bench docs clean

demo: $(BIN)/.cpo-arabic
	$(BIN)/cpo-arabic train configs/demo.yaml

test: $(BIN)/.cpo-arabic-dev
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(BIN)/.cpo-arabic-dev
	$(BIN)/python -m pytest -m slow

check: $(BIN)/.cpo-arabic-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Ours beside its peers, in an environment of their own: about half an hour, which rewrites docs/bench and
# the README's numbers. `make bench QUICK=1` takes four, on smaller shapes, and writes to runs/bench.
bench: $(BENCH)/.cpo-arabic-bench
	$(BENCH)/python -m scripts.bench $(if $(QUICK),--quick --output runs/bench)
	$(if $(QUICK),,$(BENCH)/python scripts/build_readme.py)

$(BENCH)/.cpo-arabic-bench: pyproject.toml
	$(PYTHON) -m venv .venv-bench
	$(BENCH)/python -m pip install --quiet "$(TORCH)"
	$(BENCH)/python -m pip install --quiet --editable ".[bench]"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(BIN)/.cpo-arabic: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(BIN)/.cpo-arabic-dev: pyproject.toml $(BIN)/.cpo-arabic
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

clean:
	rm -rf runs .venv .venv-bench
