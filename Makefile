# Everything a newcomer needs: `make demo` and `make test` set themselves up.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-all check format clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed-bench: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) -e '.[bench]'
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) -e '.[dev]'
	touch $@

demo: .venv/installed-bench  ## Train AdamW, NAdamW, Muon and SOAP on a real corpus and compare them (under 5 minutes)
	$(BIN)/guided-descent compare --out runs/demo

test: .venv/installed-dev  ## Run the tests
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist worksteal

test-all: .venv/installed-dev  ## Run every test, the slow ones too
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/installed-dev  ## Lint, format check, types, import directions, doctests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py -p no:cacheprovider
	$(BIN)/python -m pytest --doctest-modules src -p no:cacheprovider

format: .venv/installed-dev  ## Format the code and apply the safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment and the caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
