# `make demo` and `make test` do everything on a fresh machine; they need python3 (3.10 to 3.13) with its venv module.
#
#     make demo      environment in .venv, install, and a Llama fine-tuned privately (outputs/demo)
#     make test      the same environment with what the tests need; ruff, mypy, and the tests that every change must pass
#     make test-slow the other tests: launches of every engine, kills, resumes, the recipes and tools from end to end
#     make docs      the site in site/, from docs/; a warning, such as a link to nothing, is an error
#     make gpu       everything that is to be measured on a GPU, within 500 s (GPU_ARGS="--list", "--rehearse" ...)
#     make mutate    break dpft in one place at a time: is each mistake caught by a test? (some twenty minutes)
#     make lint      ruff and mypy alone
#     make format    sort the imports, repair what ruff can repair, and format
#     make clean     remove the environment, outputs, and every cache
#
# Another interpreter: `make test PYTHON=python3.12` (after `make clean`). Some tests: `make test PYTEST_ARGS="-k ledger"`.

PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=
GPU_ARGS ?=
DEMO_DIR ?= outputs/demo

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# An install is repeated when one of these is newer than its stamp, and not otherwise.
INPUTS := setup.cfg setup.py pyproject.toml constraints.txt dpft/__init__.py
CHECKED := dpft recipes tools
# Two, on any machine: each of pytest's processes imports torch and transformers and computes its own references.
PARALLEL := --numprocesses=2 --dist=worksteal
# For the tests of the Triton kernels in its interpreter. Not in constraints.txt: a CUDA build of torch brings the very
# triton that it was built with. Before 3.7 the interpreter cannot run a loop under numpy 2.4.
TRITON := triton==3.7.1; sys_platform == "linux"

.PHONY: help demo test test-slow docs gpu mutate lint format clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#     //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "dpft needs Python 3.10 or newer, and $(PYTHON) is %d.%d: name another with make PYTHON=..." % v[:2])'
	$(PYTHON) -m venv $(VENV)

# One pip command each, so that one resolution sees all requirements. The stamp of the larger install serves for the smaller.
$(VENV)/.stamp-demo: $(INPUTS) | $(BIN)/python
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.stamp-test: $(INPUTS) | $(BIN)/python
	$(PIP_INSTALL) --editable '.[deepspeed,peft,trl,docs,dev]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP_INSTALL) --no-deps '$(TRITON)'
	@touch $@ $(VENV)/.stamp-demo

# `accelerate launch` would leave one thread to a CPU run: it sets OMP_NUM_THREADS=1 where the environment has no number.
demo: $(VENV)/.stamp-demo
	@threads="$${OMP_NUM_THREADS:-$$($(BIN)/python -c 'import os; print(os.cpu_count() or 1)')}"; \
	set -x; \
	OMP_NUM_THREADS="$$threads" $(BIN)/accelerate launch --config_file accelerate_config.yaml \
	  recipes/llama_dp.py --output_dir $(DEMO_DIR) $(DEMO_ARGS)

lint: $(VENV)/.stamp-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CHECKED)

# No test may reach for the network. Both targets together are the whole suite.
test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.stamp-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PARALLEL) -m slow $(PYTEST_ARGS)

docs: $(VENV)/.stamp-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo 'The site is in site/: $(BIN)/python -m http.server --directory site'

gpu: $(VENV)/.stamp-test
	$(BIN)/python tools/gpu.py $(GPU_ARGS)

mutate: $(VENV)/.stamp-test
	$(BIN)/python tools/mutate.py

format: $(VENV)/.stamp-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist outputs site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
