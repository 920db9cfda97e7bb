# Two commands for a fresh clone: `make demo` and `make test`. Both need Python 3.11+, pip and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo test test-slow check format proto install

install: .venv/installed

# Installs again only when what is to be installed has changed.
.venv/installed: pyproject.toml constraints.txt
	@echo 'installing into .venv: about 6 GB, a few minutes, once'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --progress-bar off --disable-pip-version-check --constraint constraints.txt --editable '.[cpu,dev]'
	@touch $@

demo: install
	$(BIN)/orbithash demo $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

test-slow: install
	$(BIN)/python -m pytest -m slow --timeout 1200 $(ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	rm -rf build/types && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy --namespace-packages -p orbithash
	$(BIN)/python proto/generate.py --check

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: install
	$(BIN)/python proto/generate.py
