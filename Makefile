# make quickstart   install, then train on real data for a minute or two
# make test         install, then run the tests
# make lint         ruff and mypy
# make docs         pages that are printed from the code

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint docs clean

quickstart: $(VENV)/installed
	$(BIN)/deepspeed refiner_ds/train.py

test: $(VENV)/installed-test
	$(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/python -m refiner_ds.config > docs/run_file.md

clean:
	rm -rf $(VENV) build *.egg-info

# Installed again only when what is installed has changed.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-test: pyproject.toml $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@
