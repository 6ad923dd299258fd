# Every target creates .venv if it is missing; a second run reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per test process: more do not speed up small models. worksteal keeps the tests of a
# module in one process, so that what they share is made once.
TESTS := OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist worksteal

.PHONY: help demo test test-slow lint types site dist check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       pre-train, cluster, train experts, customize for six tasks (some minutes)"
	@echo "make test       run the fast tests"
	@echo "make test-slow  run the slow tests (end to end)"
	@echo "make lint       check style (ruff)"
	@echo "make types      check types (mypy)"
	@echo "make site       build the documentation site (build/site)"
	@echo "make dist       build and check the wheel and the source distribution (dist)"
	@echo "make check      run all checks, as continuous integration does"
	@echo "make clean      delete .venv, runs and caches"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "moce needs Python 3.11 or newer; try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Stamp files: reinstall when the dependencies change.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $(VENV)/.installed $@

demo: $(VENV)/.installed
	$(BIN)/moce demo --out runs/demo --reuse

test: $(VENV)/.installed-dev
	$(TESTS)

test-slow: $(VENV)/.installed-dev
	$(TESTS) -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# A broken link, a missing page or an undocumented name is an error.
site: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Without isolation: what builds is installed already, so that this needs no network.
dist: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

check: lint types test test-slow site dist

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache
