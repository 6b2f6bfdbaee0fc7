# Two commands: `make demo` and `make test`. Each makes the virtual environment, installs from the lock, and does its job.
PYTHON ?= python3
VENV ?= .venv
# The torch build. Empty: the package index's own (with CUDA on Linux). Small CPU build:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH := $(shell grep -E '^torch==' constraints.txt)
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
WORKERS ?= 2
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test slow lint matrix clean

demo: $(VENV)/.demo
	$(VENV)/bin/ditkit demo --out runs/demo

test: $(VENV)/.dev
	$(PYTEST) -m "not slow"

# the tests of whole programs, which `make test` leaves out
slow: $(VENV)/.dev
	$(PYTEST) -m slow

lint: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# every pair of methods on every backbone (minutes)
matrix: $(VENV)/.dev
	DITKIT_MATRIX=1 $(PYTEST) tests/contract

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"ditkit needs Python 3.11 or newer, this is {v.major}.{v.minor}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) '$(TORCH)' $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e '.[all]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs
