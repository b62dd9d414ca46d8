# Every target builds .venv first where it is missing or older than requirements.lock or pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check check-types check-rest format lock clean

help:  ## show this list
	@awk -F ':.*##' '/^[.a-z]+:.*##/ { printf "  make %-8s%s\n", $$1, $$2 }' Makefile

.venv: $(STAMP)  ## build the environment (PYTHON=python3.12 chooses the interpreter)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "fedpeat needs Python 3.11 or newer, got %d.%d; name another one: make PYTHON=python3.12" % v[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)  ## tune the bundled model on this Python's own source, offline, and write a report
	$(BIN)/fedpeat run examples/demo.yaml --overwrite

test: $(STAMP)  ## run the tests, offline, on all cores (PYTEST="-k wire -x" adds options)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder $(PYTEST)

check: $(STAMP)  ## check format, style, types, layers and spelling
	@$(MAKE) --no-print-directory --keep-going --jobs 2 check-types check-rest

check-types: $(STAMP)  # takes as long as all the rest, and runs beside it
	$(BIN)/mypy

check-rest: $(STAMP)
	$(BIN)/ruff format --check --output-format concise .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/codespell

format: $(STAMP)  ## format the code and mend what can be mended safely
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lock:  ## choose the versions in requirements.lock anew (needs the network and Python 3.11)
	@$(PYTHON) scripts/lock.py > requirements.lock.new || { rm -f requirements.lock.new; exit 1; }
	mv requirements.lock.new requirements.lock

clean:  ## remove the environment, caches and builds; runs stay
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .coverage
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
