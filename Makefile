PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
PIP := python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --progress-bar off -c
# The engine, the command line, and what else uses each dependency, within six minutes on two cores. Left out are tests
# of compiled code, as torch is at the same version, of pipelines and guiders that the lowest diffusers lacks, and slow ones.
LOWEST_TESTS := $(addprefix tests/,attaching/test_attachment.py cli costs/test_estimate.py costs/test_fitting.py \
	interface models/test_demo_model.py parts planning project/test_packaging.py registry \
	switches/test_subclassing.py switches/test_switch.py \
	$(addprefix driving/test_,bad_parts.py come_and_go.py controlnets.py faults.py guidance.py indicators.py left_out.py \
	refusals.py toy_policies.py) \
	$(addprefix plugins/test_,block_cache.py composition.py dicache.py easycache.py fastercache.py fora.py forecast.py \
	guidance_interval.py hicache.py oracles.py pab.py smoothcache.py spectrum.py tgate.py) \
	$(addprefix runs/test_,clock.py not_finite.py quantities.py report.py) \
	$(addprefix tools/bench/test_,frechet.py grids.py learned.py))
SOURCES := pyproject.toml README.md LICENSE $(shell find cachekit plugins adapters -type f -not -name '*.pyc')

# Nothing here downloads a model, and small models gain nothing from many threads.
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-lowest lint bench coverage docs clean

# Compare caching policies on the embedded model: table and pictures in cachekit-demo/.
demo: $(VENV)/installed
	$(BIN)/cachekit demo

# Run the tests against the installed wheel, never against the source tree. torchao is for one of them alone: every
# process that imports diffusers loads it where it is installed, for a second or two and with lines on stderr.
test: $(VENV)/installed-test $(VENV)/torchao
	OMP_NUM_THREADS=1 CACHEKIT_TEST_INSTALLED=1 $(BIN)/pytest -n 2 --dist worksteal
	OMP_NUM_THREADS=1 CACHEKIT_TEST_INSTALLED=1 PYTHONPATH=$(VENV)/torchao \
		$(BIN)/pytest tests/attaching/test_environments.py -k torchao

# Run the tests in LOWEST_TESTS with the lowest versions that pyproject.toml allows.
test-lowest: $(LOWEST)/installed
	OMP_NUM_THREADS=1 CACHEKIT_TEST_INSTALLED=1 CACHEKIT_TEST_LOWEST=1 \
		$(LOWEST)/bin/pytest -n 2 --dist worksteal $(LOWEST_TESTS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.overhead

# Try every policy on every pipeline of diffusers, and write the page about it.
coverage: $(VENV)/installed-coverage
	OMP_NUM_THREADS=1 $(BIN)/cachekit coverage --limit 900 --json docs/coverage.json --markdown docs/coverage.md

# Build the site into site/, with no page broken and nothing loaded from elsewhere.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(LOWEST) site

$(VENV)/created: constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/$(INSTALL) constraints.txt hatchling
	touch $@

$(VENV)/wheel: $(VENV)/created $(SOURCES)
	rm -rf $(VENV)/dist
	$(BIN)/$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir $(VENV)/dist .
	touch $@

# The version alone does not tell a rebuilt wheel from the one installed before, so that one goes first.
define install-wheel
	$(1)/bin/$(PIP) uninstall -qq --yes cachekit-diffusion
	$(1)/bin/$(INSTALL) $(2) "$$(ls $(VENV)/dist/*.whl)$(3)" $(4)
	touch $@
endef

$(VENV)/installed: $(VENV)/wheel
	$(call install-wheel,$(VENV),constraints.txt)

$(VENV)/installed-coverage: $(VENV)/wheel
	$(call install-wheel,$(VENV),constraints.txt,[coverage])

$(VENV)/installed-docs: $(VENV)/wheel
	$(call install-wheel,$(VENV),constraints.txt,[docs])

$(VENV)/installed-test: $(VENV)/wheel
	$(call install-wheel,$(VENV),constraints.txt,[test])

$(VENV)/torchao: $(VENV)/created constraints.txt
	rm -rf $@
	$(BIN)/$(INSTALL) constraints.txt --quiet --no-deps --target $@ torchao

# Each bound of pyproject.toml becomes a pin. Torch stays at the version of constraints.txt: every other is gigabytes.
# Of the extra `test`, cache-dit is left out, which needs newer diffusers, and what these tests do not use.
$(LOWEST)/installed: $(VENV)/wheel constraints.txt
	$(PYTHON) -m venv $(LOWEST)
	grep '^torch==' constraints.txt > $(LOWEST)/constraints.txt
	grep -oE '"[A-Za-z0-9-]+[>=]=[^"]+"' pyproject.toml | grep -v '^"torch>' | tr -d '"' | sed 's/>=/==/' \
		>> $(LOWEST)/constraints.txt
	$(call install-wheel,$(LOWEST),$(LOWEST)/constraints.txt,[bench],\
		DeepCache hatchling hypothesis peft pytest pytest-xdist tgate)
