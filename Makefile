# Everything runs in .venv, built from pyproject.toml. Targets that need it run `make install` first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests of the code that runs on the device, and of its protocols.
ARM64_TESTS := bundles/test_bundle.py generation protocol requests runtime service/test_end_to_end.py test_config.py \
               text/test_tokenizer.py transports/test_mqtt.py transports/test_serial.py

# One more worker than processors, because many tests wait for a broker or a daemon.
WORKERS ?= $(shell expr $$(nproc) + 1)
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install system lint test test-all coverage test-pythons test-arm64 test-system fuzz soak deb demo bench bench-e2b bench-check adapter adapter-score clean

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(STAMP) ## create .venv with the project, the converter and the test tools

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $(STAMP)

system: # check for the Debian packages that the tests need
	@scripts/need mosquitto socat systemd-analyze udevadm g++ faketime

lint: $(STAMP) ## format and lint checks, strict types
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

test: $(STAMP) system lint ## lint, types and the fast tests
	$(PYTEST)

test-all: $(STAMP) system lint ## the slow tests too, and more examples of each property
	$(PYTEST) -m '' --hypothesis-profile=thorough

coverage: $(STAMP) system ## the fast tests with branch coverage of edge/ and converters/, child processes included
	$(PYTEST) --cov --cov-report=term:skip-covered

PYTHONS := 3.11 3.12 3.13

test-pythons: system ## the fast tests on each supported Python that is installed; PYTHONS="3.12 3.13"
	@for version in $(PYTHONS); do \
	  python$$version -c '' 2>/dev/null || { echo "python$$version is not installed: skipped"; continue; }; \
	  echo "python$$version"; \
	  $(MAKE) --no-print-directory PYTHON=python$$version VENV=.cache/venv-$$version test || exit; \
	done

test-arm64: $(STAMP) ## tests of bundle, runtime and protocols in an emulated aarch64 Python
	$(BIN)/python -c 'from tests.support import checkpoint_files as c; c.real_model()'
	scripts/test-arm64 -q $(addprefix tests/,$(ARM64_TESTS))

fuzz: $(STAMP) ## fuzz each reader of untrusted input for SECONDS=60
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet -e '.[fuzz]'
	$(BIN)/python -m fuzz.run --seconds $(or $(SECONDS),60)

soak: $(STAMP) system ## run a daemon under light load for HOURS=24; report its memory and disk writes
	@$(BIN)/python -m tests.support.soak --hours $(or $(HOURS),24) $(if $(JSON),--json)

deb: $(STAMP) ## arm64 packages for Debian bookworm and trixie, in dist/
	scripts/build-deb

test-system: $(STAMP) ## install the package in an emulated arm64 machine with systemd, and send it requests
	scripts/test-system

demo: $(STAMP) system ## convert a real model, start a broker and the daemon, and show an answer arrive
	$(BIN)/python scripts/demo.py

bench: $(STAMP) ## start-up, memory, prefill and decode of the 270M on this machine
	$(BIN)/python -m benchmarks.bench

bench-e2b: $(STAMP) ## Gemma 4 E2B at full size, random weights (30 GB of disk, half an hour)
	$(BIN)/python -m benchmarks.e2b

bench-check: $(STAMP) ## fail if a ratio is worse than in the committed table
	$(BIN)/python -m benchmarks.bench --check

ADAPTER := .cache/adapter
LORA := adapters/field_270m/trained
TORCH := $(ADAPTER)/venv/bin/python
GGUF = $(shell $(BIN)/python -c 'from benchmarks import models; print(models.checkpoint())')

adapter: $(STAMP) ## train the LoRA adapter for sensor reports again, in a separate venv with torch (an hour)
	test -x $(TORCH) || $(PYTHON) -m venv $(ADAPTER)/venv
	$(TORCH) -m pip install --quiet --disable-pip-version-check -r adapters/field_270m/requirements.txt
	$(BIN)/python -m adapters.field_270m.examples $(GGUF) $(ADAPTER)/examples.jsonl
	$(TORCH) adapters/field_270m/train.py $(GGUF) $(ADAPTER)/examples.jsonl -o $(ADAPTER)/trained

adapter-score: $(STAMP) ## score it on held-out scenarios in float32, int8 and int4, and the base model too; LORA=FOLDER
	$(BIN)/python -m adapters.field_270m.score $(GGUF) --recipe float32
	$(BIN)/python -m adapters.field_270m.score $(GGUF) --recipe float32 --recipe int8 --lora $(LORA)
	$(BIN)/python -m adapters.field_270m.score $(GGUF) --recipe int4 --calibrate --lora $(LORA)

clean: ## remove everything built or downloaded
	rm -rf $(VENV) .cache build dist
