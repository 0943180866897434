# make setup | train | test | test-system | smoke | lint | fabric-campaign. Every target prepares .venv on its first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.PHONY: setup train test test-system smoke lint fabric-campaign clean
setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[hf,deepspeed,mpi,report,dev]'
	touch $@

train: $(READY)
	$(BIN)/mega train configs/quickstart.toml --ranks 2 $(ARGS)

smoke: $(READY)
	$(BIN)/mega smoke $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

# A part of `test`: SLURM, MPI and torchrun jobs on hosts made of network namespaces (needs root), kills, faults.
test-system: $(READY)
	$(BIN)/python -m pytest tests/system $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# About an hour: seeded faults on hosts made of network namespaces (needs root), each diagnosed, and the verdicts scored.
fabric-campaign: $(READY)
	$(BIN)/python benchmarks/fabric_campaign.py $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
