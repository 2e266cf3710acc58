# make sample | test | test-slow | bench | lint | format
# Each makes the environment .venv first: with uv, or with pip where uv cannot be had.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: sample test test-slow bench lint format

sample: .venv/.ready
	@$(BIN)/python sample.py --out out/sample.png

test: lint
	$(PYTEST) -m "not slow"

test-slow: .venv/.ready
	$(PYTEST) -m slow --durations 10

bench: .venv/.ready
	$(BIN)/python -m benchmarks

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/.ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or later found: install one, or set PYTHON" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || \
		{ rm -rf .venv; echo "make: $(PYTHON) cannot make an environment (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@PATH="$$PATH:$(CURDIR)/$(BIN)"; \
	command -v uv >/dev/null || $(BIN)/python -m pip install --quiet uv || true; \
	uv pip install --python $(BIN)/python -e ".[test]" || $(BIN)/python -m pip install -e ".[test]"
	@touch $@
