# Every target makes what it needs: a virtual environment in .venv, from PYTHON (3.9 or newer).
#   make demo     several real agents at once, shown live, nothing left behind
#   make test     all tests on this Python, two files at a time (WORKERS; tox: on every Python installed, one at a time)
#   make lint     ruff and mypy --strict
#   make chaos    three minutes of SIGKILLs, stops, cuts and full disks; everything is accounted for (CHAOS_SECS, CHAOS_SEED)
#   make bench    speed and size, each figure beside its raw limit
#   make lines    files by size, functions by length, and what has outgrown
#   make single   dist/agentserver.pyz: server, client and library in one file
#   make clean    remove all that the above have made

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
CHECKED := agentserver examples tests tools setup.py $(wildcard bench)

.PHONY: demo test chaos lint lint-here bench lines single clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

chaos: $(READY)
	$(BIN)/python tests/chaos/run.py $(ARGS)

lint: $(READY)
	$(MAKE) --no-print-directory lint-here PYTHON=$(BIN)/python

lint-here:
	$(PYTHON) -m ruff check --line-length 120 --target-version py39 --select E,F,W,I,B,PLE --ignore B023 $(CHECKED)
	$(PYTHON) -m mypy --strict --python-version 3.10 agentserver examples tools

bench: $(READY)
	$(BIN)/python bench/run.py $(ARGS)

lines:
	@$(PYTHON) tools/lines.py $(ARGS)

single: dist/agentserver.pyz

dist/agentserver.pyz: tools/single.py $(shell find agentserver -name '*.py')
	$(PYTHON) tools/single.py $@

$(READY): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9) and "agentserver needs Python 3.9 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; say which to use: make PYTHON=/path/to/python3")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) .node examples/javascript/node_modules .tox .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
