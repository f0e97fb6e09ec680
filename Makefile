# make demo    train a small pair, extrapolate it, score it, draw the curve (minutes)
# make test    the whole test suite
# make bench   the speed and memory tables (needs about 60 GB of disk; SIZE and BENCH override)
# make check   formatting, lint, types

PYTHON ?= python3
VENV ?= .venv
# Where torch comes from. Anything pip understands: another version, or for a GPU build
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cu128"
TORCH ?= torch==2.13.0
BENCH ?=

BIN := $(VENV)/bin

.PHONY: demo test bench check clean

demo: $(VENV)/.ready
	$(BIN)/python -m demo.extrapolate --out demo/out

test: $(VENV)/.ready
	$(BIN)/python -m pytest

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.extrapolate $(BENCH)

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[demo,dev]"
	touch $@

clean:
	rm -rf $(VENV) demo/out benchmarks/out
