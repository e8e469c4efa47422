# `make quickstart` and `make test` do everything on a machine that has only
# Python, git and make.

PYTHON ?= python3
VENV ?= .venv-$(notdir $(PYTHON))
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed
WORKDIR ?= runs/quickstart
# Four workers on a laptop's cores would fight for them; two fill a small CI.
WORKERS ?= 2
# By file, whose tests share a finished run and what was compiled.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=10

.PHONY: install quickstart test test-slow test-all check coverage lowest clean

install: $(INSTALLED)

# Without compat Python takes a clone, seen from the folder it is in, for an empty
# package of that name.
$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxtransfer needs Python >= 3.11: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]' \
	  --config-settings editable_mode=compat
	touch $@

quickstart: $(INSTALLED)
	$(BIN)/jaxtransfer --config=configs/quickstart.py --workdir=$(WORKDIR)

# ARGS: more for pytest, e.g. `make test ARGS="tests/data -k manifest"`.
test: $(INSTALLED)
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: $(INSTALLED)
	$(PYTEST) -m slow $(ARGS)

test-all: test test-slow

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

coverage: $(INSTALLED)
	$(BIN)/python -m pip install --quiet pytest-cov
	$(PYTEST) -m 'not slow' --cov=jaxtransfer \
	  --cov-report=html --cov-report=term $(ARGS)

# The oldest versions that pyproject.toml allows, in place of the newest.
lowest: $(INSTALLED)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --resolution lowest-direct --upgrade \
	  --editable '.[test]'

clean:
	rm -rf .venv-* build *.egg-info .pytest_cache .ruff_cache
