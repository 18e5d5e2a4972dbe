# Everything starts here: each target does all of its own set-up.
#   PYTHON=python3.12   the interpreter behind a new .venv (>= 3.10; default: the first that fits)
#   EXTRAS=dev,ffcv     extras of pyproject.toml to install (default: dev); `ffcv` alone needs system libraries
#   PYTEST="-x -k loss" more options for pytest
PYTHON ?=
EXTRAS ?= dev
PYTEST ?=
# of `make bundle`:
OUT ?= bundle
TARGET ?= 3.12
DATA ?=
WITH ?=
# of `make test-cpus`:
CPUS ?=
# of `make bench`: those of the table in docs/benchmarks.md; the others need a run, a GPU or hours.
BENCH ?= augmentation conversion engine loader loss search

# The tests' models are so small that a thread a core of a large machine would slow them down.
test test-slow test-slurm test-ffcv test-oldest: export OMP_NUM_THREADS ?= 1

# Tests run in a process a core, four at most, a file at a time.
WORKERS ?= -n logical --maxprocesses 4 --dist loadfile

BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu test-slurm test-ffcv test-cpus test-oldest test-images study bench bundle
.PHONY: docs reference lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

install:  ## .venv, this package in it, libturbojpeg; no root; seconds when nothing is to do
	@PYTHON='$(PYTHON)' EXTRAS='$(EXTRAS)' tools/install.sh

demo: install  ## Fashion-MNIST: convert, pretrain control and Bernoulli model, evaluate, report
	@tools/install.sh fashion-mnist
	@$(BIN)/lvssl demo --out runs/demo

test: install  ## the tests that need no device and no patience
	@$(BIN)/python -m pytest -q $(WORKERS) -m "not slow and not gpu and not slurm and not ffcv" $(PYTEST)

test-slow: install  ## the slow tests
	@$(BIN)/python -m pytest -q -m "slow and not gpu and not slurm and not ffcv" $(PYTEST)

test-gpu: install  ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -q -m gpu $(PYTEST)

test-slurm: install  ## the chain on a Slurm: the one that answers here, else one started on this machine
	@tools/slurm_cluster.sh run $(BIN)/python -m pytest -q -m slurm tests/slurm $(PYTEST)

test-ffcv: EXTRAS := ffcv,dev
test-ffcv: install  ## the tests that hold FFCV's format against FFCV; root, to install what it compiles against
	@$(BIN)/python -m pytest -q -m ffcv $(PYTEST)

test-cpus: install  ## what depends on a processor, as eleven machines would run it; CPUS="--whole generic" for more, or fewer
	@tools/test_cpus.sh $(CPUS)

test-oldest: install .venv-oldest/installed  ## `make test` with each package at its lower bound, in .venv-oldest
	@.venv-oldest/bin/python -m pytest -q $(WORKERS) -m "not slow and not gpu and not slurm and not ffcv" $(PYTEST)

test-images: install  ## some 4,400 images of Debian's and Pillow's, held against Pillow; writes docs/real-images.md
	@$(BIN)/python -m benchmarks.real_images --out docs/real-images.md

# The same Python as .venv's, for an old torch has no wheel for the newest one.
.venv-oldest/installed: pyproject.toml tools/lower_bounds.py
	@echo ".venv-oldest: pip install at the lower bounds (torch alone is 3 GB: minutes)"
	@$(BIN)/python -m venv --clear .venv-oldest
	@$(BIN)/python tools/lower_bounds.py >.venv-oldest/constraints.txt
	@.venv-oldest/bin/python -m pip install -q "pip>=24"
	@.venv-oldest/bin/python -m pip install -q -c .venv-oldest/constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

study: install  ## five arms, three seeds, Fashion-MNIST and CIFAR-10: docs/study-*; CIFAR10="what convert-beton takes"
	@tools/install.sh fashion-mnist
	@$(BIN)/python -m benchmarks.study $(if $(CIFAR10),--cifar10 '$(CIFAR10)',--cifar10 torchvision:CIFAR10)

bench: EXTRAS := ffcv,dev,bench
bench: install  ## speed beside other libraries, on this machine's CPU; BENCH="name name" for some of it
	@failed=; for name in $(BENCH); do echo "benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name || failed="$$failed $$name"; done; \
	    [ -z "$$failed" ] || { echo "error: failed:$$failed" >&2; exit 1; }

bundle: install  ## what a machine without network needs beside its torch: OUT=DIR, see tools/bundle.py
	@$(BIN)/python tools/bundle.py gather '$(OUT)' --python '$(TARGET)' $(if $(DATA),--data '$(DATA)') $(foreach name,$(WITH),--with $(name))

docs: EXTRAS := dev,docs
docs: reference  ## the documentation as a site: build/site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "written: build/site/index.html"

reference: install  ## docs/cli.md and docs/python-api.md, from the help and the docstrings
	@$(BIN)/python -m tools.reference

lint: install  ## ruff (rules and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: install  ## let ruff put the code in form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove caches and build products; environments, data/ and runs/ stay
	@rm -rf build dist lvssl.egg-info .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +
