# Two commands matter: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test test-cluster test-rooms proof faults test-gpu lint audit clean
install: $(VENV)/installed

# torch first and alone: on a machine that offers a CPU build, whatever pulls torch before that brings CUDA.
$(VENV)/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

quickstart: install
	$(BIN)/gyre train recipes/quickstart.yaml

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two at a time, in halves of about equal length: tests that start clusters wait a good deal, others compute meanwhile.
test: install
	@echo "lint and tests, two at a time, each told when it has ended: about 20 minutes on two cores"
	$(MAKE) --no-print-directory --jobs 2 --keep-going --output-sync=target test-cluster lint test-rooms

# A test that fails is tried once more and named in the summary: real clusters on a busy machine.
PYTEST := $(BIN)/python -m pytest -m "not proof and not gpu and not faults" --reruns 1 -rR
CLUSTER_TESTS := tests/e2e tests/cluster/search \
	$(addprefix tests/cluster/test_,healing.py mlflow_server.py refresh.py session.py)

test-cluster: install
	$(PYTEST) $(CLUSTER_TESTS)

test-rooms: install
	$(PYTEST) tests $(addprefix --ignore ,$(CLUSTER_TESTS))

# The exhaustive matrices: world sizes x ZeRO stages x caching x queue; and the property tests on fresh examples.
proof: install
	$(BIN)/python -m pytest -m "not gpu and not faults" --hypothesis-profile fresh $$(grep -rl '^from hypothesis' tests --include 'test_*.py')
	$(BIN)/python -m pytest -m proof --timeout 3600

# One run on three nodes of this machine through 50 kills, another in 48 attempts with broken disks and clocks.
faults: install
	$(BIN)/python -m pytest -m faults -s --timeout 3600 tests/faults

test-gpu: install
	$(BIN)/python -m pytest -m gpu

# Known vulnerabilities of what the lock pins, as a report: it needs the package index, and its findings change by the day.
audit: install
	$(BIN)/pip-audit --requirement requirements.lock --no-deps --desc on || true

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis
