# The guide's commands; `make` alone lists them. For GNU make 3.81 (macOS) and newer.

# Which Python makes .venv and .venv-v4: make setup PYTHON=python3.12
PYTHON ?= python3
# Passed on to JupyterLab: make lab LAB_FLAGS="--no-browser --port 8899"
LAB_FLAGS ?=
# Passed on to pytest, whose other options are in pyproject.toml. Without loadfile, a notebook's
# cells would be spread over the processes; without no-reorder, the longest file would come last.
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder

VENV_PYTHON := .venv/bin/python
V4_PYTHON := .venv-v4/bin/python
# Keeps the files of Jupyter, IPython and Matplotlib inside the clone.
RUN := $(VENV_PYTHON) tools/lab.py --

FIND_PYTHON = command -v "$(PYTHON)" >/dev/null || { \
	echo "Found no command $(PYTHON), expected Python" \
	"$$(sed -n 's/^requires-python = "\(.*\)"/\1/p' pyproject.toml): install one and name it," \
	"for example: make $@ PYTHON=/opt/python/bin/python3" >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help setup setup-v4 lab test lint bench notebooks matrix atlas causes messages pyz lock clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## Make .venv and install everything into it; nothing to do the second time
	@$(VENV_PYTHON) tools/set_up.py --check 2>/dev/null || { $(FIND_PYTHON); "$(PYTHON)" tools/set_up.py; }

setup-v4: ## The same for .venv-v4, which has Transformers 4
	@$(V4_PYTHON) tools/set_up.py --v4 --check 2>/dev/null || { $(FIND_PYTHON); "$(PYTHON)" tools/set_up.py --v4; }

lab: setup ## Open the guide in JupyterLab
	@$(VENV_PYTHON) tools/lab.py $(LAB_FLAGS)

test: lint ## Run every check and every test, notebooks and browser included
	$(RUN) -m pytest -m gpu tests/test_gpu.py
	$(RUN) -m pytest -m "not gpu" $(PYTEST_FLAGS)

lint: setup ## Run the checks that execute nothing: ruff and mypy
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m mypy

bench: setup ## Measure the guide against the bare libraries
	$(RUN) -m benchmarks

notebooks: setup ## Execute every notebook again and store its outputs
	$(RUN) tools/notebooks.py

matrix: setup setup-v4 ## Run the table of loads on Transformers 5 and 4 and store what came out
	$(RUN) tools/matrix.py
	$(V4_PYTHON) tools/lab.py -- tools/matrix.py

atlas: setup ## X-ray every architecture that supports FlashAttention-2 and store what came out
	$(RUN) tools/atlas.py

causes: setup ## Write the pages of the causes from the doctor's catalogue
	$(VENV_PYTHON) tools/causes.py

messages: setup ## Extract the doctor's sentences, and compile their translations
	$(VENV_PYTHON) tools/messages.py

pyz: ## Write dtype-doctor.pyz, the doctor in one file for any Python from 3.9 on
	@$(FIND_PYTHON)
	"$(PYTHON)" tools/pyz.py

lock: ## Write constraints.txt and constraints-v4.txt anew
	@$(FIND_PYTHON)
	"$(PYTHON)" tools/lock.py

clean: ## Remove .venv, .venv-v4 and everything else that these commands made in this folder
	rm -rf .venv .venv-v4 .jupyter .mypy_cache .pytest_cache .ruff_cache .hypothesis dtype-doctor.pyz
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
