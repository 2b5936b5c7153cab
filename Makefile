# Two commands for a new user: `make demo` and `make test`. Each makes .venv when it is not there.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
# One thread for each worker; compiled files are kept, since each worker and each fresh interpreter reads them again.
TESTS := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1
FUZZ := tests/checkpoint/test_fuzz.py tests/cli/test_recipe_fuzz.py tests/legacy/test_pickle_fuzz.py

.PHONY: setup demo test test-all test-faults fuzz docs lint types dist-test clean

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[all]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no train_accelerate.py

# Two workers of one thread each. The markers of pyproject.toml say what is left out here and run by `make test-all`.
test: $(STAMP)
	$(TESTS) $(BIN)/python -m pytest -n 2 --dist loadfile

# All but the trainings that are killed for a quarter of an hour, and the inputs of `make fuzz`; a test that needs a
# browser is skipped without one.
test-all: $(STAMP)
	$(TESTS) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not faults and not fuzz"

# Trainings killed at every stage of their writing and at sixty random moments, the notebook, and all combinations of
# faults: about twenty minutes.
test-faults: $(STAMP)
	$(TESTS) $(BIN)/python -m pytest -n 2 -m faults

# 25,000 damaged configs, weights, plans, processors, recipes and old checkpoints: about twenty minutes.
fuzz: $(STAMP)
	$(TESTS) ISOPRUNE_FUZZ=10000 $(BIN)/python -m pytest -s -m fuzz $(FUZZ)

# The site, into build/site, with no network; a broken link or reference is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(STAMP)
	$(BIN)/mypy

# The wheel with the packages of .venv, in another environment; with CLEAN=1 everything is downloaded anew (6 GB).
dist-test: $(STAMP)
	.ci/dist $(BIN)/python

clean:
	rm -rf .venv output build *.egg-info
