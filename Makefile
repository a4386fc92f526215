# make demo      a person nobody trained on, from one picture into several new ones (pictures in demo/)
# make test      the tests
# make quality   lint, format, types
# make lock      resolve requirements.lock afresh (needs uv; the oldest Python decides, so that one file serves all)

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# A copy of the lock that was installed: a changed lock installs again, anything else never does.
STAMP  := $(VENV)/installed.lock

.PHONY: demo test quality lock clean
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

test: $(STAMP)
	$(BIN)/python -m pytest

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock:
	uv pip compile pyproject.toml --extra dev --python-version 3.10 --python-platform x86_64-manylinux_2_28 \
	  --only-binary :all: --no-annotate --no-header --quiet -o requirements.lock

clean:
	rm -rf $(VENV) demo
