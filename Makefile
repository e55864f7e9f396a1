PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --progress-bar off -c constraints.txt
SOURCES := pyproject.toml README.md LICENSE $(shell find cachekit plugins adapters -type f -not -name '*.pyc')

# Nothing here downloads a model, and small models gain nothing from many threads.
export HF_HUB_OFFLINE := 1

.PHONY: demo test lint bench coverage clean

# Compare caching policies on the embedded model: table and pictures in cachekit-demo/.
demo: $(VENV)/installed
	$(BIN)/cachekit demo

# Run the tests against the installed wheel, never against the source tree.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 CACHEKIT_TEST_INSTALLED=1 $(BIN)/pytest -n 2 --dist worksteal

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.overhead

# Try every policy on every pipeline of diffusers, and write the page about it.
coverage: $(VENV)/installed-coverage
	OMP_NUM_THREADS=1 $(BIN)/cachekit coverage --json docs/coverage.json --markdown docs/coverage.md

clean:
	rm -rf $(VENV)

$(VENV)/created: constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) hatchling
	touch $@

$(VENV)/wheel: $(VENV)/created $(SOURCES)
	rm -rf $(VENV)/dist
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir $(VENV)/dist .
	touch $@

# The version alone does not tell a rebuilt wheel from the one installed before, so that one goes first.
define install-wheel
	$(PIP) uninstall -qq --yes cachekit-diffusion
	$(INSTALL) "$$(ls $(VENV)/dist/*.whl)$(1)"
	touch $@
endef

$(VENV)/installed: $(VENV)/wheel
	$(call install-wheel,)

$(VENV)/installed-coverage: $(VENV)/wheel
	$(call install-wheel,[coverage])

$(VENV)/installed-test: $(VENV)/wheel
	$(call install-wheel,[test])
