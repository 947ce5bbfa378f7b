# Needs Python 3.11 to 3.13 (with venv) and git; everything else is installed into $(VENV).
#
#   make demo       optimize a real pretrained model and show what it cost
#   make test       the whole test suite           make test-fast   without the slow tests
#   make bench      the figures of the README      make lint        ruff and mypy
#   make coverage   docs/coverage.md: what raising finds in the architectures of tests/zoo
#   make decoders   docs/decoders.md: the same architectures' decoders, held against them
#   make clean      remove the virtual environment and build outputs
#
# PYTHON=python3.12   the interpreter to use; another one makes the environment anew
# JOBS=2              test processes, one torch thread each
# ARGS='-k rotary'    further arguments for pytest, or for the demo and the benchmarks
# TORCH_INDEX=...     package index with CPU wheels of torch, see CONTRIBUTING.md

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
TORCH_INDEX ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-by-$(subst /,_,$(PYTHON))
DEV_STAMP := $(STAMP)-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := $(BIN)/python -P -m pytest -n $(JOBS) --dist worksteal

.PHONY: demo test test-fast bench coverage decoders lint clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/python examples/01_minilm.py $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PYTEST) $(ARGS)

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" $(ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py $(ARGS)

coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo.survey --jobs $(JOBS) --out docs/coverage.md $(ARGS)

decoders: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo.decoding --jobs $(JOBS) --out docs/decoders.md $(ARGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p attnopt

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) \
	else 'attnopt needs Python 3.11 to 3.13, but $(PYTHON) is %d.%d: call make PYTHON=python3.12' % v)"
	@echo "Installing into $(VENV) (a few minutes, once)"
	$(PYTHON) -m venv --clear $(VENV)
ifneq ($(TORCH_INDEX),)
	$(PIP) --no-deps --index-url $(TORCH_INDEX) torch
endif
	$(PIP) -e '.[test,hf,demo]'
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(PIP) -e '.[dev]'
	@touch $@
