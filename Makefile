# Needs Python (3.10 to 3.13) and git; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all check docs package new-method clean

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/.ready  ## teacher, student alone, KD and ACKD on digits: a table, demo/curves.png, demo/student.safetensors
	rm -rf demo
	$(BIN)/ackd demo --out demo

test: $(VENV)/.ready  ## the tests, without those marked slow
	$(BIN)/python -m pytest -n auto --dist loadscope -m "not slow"

test-all: $(VENV)/.ready  ## all tests
	$(BIN)/python -m pytest -n auto --dist loadscope

package: $(VENV)/.ready  ## wheel and source archive in dist/, checked, and the demo from the wheel in an empty environment
	rm -rf dist build/empty
	$(BIN)/python -m pip install --quiet --editable ".[release]"
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet dist/*.whl
	cd build/empty && bin/ackd demo --out demo

new-method: $(VENV)/.ready  ## the files of a new method: make new-method NAME=my_method
	$(BIN)/python tests/new_method.py $(NAME)

docs: $(VENV)/.ready  ## the documentation site: build/site/index.html
	$(BIN)/python docs/site/build.py

check: $(VENV)/.ready  ## format, lint, types, direction of imports, documentation site
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_imports.py
	$(BIN)/python docs/site/build.py

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache
