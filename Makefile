# Everything runs in .venv, made from nothing but Python >= 3.11 and the package index.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: compare test lint clean

compare: .venv/compare-ready
	$(BIN)/python experiments/compare.py

test: .venv/test-ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
