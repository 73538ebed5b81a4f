# Two commands: `make demo` and `make test`. Each makes .venv, installs into it and does its job.
# On a machine without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu fetches the small CPU build of torch.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Where torch brings no triton of its own (the CPU build), the tests and the ahead-of-time compiler need this one.
TRITON ?= triton==3.9.0
TORCH_INDEX ?=
PYTEST_FLAGS ?=
SANITIZE ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
NATIVE := setup.py pyproject.toml constraints.txt CMakeLists.txt \
	$(wildcard runtime/include/*/* runtime/src/* kernels/csrc/*)

# setup.py looks for cmake and ninja on the path.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test test-cpp lint check clean

demo: $(VENV)/.demo
	@mkdir -p outputs
	$(BIN)/pylumiere generate "a red circle moves right over grass" --seed 7 -o outputs/demo.mp4 --sheet outputs/demo.png

test: $(VENV)/.test
	$(BIN)/pytest -q $(PYTEST_FLAGS)

# C++ unit tests, for example: make test-cpp SANITIZE=address,undefined
test-cpp: $(VENV)/.test
	$(BIN)/cmake -S . -B build/cpp-$(or $(SANITIZE),plain) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
		-DPYLUMIERE_PYTHON=OFF -DPYLUMIERE_TESTS=ON -DPYLUMIERE_SANITIZE=$(SANITIZE)
	$(BIN)/cmake --build build/cpp-$(or $(SANITIZE),plain)
	$(BIN)/ctest --test-dir build/cpp-$(or $(SANITIZE),plain) --output-on-failure

# The layers are looked at in a copy as an installation has it, where kernels/ and export/ lie in the package; and from
# there, since lint-imports puts the working directory on the path.
lint: $(VENV)/.test
	$(BIN)/ruff check .
	rm -rf build/layers
	$(BIN)/python -P setup.py --quiet build_py --build-lib build/layers
	cd build/layers && $(abspath $(BIN))/lint-imports --no-cache --no-logo $(CURDIR)/pyproject.toml

# One line that names what the system lacks, before pip and CMake say it in forty.
check:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "make: $(PYTHON) is missing or older than Python 3.11; on Debian: apt-get install python3" >&2; exit 1; }
	@missing=""; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
		2>/dev/null || missing="$$missing python3-dev"; \
	command -v $${CXX:-g++} >/dev/null || missing="$$missing g++"; \
	[ -z "$$missing" ] || { echo "make: missing on this system; on Debian: apt-get install$$missing" >&2; exit 1; }

$(BIN)/python: | check
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)" setuptools cmake ninja nanobind
	@touch $@

$(VENV)/.demo: $(NATIVE) $(VENV)/.torch
	$(INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/.test: $(NATIVE) $(VENV)/.torch
	$(BIN)/python -P -c 'import triton' 2>/dev/null || $(INSTALL) "$(TRITON)"
	$(INSTALL) --no-build-isolation -e '.[dev,export,bench]'
	@touch $(VENV)/.demo $@

clean:
	rm -rf $(VENV) build outputs *.egg-info pylumiere/*.so
