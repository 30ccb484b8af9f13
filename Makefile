# `make demo` needs Python 3.10 or newer, a C++ compiler and make; it brings the rest into .venv.
# A second run is cheap: packages are installed when requirements-dev.txt changed, C++ is built when csrc/ changed.

PYTHON ?= python3        # the Python that .venv is made with; for `make gpu`, the one that has torch
DEMO := prune --method aap --max-accuracy-drop 1.0
DEMO_ARGS ?=             # e.g. DEMO_ARGS="--epochs 2 --rounds 2"
TEST_ARGS ?=             # e.g. TEST_ARGS="-m slow tests/test_build.py"
BENCH_ARGS ?=            # e.g. BENCH_ARGS="activation_attention --quick"
PAAMOPS_CPP ?= 1         # fail where the C++ kernels cannot be built; 0 leaves them out
PYTHON := $(strip $(PYTHON))
export PAAMOPS_CPP := $(strip $(PAAMOPS_CPP))
# Threads that wait spin for a moment only: on a busy machine long spinning stalls those that work, and with none of it
# each parallel region of a small network waits for threads to wake up.
GOMP_SPINCOUNT ?= 1000
export GOMP_SPINCOUNT

BIN := .venv/bin
BUILD_INPUTS := $(wildcard csrc/*) setup.py pyproject.toml
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test bench lint gpu

help:
	@echo "make demo   train ResNet-20 on the digits, prune it as far as its accuracy allows, compare"
	@echo "make test   the tests that need neither a GPU nor many minutes"
	@echo "make bench  time the ops on this CPU, beside their baselines; write bench/results/"
	@echo "make lint   ruff check and ruff format --check"
	@echo "make gpu    GPU tests and benchmarks with this machine's own $(PYTHON) and torch, without network"

demo: .venv/.built
	@echo "==> the main job: python -m paamops $(DEMO) $(DEMO_ARGS)"
	@$(BIN)/python -m paamops $(DEMO) $(DEMO_ARGS)

# One process a core, one thread each; a file stays in one process, which makes what its tests share once.
test: .venv/.built
	@echo "==> the tests"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --dist loadfile $(TEST_ARGS)

bench: .venv/.built
	@echo "==> the benchmarks"
	@$(BIN)/python -m bench $(BENCH_ARGS)

lint: .venv/.requirements
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

.venv/.requirements: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "paamops needs Python 3.10 or newer: make PYTHON=...")'
	@echo "==> Python packages into .venv (torch is large: the first time takes minutes)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install --quiet $$(grep '^torch==' requirements-dev.txt)
	@$(PIP) install --quiet --requirement requirements-dev.txt
	@touch $@

.venv/.built: .venv/.requirements $(BUILD_INPUTS)
	@echo "==> paamops into .venv, with its C++ kernels (PAAMOPS_CPP=$(PAAMOPS_CPP))"
	@$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

# No virtual environment here: a GPU machine has a torch of its own that fits its driver.
gpu:
	@if ! $(PYTHON) -c 'import torch' 2>/dev/null; then \
		echo "make gpu: $(PYTHON) has no torch, so no GPU can be used; nothing was run (make gpu PYTHON=... names another)"; \
	elif ! $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		echo "make gpu: torch finds no GPU on this machine; nothing was run"; \
	else \
		$(MAKE) --no-print-directory gpu-run; \
	fi

.PHONY: gpu-run
gpu-run: build/.gpu
	@echo "==> the GPU tests"
	@$(PYTHON) -m pytest -m gpu $(TEST_ARGS)
	@echo "==> the GPU benchmarks"
	@$(PYTHON) -m bench --device cuda $(BENCH_ARGS)

build/.gpu: $(BUILD_INPUTS)
	@echo "==> paamops into the environment of $(PYTHON), without network (PAAMOPS_CPP=$(PAAMOPS_CPP))"
	@$(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
	@mkdir -p build
	@touch $@
