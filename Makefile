# Two commands matter: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test proof test-gpu lint clean
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

test: lint
	$(BIN)/python -m pytest -m "not proof and not gpu"

# The exhaustive matrices: world sizes x ZeRO stages x caching x queue; and the property tests on fresh examples.
proof: install
	$(BIN)/python -m pytest -m "not gpu" --hypothesis-profile fresh $$(grep -rl '^from hypothesis' tests --include 'test_*.py')
	$(BIN)/python -m pytest -m proof --timeout 3600

test-gpu: install
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis
