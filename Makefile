# `make help` lists the targets. `setup` runs by itself when a target needs it.

VENV := .venv
BIN := $(VENV)/bin
QUIET := --quiet --quiet --disable-pip-version-check
LOCK ?= requirements/cpu.txt
# Has PyTorch without CUDA, as the image's TORCH_INDEX; asked first, and done without where it is away.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
SOURCES := pyproject.toml setup.py rwkv_clip/_build.py $(wildcard csrc/*)
# Each may start a Ray cluster.
TEST_PROCESSES ?= 2
OPERATOR_TESTS := tests/rwkv_clip/ops tests/rwkv_clip/model
# pytest as any machine has it: our settings need a recent one, and packages that are not needed here.
PLAIN_PYTEST := -c /dev/null --rootdir . --import-mode=importlib -W ignore::pytest.PytestUnknownMarkWarning

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

# The interpreter that .venv is made with, and that test-cuda runs with.
ifndef PYTHON
PYTHON := $(shell for python in python3.11 python3.12 python3; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo comparison test chaos test-cuda lint docs bench wheel lock clean python

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.project ## create .venv with everything pinned and the operator built

python:
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || { \
		echo 'Python 3.11 or 3.12 is needed; name one: make PYTHON=/path/to/python3.11' >&2; exit 1; }

# Nothing is resolved, because the lock names every package.
$(VENV)/.packages: $(LOCK) | python
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(QUIET) --upgrade 'pip>=25'
ifeq ($(LOCK),requirements/cpu.txt)
	@$(BIN)/python -m pip install $(QUIET) --no-deps --retries 0 --timeout 15 \
		--index-url $(TORCH_INDEX) "$$(grep '^torch==' $(LOCK))" 2>/dev/null || true
endif
	$(BIN)/python -m pip install $(QUIET) --no-deps --requirement $(LOCK)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
		echo 'The package index has PyTorch for CUDA only: installing what that loads' >&2; \
		$(BIN)/python -m pip install $(QUIET) --no-deps --requirement requirements/torch-cuda.txt; }
	@touch $@

# A PyTorch for CUDA may be there for want of another: kernels that nobody asked for take minutes.
ifeq ($(LOCK),requirements/cpu.txt)
$(VENV)/.project: export RWKV_CLIP_CUDA ?= 0
endif
$(VENV)/.project: $(VENV)/.packages $(SOURCES)
	$(BIN)/python -m pip install $(QUIET) --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## run the main job on emoji: describe, train, evaluate, register, report
	$(BIN)/rwkv-clip pipeline --config configs/emoji.yaml

comparison: setup ## the same, and a second training on web texts alone to compare it with
	$(BIN)/rwkv-clip pipeline --config configs/emoji-comparison.yaml

# OpenMP's threads do not spin while they wait, for the cores have other processes' work to do.
test: setup ## run every test but those of chaos, in TEST_PROCESSES processes
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES)

chaos: setup ## kill nodes, workers, jobs and servers, print what it cost, and try what takes long
	$(BIN)/python -m pytest -m 'chaos or not chaos' tests/ray_jobs/chaos \
		tests/ray_jobs/synthesis/test_caption.py tests/ray_jobs/training/test_killed.py
	$(BIN)/python -m pytest -m chaos $(OPERATOR_TESTS) tests/ray_jobs/training/test_train.py

test-cuda: ## build and test the operator and the model on a GPU, with PYTHON's own packages
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
		echo '$(PYTHON) has no PyTorch that sees a CUDA device' >&2; exit 1; }
	$(PYTHON) -m rwkv_clip._build
	$(PYTHON) -m pytest $(PLAIN_PYTEST) $(OPERATOR_TESTS)

lint: setup ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup ## write docs/configuration.md from the models that check a run's file
	$(BIN)/python docs/configuration.py

bench: setup ## run every benchmark: results verified first, then a table against the baselines
	@for benchmark in benchmarks/[!_]*.py; do \
		echo "== $$benchmark"; $(BIN)/python $$benchmark || exit 1; done

wheel: setup ## build the wheel into dist/
	$(BIN)/python -m pip wheel $(QUIET) --no-deps --no-build-isolation --wheel-dir dist .

lock: ## resolve requirements/*.in anew (needs uv; UPGRADE=1 takes the newest versions)
	requirements/lock.sh

clean: ## remove build outputs and caches; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis rwkv_clip/_C.so
	rm -f $(VENV)/.project
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
