# Every target makes what it needs: `make demo` or `make test` on a fresh clone is enough.
PYTHON ?= python3
OLDEST_PYTHON ?= python3.10
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo

.PHONY: demo test test-oldest test-slow lint types unit docs gallery smoke bench bench-cpu bench-gpu clean

demo: $(VENV)/recipe.installed
	rm -rf $(DEMO)
	$(BIN)/python examples/franca_recipe.py --preset demo --output $(DEMO)

test: lint types unit docs smoke

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.installed
	$(BIN)/mypy

unit: $(VENV)/dev.installed
	$(BIN)/python -m pytest -n 2

# All fast tests with the oldest versions that pyproject.toml admits, on the oldest Python.
test-oldest: .venv-oldest/dev.installed
	.venv-oldest/bin/python -m pytest -n 2

.venv-oldest/dev.installed: pyproject.toml
	test -x .venv-oldest/bin/python || $(OLDEST_PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-oldest/bin/uv pip install --quiet --resolution lowest-direct \
	    --python .venv-oldest/bin/python --editable '.[dev]'
	touch $@

# What takes minutes: a run that is killed twenty times, every configuration of every kernel.
test-slow: $(VENV)/dev.installed
	$(BIN)/python -m pytest -m slow -s

# The guide, into build/site: warnings are errors, and nothing is fetched.
docs: gallery
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The pages of docs/gallery, each a script that is run from top to bottom.
gallery: $(VENV)/dev.installed
	$(BIN)/python docs/gallery/run.py

# The recipe as a user runs it: every stage, on the built-in scenes, in under two minutes.
smoke: $(VENV)/dev.installed
	rm -rf runs/smoke
	$(BIN)/python examples/franca_recipe.py --preset smoke --output runs/smoke

# Races of every operation against its textbook formula and its peers; docs/benchmarks.md.
bench: $(VENV)/dev.installed $(VENV)/peers.installed
	$(BIN)/python -m benchmarks --device cpu $(FLAGS)

# Races of whole steps and trainings on a CPU, against an old commit and lightly.
# FLAGS="--cifar10 FOLDER" trains on real images; `python -m benchmarks.steps --help` has the rest.
bench-cpu: $(VENV)/recipe.installed $(VENV)/peers.installed
	$(BIN)/python -m benchmarks.steps $(FLAGS)

# The operations on a CUDA GPU, with the packages that $(PYTHON) has: nothing is installed.
# FLAGS="--results DIR --docs FILE" writes elsewhere; `python -m benchmarks.render` renders later.
bench-gpu:
	$(PYTHON) -m benchmarks --device cuda $(FLAGS)

$(VENV)/%.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
