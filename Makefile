# Everything a newcomer needs. Every target sets up .venv first, which takes no time once it is there.
PYTHON ?= python3
BIN := .venv/bin
export PYTHON

.PHONY: help setup demo test test-slow check lint types imports protos house stubs constraints gpu-check clean

help: ## Show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: ## Make .venv with all that the demo, the services and development need
	@scripts/setup.sh
	@$(BIN)/python scripts/build_native.py

demo: setup ## Start everything, let two models answer at once, stop everything
	$(BIN)/python -m muxserve.cli.demo

test: setup ## Run the tests but for the slow ones, two files at a time
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: setup ## Run the slow tests
	$(BIN)/pytest -m slow

check: lint types imports protos house ## Run every check that is not a test of behaviour

lint: setup ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy, strict
	$(BIN)/mypy

imports: setup ## Who may import whom
	$(BIN)/lint-imports --no-logo

protos: setup ## The protos' style, and whether the stubs are current
	cd proto && ../$(BIN)/buf lint
	$(BIN)/python scripts/generate_stubs.py --check

house: setup ## Layout, packaging, documentation of the protos
	$(BIN)/pytest -q tests/house

stubs: setup ## Generate the stubs from the protos
	$(BIN)/python scripts/generate_stubs.py

constraints: setup ## Pin what is installed
	$(BIN)/python scripts/pin_constraints.py

gpu-check: setup ## Check what needs a GPU; says so where there is none
	$(BIN)/python scripts/gpu_check.py

clean: ## Remove caches, builds and run directories; .venv stays
	rm -rf build dist .muxserve .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
