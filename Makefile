# Everything runs in .venv, which `make env` builds on a machine with only Python 3.11 (3 minutes, 3.1 GB).
PYTHON ?= $(shell command -v python3.11 || echo python3)
# Name the build where pip has more than one to offer, for example TORCH=torch==2.13.0+cpu.
TORCH ?= torch==2.13.0
# Further arguments for `make demo`, as in `make demo ARGS="runner.seed=1"`.
ARGS ?=
# Further arguments for pytest, as in `make test PYTEST="-k recipe"`.
PYTEST ?=

BIN := .venv/bin
# -qq: errors only, progress is told by the echo lines.
PIP = $(BIN)/python -m pip install --disable-pip-version-check -qq
# Written last: an interrupted install leaves no stamp, and the next make goes through it again.
ENV := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help env demo test test-mace-only test-fairchem-only test-nequip test-schnet test-cuda test-slow check examples list-examples coverage mutants docs \
        wheel bench evidence bench-cuda data clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

env: $(ENV)  ## build .venv: torch, fairchem, SevenNet, CHGNet, MACE, this package

# torch goes first so that nothing else picks its build. mace-torch goes last and without dependencies: it
# pins an e3nn that fairchem cannot use, and pip would call that a conflict on later installs.
$(ENV): Makefile setup.cfg pyproject.toml requirements/families.txt
	$(PYTHON) -m venv .venv
	@echo "installing torch (1/3)"
	@$(PIP) "$(TORCH)"
	@echo "installing fairchem, SevenNet, CHGNet and this package (2/3)"
	@$(PIP) -r requirements/families.txt -e '.[dev]'
	@echo "installing MACE (3/3)"
	@$(PIP) --no-deps mace-torch==0.3.16
	@touch $@

# An extra that only some targets need: .venv/.extra-docs, .venv/.extra-bench, .venv/.extra-data.
.venv/.extra-%: $(ENV)
	@echo "installing the $* extra"
	@$(PIP) -e '.[$*]'
	@touch $@

demo: $(ENV)  ## repair a MACE model of aspirin, on a CPU
	$(BIN)/stable-plugin train recipes/aspirin_mace.yaml $(ARGS)

test: $(ENV)  ## run the tests
	$(BIN)/python -m pytest -q -m "not slow" $(PYTEST)

# Results of what takes too long for every change are kept in docs/quality: `make test-slow coverage mutants`.
test-slow: $(ENV)  ## run the tests that take long: real runs, killed and gone on with
	mkdir -p build
	$(BIN)/python -m pytest -q -m slow --junit-xml=build/slow.xml $(PYTEST); \
	  result=$$?; $(BIN)/python .ci/record.py slow build/slow.xml; exit $$result

# The folders of the core: integrations, families and evaluation are tested through whole trainings, which are too long to
# be measured.
CORE_TESTS := tests/algorithm tests/detectors tests/md tests/observables tests/runtime tests/test_config.py tests/test_defaults.py

coverage: $(ENV)  ## measure which branches of the core tests go through; fails below 95 %
	mkdir -p build
	$(BIN)/python -m coverage run -m pytest -q -m "not slow" $(CORE_TESTS)
	$(BIN)/python -m coverage json -q --fail-under=0 -o build/coverage.json
	$(BIN)/python .ci/record.py coverage build/coverage.json
	$(BIN)/python -m coverage report --skip-covered

mutants: $(ENV)  ## change single operations of the core and see whether tests notice; fails below 85 %
	rm -rf mutants
	$(BIN)/python -m mutmut run --max-children 2
	$(BIN)/python -m mutmut results --all true > build/mutants.txt
	$(BIN)/python .ci/record.py mutants build/mutants.txt

# Each family without the other, as a user of only one has it: an environment of its own, beside .venv.
.venv-%/.installed: Makefile setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-$*
	@echo "installing torch and the $* extra"
	@.venv-$*/bin/python -m pip install --disable-pip-version-check -qq "$(TORCH)"
	@.venv-$*/bin/python -m pip install --disable-pip-version-check -qq -e '.[$*,dev]'
	@touch $@

# SchNetPack 2.2 needs a newer Python than the rest.
.venv-schnet/.installed: PYTHON = $(shell command -v python3.12 || echo python3)

test-mace-only: .venv-mace/.installed  ## run the tests without fairchem
	.venv-mace/bin/python -m pytest -q -m "not slow"

