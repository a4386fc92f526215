# make demo      generate the demo images with the miniature, into demo/
# make test      run the tests, one process per core (13 min on 2 cores, 17 with Chromium)
# make test-lowest  run the tests with the lowest versions that pyproject.toml allows (needs uv)
# make quality   lint, format check, types
# make docs      build the documentation site into site/
# make lock      resolve requirements.lock for the oldest supported Python (needs uv)
# make clean     remove the virtual environment and generated files

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# A copy of the installed lock file: pip runs again only when requirements.lock has changed.
STAMP  := $(VENV)/installed.lock

.PHONY: demo test test-lowest quality docs lock clean
.DEFAULT_GOAL := demo

$(STAMP): requirements.lock
	@if ! cmp -s requirements.lock $@; then set -e; \
	  $(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or later is needed: make PYTHON=python3.11 ...")'; \
	  test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements.lock; \
	  $(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	  cp requirements.lock $@; \
	fi
	@touch $@

demo: $(STAMP)
	$(BIN)/pulid demo -o demo

# One thread per process: more would compete for the cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-lowest:
	uv venv --quiet --python 3.10 .venv-lowest
	uv pip compile pyproject.toml --extra dev --resolution lowest-direct --python-version 3.10 \
	  --python-platform x86_64-manylinux_2_28 --only-binary :all: --no-annotate --no-header --quiet \
	  -o .venv-lowest/requirements.txt
	uv pip install --quiet --python .venv-lowest/bin/python --no-deps -r .venv-lowest/requirements.txt
	uv pip install --quiet --python .venv-lowest/bin/python --no-deps --no-build-isolation -e .
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict

lock:
	uv pip compile pyproject.toml --extra dev --python-version 3.10 --python-platform x86_64-manylinux_2_28 \
	  --only-binary :all: --no-annotate --no-header --quiet -o requirements.lock

clean:
	rm -rf $(VENV) .venv-lowest demo site
