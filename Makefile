# make quickstart    install, then train on real data for a minute or two
# make test          install, then run the tests, four at a time
# make test-long     the long forms of what those test in short: more launchers, more faults, a whole training
# make test-fast     the tests of the inner loop: nothing that starts a launcher, a Slurm or a long computation
# make test-isa      the operator's tests as on a CPU without AVX-512 and bf16 instructions
# make lint          what .pre-commit-config.yaml lists: ruff, codespell, mypy
# make docs          pages that are printed from the code
# make test-newest   the tests with the newest versions that pyproject.toml allows, in an environment of their own
# make lock          writes that environment's versions to constraints.txt
# make drill         kills, stops, damages and poisons a run for an hour at most; writes docs/reliability.md
# make drill-slurm   faults on a Slurm of its own while two nodes train, for ten minutes; prints a row a fault
# make gpu           on a GPU: tests, kernels, models, training, loader, annotator in one report, gpu_report/report.md;
#                    nine minutes, or an hour with GPU=--long
# make compiled      which kernels spill registers on which card, for S at 224; needs no GPU, takes minutes

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCKED ?= -c constraints.txt
JOBS ?= 4
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-long test-fast test-isa test-newest lock lint docs drill drill-slurm gpu compiled clean

quickstart: $(VENV)/installed
	$(BIN)/deepspeed refiner_ds/train.py

test: $(VENV)/installed-test
	$(PYTEST) -m "not long" $(TESTS)

test-long: $(VENV)/installed-test
	$(PYTEST) -m long $(TESTS)

test-fast: $(VENV)/installed-test
	$(PYTEST) -m "not slow and not slurm and not long" $(TESTS)

test-newest:
	$(MAKE) test VENV=.venv-newest LOCKED=--upgrade

lock:
	versions=$$(.venv-newest/bin/python -m pip freeze --all --exclude-editable) && \
	{ echo '# Versions known to pass the tests, which `make` installs. `make test-newest lock` writes this file anew.'; \
	  printf '%s\n' "$$versions" | grep -v '^pip=='; } > constraints.txt

# The kernels' tests are left out: Triton's interpreter multiplies by itself. Inductor gets a cache of its own: tests call it
# directly, and it would take code generated for longer vectors from the usual one, and compute half of every tensor.
test-isa: $(VENV)/installed-test
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/inductor-avx2 \
	    $(PYTEST) --ignore=tests/attention/triton tests/attention tests/models/test_mlp.py tests/models/test_precision.py

lint: $(VENV)/installed-test
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pre-commit run --all-files

docs: $(VENV)/installed
	page=$$($(BIN)/python -m refiner_ds.config) && printf '%s\n' "$$page" > docs/run_file.md

drill: $(VENV)/installed-test
	$(BIN)/python -m tests.drill --events 100 --minutes 60 --report docs/reliability.md

drill-slurm: $(VENV)/installed-test
	$(BIN)/python -m tests.launch.drills

BENCHMARK := $(BIN)/python -m refiner_ds.benchmark

gpu: $(VENV)/installed-test
	$(BENCHMARK) gpu $(GPU)

compiled: $(VENV)/installed-test
	$(BENCHMARK) compiled --models S --sizes 224

clean:
	rm -rf $(VENV) .venv-newest build *.egg-info

# Installed again only when what is to be installed has changed.
$(VENV)/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(LOCKED) -e ".[train]"
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(INSTALL) $(LOCKED) -e ".[test]"
	touch $@
