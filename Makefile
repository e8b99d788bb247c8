# make ppo   from nothing to PPO on this machine
# make rlhf  from nothing through five rounds of human feedback, V1 to V5
# make test  the tests
# make bench speed, side by side with Transformers and, after `make vllm`, with vLLM; 40 minutes
# Each sets up .venv first. PYTHON names the interpreter, 3.11 or 3.12.
# make vllm       .venv-vllm, an environment with vLLM for CPUs
# make vllm-test  the tests of the vLLM backend, in that environment; five minutes

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
SHELL := /bin/sh

.PHONY: ppo rlhf test bench check setup vllm vllm-test

ppo: setup
	$(BIN)/python jobs/quickstart.py $(ARGS)

rlhf: setup
	$(BIN)/python jobs/rlhf.py --preset tiny $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

bench: setup
	$(BIN)/python -m tests.benchmarks.training
	$(BIN)/python -m tests.benchmarks.loop
	$(BIN)/python -m tests.benchmarks.ppo
	$(BIN)/python -m tests.benchmarks.preparation
	$(BIN)/python -m tests.benchmarks.generation
	$(BIN)/python -m tests.benchmarks.publishing

# Style, types and the tests' own markers: what a change must pass besides `make test`.
check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

setup: .venv/.installed

# torch comes first and pinned, so that a CPU build is taken where one is offered, and no other
# package brings a second one. DeepSpeed builds no operators: none is needed, nor a compiler.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), "Python 3.11 or 3.12 is needed; name it with PYTHON="'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools torch
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,eval]'
	touch $@

vllm: .venv-vllm/.installed

vllm-test: vllm
	.venv-vllm/bin/python -m pytest -m vllm tests/actors/test_vllm_*.py $(ARGS)

# vLLM names three packages for images and sound without versions; what pip finds for them may be
# built for another torch, which fails as vLLM imports it. Language models need none of them.
.venv-vllm/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), "Python 3.11 or 3.12 is needed; name it with PYTHON="'
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q -c constraints-vllm.txt pip setuptools torch
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv-vllm/bin/python -m pip install -q -c constraints-vllm.txt -e '.[dev,vllm]'
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@
