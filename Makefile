# Two commands: `make demo` shows a new view, `make test` passes the tests. Each makes the environment if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types docs notebook clean

$(VENV)/.core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[cpu]"
	touch $@

$(VENV)/.installed: $(VENV)/.core
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: $(VENV)/.core
	$(BIN)/idnerf demo --out out/demo

test: $(VENV)/.installed lint types
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples

types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

# The pages as a site: out/site/index.html.
docs: $(VENV)/.core
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Runs the notebook and keeps its pictures in it: after a change of the default weights.
notebook: $(VENV)/.installed
	$(BIN)/jupyter execute --inplace examples/quickstart.ipynb

clean:
	rm -rf $(VENV) out
