# Two commands for a newcomer: `make run` and `make test`. Each sets up .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR := runs/digits
CSRC := src/chtconv/sparse_compute/csrc
KERNEL_TESTS := $(addprefix tests/sparse_compute/test_,sparse_convolution.py blocked.py native_library.py)
SANITIZED := build/sanitized

.PHONY: help run test sanitize check format bench evidence tables clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard $(CSRC)/*.c $(CSRC)/*.h) $(CSRC)/../sources.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Waiting threads sleep instead of spinning: beside another busy process, spinning makes training many times slower.
run test sanitize: export OMP_WAIT_POLICY := PASSIVE

run: $(VENV)/.installed  ## train a sparse VGG16 on the embedded digits, about two minutes on 2 cores
	$(BIN)/chtconv train --out $(RUN_DIR) --overwrite

# A process a core, each with one thread of torch's: more would wait for each other.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.installed  ## the test suite
	$(BIN)/python -m pytest -n logical --dist worksteal

sanitize: $(VENV)/.installed  ## the tests of the compiled kernels, with gcc's checks of memory and undefined behaviour
	CHTCONV_BUILD_KERNELS=1 CC=gcc CFLAGS='-g -fsanitize=address,undefined -fno-sanitize-recover=undefined' \
		$(BIN)/python setup.py --quiet build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		CHTCONV_LIBRARY=$(SANITIZED)/chtconv/sparse_compute/_native.so $(BIN)/python -m pytest $(KERNEL_TESTS)

check: $(VENV)/.installed  ## lint, format, types and which package may use which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed  ## mend what lint and format can mend by themselves
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed  ## every benchmark, beside its baselines: three quarters of an hour on 2 quiet cores
	$(BIN)/python benchmarks/evolution.py
	$(BIN)/python benchmarks/link_prediction.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/distributed.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/sparse_compute.py
	$(BIN)/python benchmarks/training.py

evidence: $(VENV)/.installed  ## CIFAR-10 at width 0.25: days on 2 cores, resumable; see docs/evidence.md
	$(BIN)/chtconv compare experiments/screening.toml --jobs 2 --out runs/screening --results results/screening.jsonl
	$(BIN)/chtconv compare experiments/confirmation.toml --jobs 2 --optimizer-kernel fused --out runs/confirmation --results results/confirmation.jsonl
	$(BIN)/chtconv compare experiments/confirmation-smoothing.toml --jobs 2 --optimizer-kernel fused --out runs/confirmation-smoothing --results results/confirmation-smoothing.jsonl
	$(BIN)/chtconv compare experiments/confirmation-paper.toml --jobs 2 --optimizer-kernel fused --out runs/confirmation-paper --results results/confirmation-paper.jsonl
	$(BIN)/chtconv compare experiments/confirmation-density.toml --jobs 2 --optimizer-kernel fused --out runs/confirmation-density --results results/confirmation-density.jsonl
	$(BIN)/chtconv compare experiments/confirmation-density-90.toml --jobs 2 --optimizer-kernel fused --out runs/confirmation-density-90 --results results/confirmation-density-90.jsonl
	$(BIN)/chtconv compare experiments/confirmation-model.toml --jobs 2 --optimizer-kernel fused --out runs/confirmation-model --results results/confirmation-model.jsonl
	$(BIN)/python experiments/reach.py $(addprefix runs/confirmation,/ -smoothing -density -density-90 -model)
	$(BIN)/python experiments/gradient.py

tables: $(VENV)/.installed  ## the tables of the README and the docs, from results/
	$(BIN)/python experiments/tables.py

clean:  ## remove the environment and caches; runs stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info src/chtconv/sparse_compute/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
