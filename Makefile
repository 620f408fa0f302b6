# These commands install what they need; they require git, make and Python >= 3.11:
#   make demo       trains on real data and shows that the library works
#   make test       runs the tests, or those named by TESTS="FILE ..."; with LEVEL=gate,
#                   it runs all tests of the gate (see BUILD.md)
#   make test_all   runs all tests, also those marked as slow
#   make lint       checks style and types
#   make docs       builds the documentation into docs/_build/html
# PYTHON=python3.12 make test chooses the interpreter.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && echo $$p && break; done)
VENV ?= .venv
TAG := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
BIN := $(VENV)/bin
# Stamp files record what is installed for which interpreter. They are out of date if
# setup.py is newer.
CREATED := $(VENV)/.python-$(TAG)
DEMO := $(VENV)/.demo-$(TAG)
TEST := $(VENV)/.test-$(TAG)
DOCS := $(VENV)/.docs-$(TAG)
LEVEL = quick
PYTEST = $(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder
# Python compiles what it imports, so pip need not compile every file. setuptools warns
# of every editable installation.
INSTALL = PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-compile --editable

.PHONY: demo install install_all test test_all lint docs clean
.DELETE_ON_ERROR:

demo: $(DEMO)
	$(BIN)/python -m experiments.digits_noise

install: $(TEST)

# One call of pip for tests and documentation is faster than two.
install_all: | $(CREATED)
	$(INSTALL) '.[test,docs]'
	@touch $(TEST) $(DOCS)

test: $(TEST)
	$(PYTEST) --level=$(LEVEL) $(TESTS)

test_all: $(TEST)
	$(PYTEST) --level=all $(TESTS)

lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS)
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs docs/_build/html

$(CREATED):
	@test -n "$(TAG)" || { echo "error: no Python >= 3.11 found; name one: PYTHON=/path/to/python make" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@touch $@

$(DEMO): setup.py | $(CREATED)
	$(INSTALL) '.[experiments]'
	@touch $@

$(TEST): setup.py | $(CREATED)
	$(INSTALL) '.[test]'
	@touch $@

$(DOCS): setup.py | $(CREATED)
	$(INSTALL) '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) docs/_build
