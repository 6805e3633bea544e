# Everything sets itself up in .venv; a fresh machine needs Python 3.11 or newer and make.
#   make demo       the first paper's figure, then a small language model (two minutes after set-up)
#   make test       lint, types, all tests, notebooks
#   make test-fast  the tests without those marked slow and without the examples of the docstrings
#   make lint       ruff and pyright
#   make benchmark  the speed tables, a report and a picture of all targets (long)

.PHONY: demo test test-fast lint benchmark
.DEFAULT_GOAL := demo

BIN := .venv/bin
READY := .venv/.ready
WORKERS := 2
# Each worker begins with a half of the files, so that what a file caches is computed by one worker.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# The newest Python that can make an environment: a name on the PATH may be a shim that does not run.
$(READY): pyproject.toml
	@for python in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	    $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	    python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "jtrunc needs Python 3.11 or newer with the venv module (Debian: apt install python3-venv)" >&2; exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ]; then echo "Making .venv with $$($$python --version)"; $$python -m venv .venv; fi
	@echo "Installing jtrunc and what its tests need into .venv (once; some minutes)"
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@$(BIN)/python -m pip install --quiet --editable ".[experiments]" --group dev
	@touch $@

demo: $(READY)
	@$(BIN)/python -m jtrunc.cli demo

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/pyright

test: lint
	@$(PYTEST) tests jtrunc

test-fast: $(READY)
	@$(PYTEST) -m "not slow" tests

benchmark: $(READY)
	@$(BIN)/python benchmarks/speed/run_all.py
