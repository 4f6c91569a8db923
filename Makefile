# Every target makes what it needs: `make demo` or `make test` on a fresh clone is enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo

.PHONY: demo test lint types unit smoke clean

demo: $(VENV)/recipe.installed
	rm -rf $(DEMO)
	$(BIN)/python examples/franca_recipe.py --preset demo --output $(DEMO)

test: lint types unit smoke

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.installed
	$(BIN)/mypy

unit: $(VENV)/dev.installed
	$(BIN)/python -m pytest -n 2

# The recipe as a user runs it: every stage, on the built-in scenes, in under two minutes.
smoke: $(VENV)/dev.installed
	rm -rf runs/smoke
	$(BIN)/python examples/franca_recipe.py --preset smoke --output runs/smoke

$(VENV)/%.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
