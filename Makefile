# Everything runs in .venv, which the first command makes. PYTHON: what it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: help demo test lint types sweep methods engines fidelity clean install

help: ## what can be made
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(STAMP) ## draw digits uncached and cached, side by side, into demo-output/
	$(BIN)/diffcache-fx demo

# A process for each core, one thread each; tests of one file share what they capture; files go in the order of
# tests/conftest.py.
test: $(TEST_STAMP) ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(TEST_STAMP) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers do not follow an editable install with package-dir: check an installed copy.
types: $(TEST_STAMP) ## mypy
	rm -rf build/types
	$(PIP) --no-deps --upgrade --target build/types .
	MYPYPATH=build/types $(BIN)/mypy -p diffcache_fx

sweep: $(TEST_STAMP) ## what takes long: the whole corpus under Inductor, what can be exported, the step; JSON in bench/results/
	mkdir -p bench/results
	$(BIN)/python -m bench.coverage --fresh
	$(BIN)/python -m bench.exports --fresh
	DIFFCACHE_FX_SWEEP=1 $(BIN)/python -m pytest --timeout 7200
	$(BIN)/python -m bench.step

methods: $(TEST_STAMP) ## every method on the demo model, quality against speed; hours, goes on where it was interrupted
	$(BIN)/python -m bench.methods

engines: $(TEST_STAMP) ## exported engines against uncached ones, in each runtime that is here
	$(BIN)/python -m bench.engines
	$(BIN)/python -m bench.full_size

fidelity: $(TEST_STAMP) ## quality against compute on both demo models, every method at equal budgets; many hours, goes on
	$(BIN)/python -m bench.fidelity
	$(BIN)/python -m bench.distances
	$(BIN)/python -m bench.block_caching
	$(BIN)/python -m bench.sampler

install: $(TEST_STAMP) ## the library, editable, with what the tests need

# torch first: what depends on it would pull another build of it.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) $(TORCH)
	$(PIP) -c constraints.txt -e .
	touch $@

$(TEST_STAMP): $(STAMP)
	$(PIP) -c constraints.txt -e '.[test]'
	touch $@

clean: ## remove what was made here, the virtual environment included
	rm -rf $(VENV) build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
