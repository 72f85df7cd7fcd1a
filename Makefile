# make demo | test | lint | bench | lab | clean. Needs git, make and Python 3.11 or later; everything else goes into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DELETE_ON_ERROR:
.PHONY: install demo test lint bench lab clean

install: $(READY)

# Pinned by constraints.txt, build tools included; once made, nothing below needs the network.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"sparkctl needs Python 3.11 or later, found {sys.version.split()[0]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[node,dev]'
	@touch $@

demo: $(READY)
	$(BIN)/sparkctl demo

# Two simulated hosts need root, and packages of Debian's that are installed on first use; without root those tests are left out.
test: $(READY)
	@if [ "$$(id -u)" = 0 ]; then sh tests/lab/install.sh tests/packages.txt; fi
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	@for name in start load finetune serve transfer up faults; do echo "== $$name"; $(BIN)/python -m tests.benchmarks.$$name 2>/dev/null || exit 1; done

lab: $(READY)
	@sh tests/lab/install.sh
	$(BIN)/python -m tests.lab --bind $(CURDIR)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache
