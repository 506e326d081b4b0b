# make demo | make test: from a bare machine with Python 3.11+ and make. Everything is installed into .venv.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope

.PHONY: demo test check lint assets concepts docs format clean
.DEFAULT_GOAL := test

demo: .venv/installed
	$(BIN)/trivium demo

test: lint assets
	$(PYTEST)

check: lint assets  # the tests that are not slow
	$(PYTEST) -m "not slow"

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --summary=none
	$(BIN)/lint-imports --no-cache --no-logo

assets: .venv/installed-test  # the few real models and tokenizers that tests use
	$(BIN)/python -m tests.assets

concepts: .venv/installed  # the generated table of what works
	$(BIN)/python -m trivium.lab.concepts

docs: .venv/installed-docs  # the documentation site, into site/; a broken link is an error
	$(BIN)/python -m docs.generate
	$(BIN)/zensical build --strict --clean

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist site .pytest_cache .ruff_cache

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Trivium needs Python 3.11 or newer; none was found. Name one: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "Could not create .venv; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

# The marks are written last, so that an interrupted installation starts again.
.venv/installed: pyproject.toml constraints.txt hatch_build.py trivium/kernels/native.cpp | .venv/bin/python
	@echo "installing trivium into .venv (torch is large: a few minutes)"
	$(PIP) --editable '.[demo]'
	@touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/installed
	@echo "installing what the tests compare with"
	$(PIP) --editable '.[test,dev]'
	@touch $@

.venv/installed-docs: pyproject.toml constraints.txt | .venv/installed
	$(PIP) --editable '.[docs]'
	@touch $@
