# Every target makes what it needs: a virtual environment in .venv, from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Most of a test is Python on one core, some wait for a clock or for other programs: three processes for two cores, and
# whoever is done first takes over from the others.
AT_ONCE := --numprocesses 3 --dist worksteal
# Byte code is made on all cores, where pip takes one; packages' own tests are never imported.
COMPILE := -m compileall -q -j 0 -x 'site-packages/.*/tests?/'

.PHONY: help demo test test-all lint bench foreign fuzz clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "graphplan needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python $(COMPILE) $(VENV)/lib >/dev/null || true  # some packages bring files for other Pythons
	@touch $(READY)

demo: $(READY)  ## train resnet18 on real digits inside a budget that plain PyTorch cannot meet
	$(BIN)/graphplan demo

test: $(READY) lint  ## ruff, mypy --strict, pytest: what CI runs
	$(BIN)/pytest -m "not slow or ci" $(AT_ONCE)

test-all: $(READY) lint  ## the slow tests too
	$(BIN)/pytest $(AT_ONCE)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## measure everything (hours), and rewrite the figures of README.md and docs/
	$(BIN)/python -m bench.zoo --write README.md
	$(BIN)/python -m bench.full --write README.md
	$(BIN)/python -m bench.demo --write README.md
	$(BIN)/pip install --quiet --no-deps ckptplan==0.1.0rc1
	$(BIN)/python -m bench.executed gpt resnet18 mobilenet_v2 vit bert unet densenet121 resnet50 lstm vgg16_bn mlp --minutes 30
	$(BIN)/python -m bench.solver_lane
	$(BIN)/python -m bench.frontier
	$(BIN)/python -m bench.ready
	$(BIN)/pytest bench/test_speed.py --benchmark-autosave
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.least --write docs/codecs.md
	$(BIN)/python -m bench.codecs --write docs/codecs.md
	$(BIN)/python -m bench.codecs --no-compiler --write docs/codecs.md
	$(BIN)/python -m bench.hybrid --time-limit 20 --write docs/codecs.md
	$(BIN)/python -m bench.accuracy --write docs/codecs.md
	$(BIN)/python -m bench.step --write docs/step.md
	$(BIN)/python -m bench.step --time --apart --write docs/step.md
	$(BIN)/python -m bench.step --time --write docs/step.md
	$(BIN)/python -m bench.step --time --kept --write docs/step.md
	$(BIN)/python -m bench.rounding --write docs/step.md
	$(BIN)/python -m bench.caps --write docs/federated.md
	$(BIN)/python -m bench.fleet_plans --write docs/federated.md
	$(BIN)/python -m bench.federated
	$(BIN)/python -m bench.federated --write docs/federated.md

foreign: $(READY)  ## a hundred models of transformers: bytes, gradients and steps against plain PyTorch
	$(BIN)/pytest tests/test_foreign.py $(AT_ONCE)

fuzz: $(READY)  ## 10,000 random problems through every solver
	FUZZ=10000 $(BIN)/pytest tests/solvers/test_fuzz.py --timeout 0

clean:
	rm -rf $(VENV) demo_out .mypy_cache .pytest_cache .ruff_cache
