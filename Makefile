# Two commands for a fresh clone: `make demo` and `make test`. Both need Python 3.11+, pip and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
comma := ,
# Address of a package index with a CPU build of torch and torchvision; empty: the usual index, whose build has CUDA.
TORCH_INDEX ?=
PIP_INSTALL = $(BIN)/python -m pip install --quiet --progress-bar off --disable-pip-version-check --constraint constraints.txt

.PHONY: tools release demo docs docs-links docs-screenshots docs-test test test-slow test-gpu check format proto vendor install

install: .venv/installed vendor

# Installs again only when the requirements have changed.
.venv/installed: pyproject.toml constraints.txt
	@echo 'installing into .venv, once, in a few minutes: $(if $(TORCH_INDEX),about 1 GB to download (torch for CPUs),3.6 GB to download$(comma) 7 GB on disk (torch with CUDA; TORCH_INDEX=… takes torch for CPUs))'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(if $(TORCH_INDEX),$(PIP_INSTALL) --index-url $(TORCH_INDEX) torch torchvision)
	@$(PIP_INSTALL) --editable '.[cpu,dev]'
	@touch $@

# Scripts of other projects for the page. Without them everything else works.
TOOLS = .venv/tools/bin/gpio
VENDOR = search/web/static/vendor/sbom.cdx.json
vendor: $(VENDOR)

$(VENDOR): search/web/package.json search/web/package-lock.json .ci/vendor.py | .venv/installed
	@$(BIN)/python .ci/vendor.py || true

# Checkers of exported files that need other versions than the project; a test that needs one skips without it.
tools: $(TOOLS)

$(TOOLS): .ci/tools.txt
	@$(PYTHON) -m venv .venv/tools
	@.venv/tools/bin/python -m pip install --quiet --disable-pip-version-check --requirement .ci/tools.txt
	@.venv/tools/bin/python -c "import duckdb_extensions as e; e.import_extension('spatial')"
	@touch $@

demo: install
	$(BIN)/orbithash demo $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

test-slow: install
	$(BIN)/python -m pytest -m slow --timeout 1200 $(ARGS)

test-gpu: install
	$(BIN)/python -m pytest -m gpu $(ARGS)

# Builds the pages into build/docs. A warning, such as a broken link from page to page, is an error.
docs: install
	@mkdir -p build
	$(BIN)/python -m sphinx -M html docs build/docs --fail-on-warning --keep-going --quiet $(ARGS)
	@echo 'open build/docs/html/index.html'

# Takes the pictures of the pages by the tests of the page in the browser, which need Chromium.
docs-screenshots: install
	@mkdir -p docs/_static/screens
	ORBITHASH_SCREENSHOTS=$(CURDIR)/docs/_static/screens $(BIN)/python -m pytest -m slow tests/search/web/test_page_pictures.py $(ARGS)

# Checks the links to other sites; needs the network.
docs-links: install
	$(BIN)/python -m sphinx -b linkcheck docs build/docs-links --quiet $(ARGS)

# Runs the examples of the pages; PAGES=docs/start.md takes one page.
PAGES ?= README.md docs
docs-test: install
	PYTHONPATH=.ci $(BIN)/python -m pytest -p examples --tb=short $(PAGES) $(ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python .ci/prose.py
	$(BIN)/lint-imports --no-cache
	rm -rf build/types && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy --namespace-packages -p orbithash
	$(BIN)/python proto/generate.py --check

# Builds dist/ and tries the wheel with every supported Python; publishes nothing.
release: install
	$(BIN)/python .ci/release.py $(ARGS)

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: install
	$(BIN)/python proto/generate.py
