# make demo | test | test-peers | lint | bench. Each first builds .venv from the pinned requirements, unless it is up to date.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test test-slow test-peers lint bench venv clean

demo: venv
	$(BIN)/fastllm demo

test: venv
	$(BIN)/python -m pytest

test-slow: venv
	$(BIN)/python -m pytest -m slow

# Against the libraries that define the formats, which are installed beside what is there.
test-peers: venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements/peers.txt
	$(BIN)/python -m pytest -m "peers and not slow"

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: venv
	set -e; for script in bench/bench_*.py; do $(BIN)/python "$$script"; done

venv: $(INSTALLED)

# The stamp is written last: an installation that was cut short is done again.
$(INSTALLED): requirements/dev.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastllm needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Installing the pinned requirements into .venv (a minute or two)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
