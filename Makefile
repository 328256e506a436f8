# Everything runs in one .venv, which the first target that needs it makes from nothing:
# with python3 (3.10 to 3.13), make and a C++ compiler. test-official alone has its own.
.DEFAULT_GOAL := help
.PHONY: help setup train test test-browser test-official sanitize lint types format bench speed gpu-check verify clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SANITIZED := build/sanitized
OFFICIAL := .venv-official

# What a caller may set: make test PYTHON=python3.12 ARGS="-k legal"
PYTHON ?= $(or $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c "import ensurepip, sys, venv; sys.exit(not $(SUPPORTED))" 2>/dev/null && echo $$p && break; \
	done),python3)
TORCH ?= $(if $(GPU),torch==2.9.0,torch==2.13.0$(CPU_BUILD))
PIP_ARGS ?=
WORKERS ?= 2
ARGS ?=

SUPPORTED := (3, 10) <= sys.version_info < (3, 14)

# Torch for Linux is a CUDA build of several GB unless the CPU build is asked for by its name. With a GPU the release
# is the one that pufferlib-core's published build is compiled for.
GPU = $(shell nvidia-smi -L 2>/dev/null | grep '^GPU')
CPU_BUILD = $(if $(filter Linux,$(shell uname)),+cpu)
PUFFERLIB := pufferlib-core==3.0.23

# Both are installed as pufferlib. The official one is tested on the CPU, with the oldest numpy and gymnasium that this
# library takes: it wants no newer ones. (Newer gym-notices have every process say on stderr that gym is old.)
OFFICIAL_PUFFERLIB := pufferlib==3.0.0
OFFICIAL_NEEDS := "numpy<2" gymnasium==0.29.1 pettingzoo==1.24.1 gym==0.23 "gym-notices<0.1" "shimmy[gym-v21]" imageio

# Of the environment whose .ready is being made.
PIP = $(@D)/bin/python -m pip --disable-pip-version-check --quiet

help:
	@echo "make train    train on Essence Wars          make train ARGS='--seed 2'"
	@echo "make test     run the tests                  make test ARGS='-k legal'"
	@echo "make test-browser    open the page of decisions in a headless Chromium, which it installs where it can"
	@echo "make test-official   the same tests on the official pufferlib 3.0.0, in $(OFFICIAL)"
	@echo "make sanitize the kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer, in $(SANITIZED)"
	@echo "make lint     ruff check, ruff format --check, lint-imports (which module may import which)"
	@echo "make types    mypy, strict"
	@echo "make format   let ruff fix and format"
	@echo "make bench    compare the ways to choose a tuple   make bench ARGS=--quick"
	@echo "make speed    the speed of heads and of training   make speed ARGS=--quick"
	@echo "make gpu-check   with a GPU: whether the flat decision's kernels are right on it, and how fast"
	@echo "make verify   audit Essence Wars and an untrained policy in it   make verify ARGS='--seed 2'"
	@echo "make setup    only make .venv, which every target above makes first where it is missing"
	@echo "make clean    remove $(VENV), $(OFFICIAL) and the caches; runs/ stays"
	@echo
	@echo "To set for the first make, which makes .venv:"
	@echo "  PYTHON=python3.12       the interpreter (3.10 to 3.13)"
	@echo "  TORCH='torch==2.13.0'   the PyTorch to install where .venv has none: by default the CPU build of 2.13.0,"
	@echo "                          or 2.9.0 with CUDA where nvidia-smi lists a GPU"
	@echo "  PIP_ARGS='...'          more arguments for pip. PyTorch keeps its CPU builds for Linux on an index of its"
	@echo "                          own, which its 'Get Started' page names: PIP_ARGS='--extra-index-url ...'"
	@echo "A torch or a pufferlib that you put into .venv yourself is left as it is."

train: $(READY)
	$(BIN)/python -m tcg_flatpolicy train $(ARGS)

