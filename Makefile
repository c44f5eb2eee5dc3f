# `make book` and `make test` do everything, the environment included. Nothing outside this folder is changed,
# except the caches of pip and of the downloaded model and text (~/.cache/iclgd, or $ICLGD_CACHE).
SHELL := /bin/sh
PY := .venv/bin/python
# Test workers are one thread each; waiting threads leave the cores to the others.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE ICLGD_RECORDS="$(CURDIR)/_build/test-records"
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout 600

.PHONY: help environment book pdf epub test refresh run sweep grid rehearse lab bench clean

help:
	@echo "make book      execute the notebooks and build the book: _build/html/index.html"
	@echo "make pdf       the book in one file, printed by Chromium; make epub: for reading devices"
	@echo "make test      check everything (notebooks at the smoke preset, then the unit tests)"
	@echo "make run       one notebook: make run NOTEBOOK=notebooks/50_prediction_alignment.ipynb ARGS='-p seed 3'"
	@echo "make sweep     the paper's model on the six tasks (MORE=--cost-only says the cost); ARGS='--preset paper --task cb' for other runs"
	@echo "make grid      the reproduction: what of results/ is not recorded (PLAN=confirmation: on new rows); ARGS='--cost-only' says the cost"
	@echo "make rehearse  the 1.3 B model's exact shape with random weights, all arms on a few rows (DTYPE=bfloat16)"
	@echo "make lab       open JupyterLab in the project's environment"
	@echo "make bench     measure speed and memory beside peers: _build/bench.json (leave the machine alone meanwhile)"
	@echo "make refresh   execute at the default preset and store the outputs in notebooks/"
	@echo "make clean     remove what was built (not the environment, not single runs)"

book: environment
	@$(PY) -m iclgd_helpers book

pdf: book
	@$(PY) -m tools.print_book pdf

epub: book
	@$(PY) -m tools.print_book epub

test: environment
	@rm -rf _build/smoke _build/test-records
	@$(PY) -m tools.notebooks smoke-copies _build/smoke
	@$(TEST_ENV) $(PY) -m pytest -q -rs -n 2 --dist loadscope --no-loadscope-reorder $(NBVAL) tests _build/smoke

refresh: environment
	@$(PY) -m tools.notebooks refresh

run: environment
	@$(PY) -m iclgd_helpers run "$$NOTEBOOK" $(ARGS)

PLAN := reproduction
grid: environment
	@$(PY) -m iclgd_helpers grid --plan $(PLAN) $(ARGS)

SIX_TASKS := $(foreach task,cb sst2 sst5 subj mr agnews,--task $(task))
sweep: environment
	@$(PY) -m iclgd_helpers grid $(or $(ARGS),--preset paper $(SIX_TASKS)) $(MORE)

# What a lab's first run on the paper's model will do, without its weights; time and memory: the status page.
DTYPE := float32
THREADS := 2
rehearse: environment
	@$(PY) -m iclgd_helpers grid --preset paper --model random-fairseq-dense-1.3B --task sst2 --threads $(THREADS) \
	  -p data_source $(if $(ICLGD_DATA),folder,generated) -p max_examples 8 -p dtype $(DTYPE) $(ARGS)

lab: environment
	@$(PY) -m jupyterlab

# Peers get an environment of their own, bench/.venv. ARGS: --without-peers, --only SECTION, --fresh, --store, --quick.
bench: environment
	@$(PY) -m bench $(ARGS)

clean:
	rm -rf _build

# The environment is made again when the folder moved or its versions changed, and from scratch when an earlier
# installation was interrupted. PYTHON=/path/to/python chooses the interpreter; of a virtual one, what it was made from.
# pip is silent unless it fails, so a dot every two seconds says that something happens; it ends with this shell.
PROBE := import sys, venv, ensurepip; print(sys._base_executable if (3, 11) <= sys.version_info < (3, 14) else "")
environment:
	@wanted="$$(pwd) $$(cat requirements.lock pyproject.toml | cksum)"; \
	if [ -x $(PY) ] && [ "$$(cat .venv/installed 2>/dev/null)" = "$$wanted" ]; then exit 0; fi; \
	set -e; \
	if [ -e .venv/installing ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  if [ -n "$$PYTHON" ]; then set -- "$$PYTHON"; else set -- python3.11 python3.12 python3.13 python3 python; fi; \
	  found=; \
	  for python do found=$$("$$python" -c '$(PROBE)' 2>/dev/null) && [ -n "$$found" ] && break || found=; done; \
	  if [ -z "$$found" ]; then \
	    echo "No Python 3.11, 3.12 or 3.13 (with venv) as $$*: install one, or name it: make PYTHON=/path/to/python" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making the environment in .venv with $$("$$found" --version) (about 2 GB, some minutes)"; \
	  rm -rf .venv; mkdir .venv; : > .venv/installing; "$$found" -m venv .venv; \
	else \
	  echo "Bringing the environment in .venv up to date"; \
	fi; \
	: > .venv/installing; rm -f .venv/installed; \
	printf "Installing the versions of requirements.lock "; \
	(while sleep 2 && kill -0 $$$$ 2>/dev/null; do printf .; done) & dots=$$!; \
	if $(PY) -m pip install -qq --disable-pip-version-check -r requirements.lock && \
	  $(PY) -m pip install -qq --disable-pip-version-check --no-deps -e .; \
	then status=0; else status=1; fi; \
	kill $$dots; echo; \
	[ $$status = 0 ] || exit 1; \
	echo "$$wanted" > .venv/installed; rm .venv/installing
