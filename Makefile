# ParamMap. `make help` lists the targets.

# the first Python that is new enough; 3.11 before others, for it has wheels of all that the tests need
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3 python; do $$python -c \
  'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV   := .venv
RUN    := $(VENV)/bin/python
PIP    := $(VENV)/bin/pip install --quiet --disable-pip-version-check
# what stands in .venv: ParamMap and numpy; or all that the demo and the tests need
LIGHT  := $(VENV)/.light
READY  := $(VENV)/.ready

# make convert IN=… OUT=… TO=mindspore TP=8 PP=4 … : sizes and flags of `parammap convert`
TO      ?= mindspore
WORKERS ?= 2
SIZES   := $(foreach size,TP PP VPP EP ETP DP CP,$(if $($(size)),--$(shell echo $(size) | tr A-Z a-z) $($(size))))
SIZES   += $(if $(STAGE_LAYERS),--stage-layers $(STAGE_LAYERS))

# a file's tests stay together, for the runs and checkpoints that they share
PARALLEL := -n 2 --dist loadfile

.PHONY: help setup convert demo test test-full fuzz crash coverage bench bench-megatron bench-metaseq plan-scale patches check lint clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv with everything that the demo and the tests need (once)

$(RUN):
	$(or $(PYTHON),$(error no Python from 3.11 on was found; install one, or name it: PYTHON=…)) -m venv $(VENV)

$(LIGHT): pyproject.toml | $(RUN)
	$(PIP) -e .
	touch $@

$(READY): pyproject.toml constraints.txt | $(RUN)
	$(PIP) -c constraints.txt -e '.[dev]'
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) -c constraints.txt \
	  --no-build-isolation deepspeed  # its build asks the torch that is installed
	touch $(LIGHT) $@

convert: $(if $(IN),$(LIGHT),$(READY))  ## convert IN=… to OUT=… for TO=…; without IN, the demo
ifdef IN
	$(RUN) -m parammap convert $(IN) $(or $(OUT),$(error name the folder to make: OUT=…)) --to $(TO) \
	  --workers $(WORKERS) $(SIZES) $(FLAGS)
else
	$(RUN) -m examples.demo .cache/demo --workers $(WORKERS) $(SIZES)
endif

demo: $(READY)  ## train a tiny Megatron model, convert it, compare what MindSpore loads with the live state
	$(RUN) -m examples.demo .cache/demo --workers $(WORKERS)

test: $(READY)  ## the tests
	@status=0; $(RUN) -m pytest -m "not full and not alone" $(PARALLEL) || status=$$?; \
	$(RUN) -m pytest -m "alone and not full" || status=$$?; exit $$status

test-full: $(READY)  ## all tests, with the matrix of Megatron releases
	@status=0; $(RUN) -m pytest -m "not alone" $(PARALLEL) || status=$$?; \
	$(RUN) -m pytest -m alone || status=$$?; exit $$status

SECONDS ?= 600
fuzz: $(READY)  ## damaged and hostile files for every format and every reader, for SECONDS=600
	$(RUN) -m tests.fuzz --seconds $(SECONDS)

crash: $(READY)  ## kill conversions, and let the disk fail, at each call that changes the disk
	$(RUN) -m tests.support.crash

coverage: $(READY)  ## which lines the quick tests run
	$(RUN) -m coverage run -m pytest -m "not full" && $(RUN) -m coverage combine && $(RUN) -m coverage report

bench:  ## all measurements, one after the other: the three that follow
	$(MAKE) --no-print-directory --keep-going -j1 bench-megatron bench-metaseq plan-scale

bench-megatron: $(READY)  ## Megatron-LM to MindSpore, back and to another layout, beside cp and the way it is done today
	$(RUN) -m bench.run

bench-metaseq: $(READY)  ## OPT from Metaseq to Alpa, beside cp and the way it is done today
	$(RUN) -m bench.metaseq

plan-scale: $(READY)  ## time and memory of planning 175B, 1T and OPT-175B, from metadata alone
	@status=0; for plan in plan_scale plan_opt175b; do $(RUN) -m bench.$$plan || status=1; done; exit $$status

patches: $(READY)  ## write patches/ anew from hooks/
	$(RUN) patches/make_patches.py

check: lint  ## ruff, types, and the tests of small parts: what to run before each commit
	$(VENV)/bin/mypy
	$(RUN) -m pytest tests/unit -m "not full" $(PARALLEL)

lint: $(READY)  ## ruff
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

clean:  ## remove what was trained, fetched and converted here, and the environment
	rm -rf .cache $(VENV)
