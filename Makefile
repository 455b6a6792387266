# make quickstart   install, then train on real data for a minute or two
# make test         install, then run the tests
# make lint         ruff and mypy
# make docs         pages that are printed from the code
# make gpu          on a GPU: tests of its kernels, then what docs/benchmarks.md wants to know; kept in gpu.log

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint docs gpu clean

quickstart: $(VENV)/installed
	$(BIN)/deepspeed refiner_ds/train.py

test: $(VENV)/installed-test
	$(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/python -m refiner_ds.config > docs/run_file.md

BENCHMARK := $(BIN)/python -m refiner_ds.benchmark

gpu: $(VENV)/installed-test
	{ $(BIN)/python -m pytest -m gpu tests/attention/fused; \
	  $(BENCHMARK) kernels; $(BENCHMARK) kernels --heads 16; $(BENCHMARK) kernels --heads 16 --tokens 785 --batch 8; \
	  $(BENCHMARK) attention --dtype bf16 --batch 64; $(BENCHMARK) attention --dtype bf16 --heads 16 --tokens 197 785; \
	  $(BENCHMARK) model --dtype bf16 --compile --batch 128; \
	  $(BENCHMARK) model --dtype bf16 --compile --batch 64 --model refiner_vit_l; \
	  $(BENCHMARK) model --dtype bf16 --compile --batch 8 --model refiner_vit_l --img-size 448 --largest 130; \
	} 2>&1 | tee gpu.log

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
