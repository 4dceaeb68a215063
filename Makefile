# Everything runs in .venv, made from pyproject.toml; `make install` is a part of each target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install system lint test test-all test-arm64 demo bench clean

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv with the project, the converter and the test tools in it

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $(STAMP)

system: # what the tests need of Debian; asks for nothing if it is there
	@scripts/need mosquitto socat systemd-analyze g++

lint: $(STAMP) ## format and lint checks, strict types
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

test: $(STAMP) system lint ## lint, types and the fast tests
	$(BIN)/pytest

test-all: $(STAMP) system lint ## the slow tests too
	$(BIN)/pytest -m ''

test-arm64: $(STAMP) ## tests of bundle, runtime and protocols in an emulated aarch64 Python
	scripts/test-arm64

demo: $(STAMP) system ## convert a real model, start broker and daemon, watch an answer arrive
	$(BIN)/python scripts/demo.py

bench: $(STAMP) ## start-up, memory, prefill and decode of the 270M on this machine
	$(BIN)/python benchmarks/bench.py

clean: ## remove what was made, downloads included
	rm -rf $(VENV) .cache build dist