# Each worker has one thread, or two workers on two cores would start four.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

# Chromium and its driver are Debian's; where they cannot be installed, the tests are skipped and say so.
test-browser: $(READY)
	@command -v chromedriver >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium chromium-driver; } \
		>/dev/null 2>&1 || echo "no Chromium here, and it cannot be installed: the browser's tests are skipped"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser -rs $(ARGS)

test-official: $(OFFICIAL)/.ready
	OMP_NUM_THREADS=1 $(OFFICIAL)/bin/python -m pytest -n $(WORKERS) $(ARGS)

# A copy of the package, in which the kernels are compiled to stop at any read or write outside of what was allocated,
# and at undefined behaviour. Python does not free all memory, so leaks are not looked for.
sanitize: $(READY)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r tcg_flatpolicy tests pyproject.toml $(SANITIZED)
	rm -f $(SANITIZED)/tcg_flatpolicy/kernels/*.so
	$(SANITIZE) -o $(SANITIZED)/tcg_flatpolicy/kernels/_base.so
	if [ "$$(uname -m)" = x86_64 ]; then \
		$(SANITIZE) -mavx2 -mfma -o $(SANITIZED)/tcg_flatpolicy/kernels/_avx2.so; fi
	cd $(SANITIZED) && OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		$(CURDIR)/$(BIN)/python -m pytest -p no:cacheprovider tests/test_exact_kernels.py tests/test_kernels.py $(ARGS)

SANITIZE = $(CXX) -std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover -fPIC \
	-shared -pthread -Wno-psabi -ffp-contract=fast -fno-math-errno -fno-trapping-math tcg_flatpolicy/kernels/flat.cpp

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/compare.py $(ARGS)

speed: $(READY)
	$(BIN)/python benchmarks/head.py $(ARGS)
	$(BIN)/python benchmarks/autoregressive.py $(ARGS)
	$(BIN)/python benchmarks/end_to_end.py $(ARGS)

gpu-check: $(READY)
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

verify: $(READY)
	$(BIN)/python -m tcg_flatpolicy verify essence_wars --steps 100000 $(ARGS)
	$(BIN)/python -m tcg_flatpolicy verify essence_wars --steps 5000 --policy flat $(ARGS)

clean:
	rm -rf $(VENV) $(OFFICIAL) .mypy_cache .pytest_cache .ruff_cache .hypothesis dist resources
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(READY)

# .ready is written last, so a set-up that was cut short is taken up again.
$(READY): pyproject.toml setup.py tcg_flatpolicy/kernels/flat.cpp Makefile
	$(MAKE_ENVIRONMENT)
	@if $(BIN)/python -c "$$HAS_PUFFERLIB"; then \
		echo "Keeping the pufferlib that is in $(VENV)"; \
	else \
		echo "Installing $(PUFFERLIB), which may compile for a minute"; $(INSTALL_PUFFERLIB); \
	fi
	@touch $@

$(OFFICIAL)/.ready: TORCH = torch==2.13.0$(CPU_BUILD)
EXTRAS = puffer,game,plot,spiel,dev
$(OFFICIAL)/.ready: EXTRAS = puffer,game,plot,dev
$(OFFICIAL)/.ready: NEEDS = $(OFFICIAL_NEEDS)
$(OFFICIAL)/.ready: pyproject.toml setup.py tcg_flatpolicy/kernels/flat.cpp Makefile
	$(MAKE_ENVIRONMENT)
	@$(@D)/bin/python -c "$$HAS_PUFFERLIB" || \
		{ echo "Installing $(OFFICIAL_PUFFERLIB), which compiles for a minute"; $(INSTALL_OFFICIAL_PUFFERLIB); }
	@touch $@

define MAKE_ENVIRONMENT
	@python=$(@D)/bin/python; test -x $$python || python="$(PYTHON)"; $$python -c "$$CHECK"
	@test -x $(@D)/bin/python || { echo "Making $(@D) with $(PYTHON)"; $(PYTHON) -m venv $(@D); }
	@$(@D)/bin/python -m pip --version >/dev/null 2>&1 || $(@D)/bin/python -m ensurepip
	@$(@D)/bin/python -c "import torch" 2>/dev/null || \
		{ echo "Installing $(TORCH)"; $(PIP) install $(PIP_ARGS) "$(TORCH)"; } || \
		{ echo "pip finds no $(TORCH): installing $(subst +cpu,,$(TORCH)), which may bring several GB of CUDA." \
			"To avoid that, stop and see 'make help', PIP_ARGS"; \
			$(PIP) install $(PIP_ARGS) "$(subst +cpu,,$(TORCH))"; }
	@echo "Installing tcg_flatpolicy and what it is developed with"
	@torch=$$($(@D)/bin/python -c "from importlib.metadata import version; print(version('torch'))") && \
		$(PIP) install $(PIP_ARGS) -e ".[$(EXTRAS)]" "torch==$$torch" "setuptools>=77" wheel $(NEEDS)
endef

# The published build runs with torch 2.9.0 for CUDA 12 and no other, so elsewhere it is compiled against the torch
# in .venv: without the cache, where pip keeps what it compiled against other ones.
define INSTALL_PUFFERLIB
	case "$$($(BIN)/python -c 'import torch; print(torch.cuda.is_available(), torch.__version__)')" in \
		"True 2.9.0+cu12"*) from= ;; \
		True*) from="--no-binary pufferlib-core" ;; \
		*) from="--no-binary pufferlib-core"; export PUFFERLIB_DISABLE_CUDA=1 ;; \
	esac; \
	$(PIP) install $(PIP_ARGS) --no-deps --no-build-isolation --no-cache-dir $$from $(PUFFERLIB)
endef

# NO_OCEAN leaves its games out, which are C and need libraries that its build would download.
define INSTALL_OFFICIAL_PUFFERLIB
	mkdir -p $(@D)/build && printf '%s\n' "$$SITECUSTOMIZE" > $(@D)/build/sitecustomize.py && \
	NO_OCEAN=1 PYTHONPATH="$(CURDIR)/$(@D)/build" $(PIP) install $(PIP_ARGS) --no-deps --no-build-isolation \
		--no-cache-dir $(OFFICIAL_PUFFERLIB)
endef

# For that build alone: under NO_OCEAN its setup.py stops at a name that it never sets, and it takes an nvcc for a wish
# to compile for CUDA, which a torch for the CPU cannot.
define SITECUSTOMIZE
import builtins, shutil
builtins.c_extension_paths = []
which = shutil.which
shutil.which = lambda name, *rest, **named: None if name == "nvcc" else which(name, *rest, **named)
endef

define HAS_PUFFERLIB
import importlib.util, sys
sys.exit(importlib.util.find_spec("pufferlib") is None)
endef

# Runs on any Python, to say what the chosen one lacks.
define CHECK
import os, sys, sysconfig
def stop(lack, way_out):
    sys.exit("make: %s: %s" % (lack, way_out))
python = "Python %d.%d (%s)" % (sys.version_info[:2] + (sys.executable,))
if not $(SUPPORTED):
    stop(python + " is not supported", "choose one of 3.10 to 3.13, as in make setup PYTHON=python3.12")
try:
    import ensurepip, venv
except ImportError:
    stop(python + " has no venv module", "install it (Debian, Ubuntu: apt install python3-venv), or choose another with PYTHON=")
from shutil import which
if not which((os.environ.get("CXX") or "c++").split()[0]):
    stop("no C++ compiler", "install one (Debian, Ubuntu: apt install g++), or name it with CXX=")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    stop(python + " has no Python.h", "install it (Debian, Ubuntu: apt install python3-dev), or choose another with PYTHON=")
endef
export CHECK HAS_PUFFERLIB SITECUSTOMIZE