test-nequip: .venv-nequip/.installed  ## run NequIP's tests in an environment of its own
	.venv-nequip/bin/python -m pytest -q tests/models/nequip

test-schnet: .venv-schnet/.installed  ## run SchNetPack's tests in an environment of its own
	.venv-schnet/bin/python -m pytest -q tests/models/schnet

test-fairchem-only: .venv-fairchem/.installed  ## run the tests without MACE
	.venv-fairchem/bin/python -m pytest -q -m "not slow"

check: $(ENV)  ## lint, formatting, types, docstrings, spelling, import contracts, documentation, wheel, examples
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python .ci/docstrings.py src
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(MAKE) docs wheel examples

# What users copy: examples in docstrings, Python on pages, and every recipe in its small form.
EXAMPLES := tests/docs tests/integrations/recipes/test_recipes.py

examples: $(ENV)  ## run the examples in docstrings, README and documentation, and every recipe in miniature
	$(BIN)/python -m pytest -q $(EXAMPLES)

list-examples:
	@echo $(EXAMPLES)

docs: .venv/.extra-docs  ## build the documentation into docs/_build
	rm -rf docs/api/generated
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build

# The wheel goes into an environment of its own, in which only the dependencies are those of .venv: Python reads no
# .pth file of a folder that a .pth file names, so the checkout that .venv points to is out of sight, and -I keeps out the
# current folder and PYTHONPATH. Downloading torch and the families again would tell nothing more about the wheel.
wheel: $(ENV)  ## build sdist and wheel, install the wheel into a clean environment, import every module
	rm -rf build/clean build/lib build/bdist.* dist
	$(BIN)/python -m build -o dist > /dev/null
	$(PYTHON) -m venv --without-pip build/clean
	$(BIN)/python -m pip --python build/clean/bin/python install --disable-pip-version-check -qq --no-deps dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$(build/clean/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth
	build/clean/bin/python -I -W ignore .ci/import_all.py build/clean

bench: .venv/.extra-bench  ## time this package against its peers (half an hour); GROUPS=windows for whole StABlE phases
	$(BIN)/python -m benchmarks $(GROUPS)

evidence: $(ENV)  ## run what docs/evidence.md has no results of yet, or go on with it (days); PIECES="aspirin-mace-*" for some
	$(BIN)/python -m benchmarks.evidence $(PIECES)

# On a CUDA machine, which may be without a network: its own Python and torch, and wheels in .wheels (requirements/cuda.txt).
CUDA_PYTHON ?= python3
CUDA_RUN = PYTHONPATH=$(CURDIR)/src:$(CURDIR):$(CURDIR)/.wheels/site $(CUDA_PYTHON) -m

.wheels/site: $(wildcard .wheels/*.whl)
	mkdir -p $@
	test -z "$^" || $(CUDA_PYTHON) -m pip install -qq --no-index --no-deps --upgrade --target $@ $^
	$(CUDA_PYTHON) -c 'import setuptools; setuptools.setup()' -q egg_info  # where the package reads its version
	touch $@

test-cuda: .wheels/site  ## run the checks for a CUDA device, with the Python of this machine
	$(CUDA_RUN) pytest -q -m cuda -p no:cacheprovider tests/cuda

bench-cuda: .wheels/site  ## time captured simulations on a CUDA device
	$(CUDA_RUN) benchmarks md growth memory --device cuda

data: .venv/.extra-data  ## remake recipes/data (an hour and a half)
	mkdir -p runs
	for molecule in aspirin peptide; do \
	  $(BIN)/python recipes/data/make_molecule.py $$molecule simulate --out runs/$${molecule}_gfn2_500K.npz && \
	  $(BIN)/python recipes/data/make_molecule.py $$molecule slice --trajectory runs/$${molecule}_gfn2_500K.npz || exit 1; \
	done
	$(BIN)/python recipes/data/make_water.py simulate --out runs/water_spcfw_300K.npz
	$(BIN)/python recipes/data/make_water.py slice --trajectory runs/water_spcfw_300K.npz
	$(BIN)/python recipes/data/make_water.py simulate --temperature-K 340 --frames 2000 --out runs/water_spcfw_340K.npz
	$(BIN)/python recipes/data/make_water.py slice --trajectory runs/water_spcfw_340K.npz

clean:  ## remove what builds and checks leave behind, but not .venv and runs/
	rm -rf build dist docs/_build docs/api docs/examples mutants src/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
