# Everything from a fresh clone: Python 3.11 or newer, make and git are all it needs.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

# One thread each: two busy ones on two cores are slower than one, and sums then repeat to the last digit.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
# Triton warns once when this default is left unsaid.
export TRITON_DEFAULT_FP_FUSION ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install lab demo test slow lint unit notebooks profile bench gpu constraints clean

help:
	@echo "make lab        JupyterLab on the start notebook"
	@echo "make demo       the gallery of demos in a browser"
	@echo "make test       everything CI runs"
	@echo "make slow       the stored results that take minutes to make again"
	@echo "make notebooks  execute the notebooks again"
	@echo "make bench      measure again and write the result tables"
	@echo "make gpu        kernel tests and benchmarks on this machine's GPU"

install: $(READY)

$(READY): pyproject.toml binder/constraints.txt zq_lib/core/assets.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'zq_lib needs Python 3.11 or newer; set PYTHON=python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c binder/constraints.txt -e ".[notebooks,apps,encoders,dev]"
	$(BIN)/zq assets
	@touch $@

lab: $(READY)
	$(BIN)/zq lab

demo: $(READY)
	$(BIN)/zq demo

test: lint unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Models and data are installed here, so a test that misses them fails instead of skipping.
unit: $(READY)
	ZQ_REQUIRE_ASSETS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=25

slow: $(READY)
	ZQ_REQUIRE_ASSETS=1 $(BIN)/python -m pytest -m slow --durations=10

notebooks: $(READY)
	$(BIN)/python -m zq_lib.nb.execute $(NOTEBOOKS)

profile: $(READY)
	$(BIN)/python -m zq_lib.pasta.make_profile

bench: $(READY)
	$(BIN)/zq bench pasta

# The GPU machine brings its own torch and triton; nothing is installed. Parity first, then timings.
gpu:
	$(PYTHON) -m pytest tests/kernels
	$(PYTHON) -m zq_lib.bench.gpu

constraints: $(READY)
	@echo "# The one set of versions that CI, the Makefile and Binder install. Regenerate with: make constraints" > binder/constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' \
		| grep -v -i -x -F -f <(sed -n 's/ *\\$$//p' zq_lib/core/assets.txt) >> binder/constraints.txt

clean:
	rm -rf $(VENV) artifacts .pytest_cache .ruff_cache
