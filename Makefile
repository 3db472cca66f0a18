# Sets up everything on a new machine. Requires only Python >= 3.11, make and a package index.
PYTHON ?= python3
METHOD ?= byol
DEMO := runs/demo$(if $(filter byol,$(METHOD)),,_$(METHOD))
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-fast test-newest lint format docs wheel clean

demo: $(STAMP)
	$(BIN)/python run_experiment.py --config=configs/$(METHOD).py:demo --workdir=$(DEMO)

# Whatever the shell says: else each process of the tests would compile all files of Python anew.
unexport PYTHONDONTWRITEBYTECODE

test: $(STAMP)
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP)
	$(BIN)/python -m pytest tests -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

# The fast tests on the newest versions; they need Python >= 3.12, such as NEWEST=python3.13.
NEWEST ?= python3.12
test-newest:
	$(MAKE) test-fast PYTHON=$(NEWEST) VENV=.venv-newest CONSTRAINTS=constraints-newest.txt

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in site/; every link and every name is checked.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The package, in dist/.
wheel: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*

# Rebuilds the environment when the declared dependencies change; otherwise reuses it.
$(STAMP): setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "error: Python 3.11 or newer is needed, this is %d.%d; try make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[test,docs]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-newest runs site build dist
