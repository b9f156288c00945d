# Two commands: `make demo` runs the main job from nothing, `make test` checks everything a change needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow lint bench clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { echo "cannot make a virtual environment: install python3-venv" >&2; exit 1; }

$(VENV)/run.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/dev.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,capture,kernels]'
	touch $@ $(VENV)/run.stamp

demo: $(VENV)/run.stamp
	mkdir -p build
	$(BIN)/moesim run studies/quickstart.toml --report build/quickstart.html --perfetto build/quickstart.perfetto.json

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/run.stamp
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python tests/bench.py

clean:
	rm -rf build $(VENV)
