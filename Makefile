# The everyday commands. Each installs what it needs into .venv first; stamp files make a second call instant.
#   make run                   the demo, without torch        make run EXTRAS=optimize   with the methods that train
#   make test                  lint, types and all tests      make lint | bench | clean
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: run test lint bench clean system

EXTRAS ?=
VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt
# pip waits a minute for an index that does not answer; PyTorch's CPU index is optional, so it gets ten seconds.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Tests that hold times against each other have the cores to themselves.
ALONE := $(addprefix tests/test_,judge.py measure.py tune.py live_tune.py blame.py torch_blame.py replay_live.py flood.py lone.py timely.py)
PROGRAMS := redis-server prometheus wrk
export PIP_NO_WARN_SCRIPT_LOCATION := 1

run: $(VENV)/.base $(if $(filter optimize,$(EXTRAS)),$(VENV)/.optimize)
	@exec $(BIN)/hone demo

test: $(VENV)/.dev system lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(addprefix --ignore=,$(ALONE))
	$(BIN)/python -m pytest $(ALONE)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(VENV)/.dev system
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .hone build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first interpreter that really runs, is new enough and can make an environment (a shim on PATH may do none of it).
$(VENV)/.python:
	@for python in $${PYTHON:-python3.11 python3.12 python3.13 python3}; do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$("$$python" --version)"; "$$python" -m venv $(VENV); touch $@; exit 0; fi; done; \
	echo "No Python >= 3.11 with venv found: install it (Debian: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python" >&2; exit 1

$(VENV)/.base: $(INPUTS) | $(VENV)/.python
	@echo "Installing the server (without torch) into $(VENV) ..."
	@$(PIP) --editable .
	@touch $@

# The CPU build of torch where one is to be had (200 MB instead of gigabytes), else what the configured index has.
$(VENV)/.torch: constraints.txt | $(VENV)/.python
	@echo "Installing $(TORCH) ..."
	@$(BIN)/python -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch").split("+")[0] != "$(TORCH)".split("==")[1])' 2>/dev/null \
	  || $(PIP) --no-deps --index-url "$(TORCH_INDEX)" --timeout 10 --retries 0 "$(TORCH)" 2>/dev/null \
	  || { echo "(no CPU build within reach; taking the default one)"; $(PIP) "$(TORCH)"; }
	@touch $@

$(VENV)/.optimize: $(INPUTS) $(VENV)/.torch
	@echo "Installing what the training methods need ..."
	@$(PIP) --editable '.[optimize]'
	@touch $@

$(VENV)/.dev: $(INPUTS) $(VENV)/.torch
	@echo "Installing everything ..."
	@$(PIP) --editable '.[optimize,dev]'
	@touch $(VENV)/.base $(VENV)/.optimize $@

# Programs that some tests drive. Installed where that is allowed; else the tests that need them say so (with CI=true: fail).
system:
	@missing=""; for program in $(PROGRAMS); do PATH="$$PATH:/usr/sbin" command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	sudo=""; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
	if command -v apt-get >/dev/null && $$sudo true 2>/dev/null; then \
	  echo "Installing$$missing ..."; \
	  $$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends $$missing >/dev/null && exit 0; fi; \
	echo "Not on this machine:$$missing. The tests that need them are left out; to have them: apt-get install$$missing (as root)"; \
	[ "$${CI:-}" != true ]
