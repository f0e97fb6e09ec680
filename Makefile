# make demo    train a small pair, extrapolate it, score it, draw the curve (minutes)
# make demo-boost   let boost find the alpha for the demo's pair (minutes, after make demo)
# make demo-distill   three strong models teach a small one on three roads, all measured (a quarter of an hour)
# make demo-fuse      three teachers of other tokenizers, what they say of given answers, seven roads, all measured (20 minutes)
# make demo-merge     three fine-tunes of one model and their adapters, merged by every method, all measured (12 minutes)
# make demo-real   a released model: DPO on its own answers, extrapolation, costs, rounding (an hour)
# make test    the test suite
# make test-slow   the tests that take long: proofs by many runs, very many tensors, every family by every command
# make test-stores   reading and writing over every object store whose server is installed (docs/remote.md, "Tried")
# make bench   the speed and memory tables of extrapolate and merge (needs 45 GB of disk, removes what it makes)
#              SIZE=1e9 other models; BENCH="--runs 5 --folder DIR" what both take; beside mergekit after `make parity`,
#              unless MERGEKIT=
# make parity  the same recipes through mergekit and through ours, compared in docs/parity.md (minutes)
# make check   formatting, lint, types
# make space   the page as one folder for a space of the hub: dist/space, the package in it
# make dist    a source package and a wheel of this platform for every Python, and a test that they install and merge

PYTHON ?= python3
VENV ?= .venv
# Where torch comes from. Anything pip understands: another version, or for a GPU build
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cu128"
TORCH ?= torch==2.13.0
SIZE ?=
BENCH ?=
PARITY ?=
PARITY_VENV ?= .venv-parity
MERGEKIT ?= $(wildcard $(PARITY_VENV)/bin/mergekit-yaml)

BIN := $(VENV)/bin

.PHONY: demo demo-boost demo-distill demo-fuse demo-merge demo-real test test-slow test-stores bench parity check dist space clean

demo: $(VENV)/.ready
	$(BIN)/python -m demo.extrapolate --out demo/out

demo-boost: $(VENV)/.ready
	$(BIN)/python -m demo.boost --out demo/out

demo-distill: $(VENV)/.ready
	$(BIN)/python -m demo.distill --out demo/out-distill

demo-fuse: $(VENV)/.ready
	$(BIN)/python -m demo.fuse --out demo/out-fuse

demo-merge: $(VENV)/.ready
	$(BIN)/python -m demo.merge --out demo/out-merge

demo-real: $(VENV)/.ready
	$(BIN)/python -m demo.real --out demo/out-real

# A test file on each core, the long ones first (tests/conftest.py). Tiny models are faster on one thread than on two
# that wait for each other. Hundreds of tests start a process: without bytecode each would compile the package anew.
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.ready
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m slow --ignore tests/test_dist.py -n auto --dist loadfile

test-stores: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" -rs tests/stores/test_reading.py tests/remote -n auto --dist loadfile

bench: MEASURED = $(addprefix --size ,$(SIZE)) $(addprefix --mergekit ,$(MERGEKIT)) $(BENCH)
bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.extrapolate $(MEASURED)
	$(BIN)/python -m benchmarks.merge $(MEASURED)

parity: $(PARITY_VENV)/.ready
	$(PARITY_VENV)/bin/python -m parity.compare $(PARITY)

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

dist: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m pytest -m slow tests/test_dist.py

space: $(VENV)/.ready
	rm -rf dist/space
	mkdir -p dist
	cp -r space dist/space
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target dist/space .
	rm -r dist/space/bin

$(VENV)/.ready: pyproject.toml setup.py constraints.txt mergekit_lite/ops/kernels.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# mergekit by itself: its dependencies are pinned closely. torch comes first, from the same place as ours.
$(PARITY_VENV)/.ready: pyproject.toml setup.py mergekit_lite/ops/kernels.c
	$(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/pip install --quiet --upgrade pip
	$(PARITY_VENV)/bin/pip install --quiet $(TORCH)
	$(PARITY_VENV)/bin/pip install --quiet mergekit==0.1.5 "transformers>=5" -e .
	touch $@

clean:
	rm -rf $(VENV) $(PARITY_VENV) demo/out demo/out-distill demo/out-fuse demo/out-merge demo/out-real benchmarks/out parity/out
