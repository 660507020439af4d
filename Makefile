# `make help` lists what there is. Everything runs in .venv, built from requirements.txt and constraints.txt.
PYTHON ?= python3
CORPUS ?=
PROFILE ?= default
OUT ?= results/local/gpu
# Names that a user gives go to commands by the environment alone, so neither make nor a shell expands what is in them.
override PYTHON := $(value PYTHON)
override CORPUS := $(value CORPUS)
override PROFILE := $(value PROFILE)
override OUT := $(value OUT)
override CEMB_GRID := $(value PROFILE)
export PYTHON CORPUS OUT CEMB_GRID
VENV := .venv
BIN := $(VENV)/bin
# Where it is set, as in many containers, each of the study's dozens of kernels would compile torch and all else anew.
unexport PYTHONDONTWRITEBYTECODE

STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
PEERS_STAMP := $(VENV)/.installed-peers

.PHONY: help env book study check check-published site archive test test-long lint bench peers test-gpu gpu lab open clean
.DEFAULT_GOAL := help

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  CORPUS=path/to.txt make book runs the study on a text of your own"
	@echo "  PROFILE=full make book runs all of it: more ratios, three seeds, word2vec; some two hours"

$(STAMP): requirements.txt constraints.txt pyproject.toml
	@"$$PYTHON" -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.11 or later is needed, {sys.executable} is {v[0]}.{v[1]}; name another: make PYTHON=python3.12 ..." if v < (3, 11) else 0)'
	@echo "setting up $(VENV): once, some 2 GB"
	"$$PYTHON" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -r requirements.txt -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

env: $(STAMP) ## set up the environment

book: study site ## run what is not up to date of the study, and build the site

study: $(STAMP) ## run the notebooks that are not up to date
	$(BIN)/python -m cemb study

check: $(STAMP) ## say which runs are stale, and why
	$(BIN)/python -m cemb study --check

check-published: $(STAMP) ## say which of the references' records are of earlier code, and why
	$(BIN)/python -m cemb study --check --published

site: $(STAMP) ## build the site from the runs there are
	$(BIN)/python book/build.py

archive: $(STAMP) ## build the site and pack it into one zip file, build/cemb-VERSION-site.zip
	$(BIN)/python book/build.py --archive

$(TEST_STAMP): requirements-test.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-test.txt -c constraints.txt
	@touch $@

# A file's tests share compiled kernels, so they stay on one worker; the longest files go first.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(TEST_STAMP) ## run the tests; some minutes
	$(PYTEST) --report=results/local/tests.jsonl

test-long: $(TEST_STAMP) ## run those that take long; half an hour
	$(PYTEST) -m long --report=results/local/tests-long.jsonl

$(PEERS_STAMP): requirements-peers.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r requirements-peers.txt
	@touch $@

peers: $(PEERS_STAMP) ## install what the benchmark compares with besides torch

bench: $(STAMP) ## time every table and rival, and say which targets are reached
	$(BIN)/python -m cemb bench --targets --out results/local/bench.jsonl

# On a CUDA host, with the torch, Triton, numba, scipy, tqdm, tyro and pytest that are there; no Jupyter.
test-gpu: ## run the tests of the kernels on this GPU
	"$$PYTHON" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "torch sees no CUDA device")'
	"$$PYTHON" -m pytest -m "long or not long" tests/kernels/test_triton.py tests/test_ops.py

gpu: test-gpu ## run those, then time the whole grid there; records go to the folder OUT
	mkdir -p -- "$$OUT"
	"$$PYTHON" -m cemb speed --grid original --device cuda --out="$$OUT/original.csv"
	"$$PYTHON" -m cemb bench --device cuda --out="$$OUT/gpu.jsonl"

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: $(STAMP) ## open the tour, and the notebooks beside it, in JupyterLab
	$(BIN)/jupyter lab notebooks/tour.ipynb

open: ## open the built site in a browser
	@"$$PYTHON" -c 'import pathlib, webbrowser; webbrowser.open(pathlib.Path("build/_build/html/index.html").resolve().as_uri())'

clean: ## remove the site and the caches; keeps the environment and results/
	rm -rf build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
