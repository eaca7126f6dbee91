# Everything runs in .venv, made from nothing but Python >= 3.11 and the package index.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: compare test lint docs clean

compare: .venv/compare-ready
	$(BIN)/python experiments/compare.py

# A process of the tests has one thread unless told otherwise, and threads that wait leave the core to others.
test: export OMP_NUM_THREADS ?= 1
test: export OMP_WAIT_POLICY ?= PASSIVE
test: .venv/test-ready lint
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site: site/index.html.
docs: .venv/test-ready
	$(BIN)/python -m mkdocs build --strict

# constraints.txt pins every version, so that a number can be had again.
.venv/compare-ready: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[compare]"
	touch $@

.venv/test-ready: .venv/compare-ready
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[compare,test]"
	touch $@

clean:
	rm -rf .venv
