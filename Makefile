# Each target sets up `.venv` by itself and uses it again while the pins stand.
PYTHON ?= python3
BIN := .venv/bin
# The tests start Python hundreds of times: what is compiled is kept, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint

demo: .venv/ready
	@$(BIN)/fwd demo

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Without build isolation the build back end is a pinned package like all others.
.venv/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt hatchling
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test,bench]'
	@touch $@
