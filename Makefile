# Two commands for a newcomer: `make run` and `make test`. Each sets up .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR := runs/digits

.PHONY: help run test check format bench evidence tables clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Waiting threads sleep instead of spinning: beside another busy process, spinning makes training many times slower.
run test: export OMP_WAIT_POLICY := PASSIVE

run: $(VENV)/.installed  ## train a sparse VGG16 on the embedded digits, about two minutes on 2 cores
	$(BIN)/chtconv train --out $(RUN_DIR) --overwrite

test: $(VENV)/.installed  ## the test suite
	$(BIN)/python -m pytest

check: $(VENV)/.installed  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed  ## mend what lint and format can mend by themselves
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed  ## every benchmark, beside its baselines: half an hour on 2 quiet cores
	$(BIN)/python benchmarks/evolution.py
	$(BIN)/python benchmarks/link_prediction.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/distributed.py
	$(BIN)/python benchmarks/checkpoint.py

evidence: $(VENV)/.installed  ## CIFAR-10 at width 0.25: hours on 2 cores, resumable; see experiments/
	$(BIN)/python experiments/evidence.py

tables: $(VENV)/.installed  ## the tables of the README and the docs, from results/
	$(BIN)/python experiments/tables.py

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
