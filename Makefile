# make quickstart   set up and train the default hybrid for about three minutes, compare, save, generate
# make test         set up and run the test-suite
# make docs         build the documentation site into site/
# TORCH_INDEX=https://download.pytorch.org/whl/cpu make ...   take torch from another wheel index (CPU-only builds)

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
MINUTES ?= 3
OUT ?= runs/quickstart

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TRITON := $(VENV)/triton
INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)

.PHONY: quickstart test lint docs bench clean

$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(INDEX) torch
	touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[train]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@

# Triton stays outside the environment: everything but its own tests must work without it.
$(TRITON): constraints.txt
	$(PIP) --no-deps --target $@ triton
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[docs]'
	touch $@

quickstart: $(VENV)/.train
	$(BIN)/linnet train --recipe quickstart --minutes $(MINUTES) --out $(OUT)
	$(BIN)/linnet generate $(OUT) --prompt 'def main(' --max-tokens 200

test: $(VENV)/.dev $(TRITON)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --ignore tests/triton
	OMP_NUM_THREADS=1 PYTHONPATH=$(TRITON) $(BIN)/python -m pytest -n 2 tests/triton

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.dev
	$(BIN)/linnet bench cpu

clean:
	rm -rf $(VENV) site build dist *.egg-info
