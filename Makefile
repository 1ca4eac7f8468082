# Sitter: `make` alone lists what there is.
SHELL := /bin/sh
VENV  := .venv
BIN   := $(VENV)/bin
# More arguments for the program of a target: make test ARGS="-k floors"
ARGS  ?=
# Processes of `make test`; each has its own PostgreSQL and its own servers.
JOBS  ?= 2
# How many times what `make test` does of it `make chaos` and `make fuzz` do: 25 workers killed, say, make 500.
SCALE ?= 20

# The first Python that runs and is new enough.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# PyPI's torch for Linux brings gigabytes of CUDA libraries: without an NVIDIA driver take the CPU wheel.
# `make setup TORCH_INDEX=` always takes the default wheel.
CPU_INDEX   := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(shell [ "$$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null 2>&1 || echo $(CPU_INDEX))

PIP   := python -m pip --disable-pip-version-check
TORCH  = $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help setup run test chaos fuzz lint bench bench-engine bench-train bench-gpu demo-model lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/setup.stamp ## create .venv and install what the service needs

run: $(VENV)/setup.stamp ## start the service (HOST, PORT and every other setting come from the environment)
	@exec $(BIN)/sitter serve $(ARGS)

test: $(VENV)/dev.stamp ## run every test, in JOBS=2 processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile $(ARGS)

chaos: $(VENV)/dev.stamp ## kill, stop and starve servers and workers for an hour, SCALE=20 times what `make test` does; train the bundled model, tiny
	CHAOS_SCALE=$(SCALE) $(BIN)/python -m pytest tests/chaos tests/training/test_make.py $(ARGS)

fuzz: $(VENV)/dev.stamp ## send requests, photos and models of all kinds, right and wrong, SCALE=20 times what `make test` does
	FUZZ_SCALE=$(SCALE) $(BIN)/python -m pytest tests/e2e/test_openapi_fuzz.py tests/domain/test_photos.py \
		tests/engine/test_uploaded_fuzz.py $(ARGS)

lint: $(VENV)/dev.stamp ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/dev.stamp ## measure; writes docs/benchmarks.md
	$(BIN)/python -m bench $(ARGS)

bench-engine: $(VENV)/dev.stamp ## compare with other ways of serving many users' models; a quarter of an hour
	$(BIN)/python -m bench engine $(ARGS)

bench-train: $(VENV)/dev.stamp ## train ten people never seen, and judge them; a quarter of an hour
	$(BIN)/python -m bench train $(ARGS)

bench-gpu: $(VENV)/setup.stamp ## measure on a GPU, with random weights of Stable Diffusion 1.5's size; eight minutes
	$(BIN)/python -m bench.gpu $(ARGS)

demo-model: $(VENV)/training.stamp ## make models/demo anew (hours on a CPU)
	$(BIN)/python -m training.make $(ARGS)

lock: $(VENV)/python.stamp ## renew constraints.txt from a fresh environment
	rm -rf .lock && $(PYTHON) -m venv .lock
	.lock/bin/$(PIP) install --no-deps --retries 2 --extra-index-url $(CPU_INDEX) $(TORCH)
	.lock/bin/$(PIP) install -e '.[dev,training]'
	{ echo '# The lock of all extras, made by `make lock`.'; \
	  .lock/bin/$(PIP) freeze --all --exclude pip --exclude-editable | sed 's/+cpu$$//'; } > constraints.txt.part
	mv constraints.txt.part constraints.txt && rm -rf .lock

clean: ## remove the environment and every cache
	rm -rf $(VENV) .lock .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/python.stamp:
	@[ -n "$(PYTHON)" ] || { echo 'Sitter needs Python 3.11 or newer. Install it, or say where it is: make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo '$(PYTHON) is missing or older than Python 3.11. Say where a newer one is: make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo '$(PYTHON) cannot make a virtual environment. On Debian or Ubuntu: sudo apt install python3-venv'; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch goes first and alone, from its own index; everything else then finds it already there.
$(VENV)/setup.stamp: $(VENV)/python.stamp pyproject.toml constraints.txt
	$(BIN)/$(PIP) install --no-deps $(if $(TORCH_INDEX),--retries 2 --extra-index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/$(PIP) install -c constraints.txt -e .
	@touch $@

# The tests of training/ draw with its renderer.
$(VENV)/dev.stamp: $(VENV)/setup.stamp
	$(BIN)/$(PIP) install -c constraints.txt -e '.[dev,training]'
	@touch $@

$(VENV)/training.stamp: $(VENV)/setup.stamp
	$(BIN)/$(PIP) install -c constraints.txt -e '.[training]'
	@touch $@
