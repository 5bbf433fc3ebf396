# make demo    install taco into .venv and let a small real model answer eight questions
# make test    lint, types and tests (not those marked slow or gpu)
# See CONTRIBUTING.md for the other targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CLIENTS := .venv-clients
# cuda where the driver lists a GPU, else cpu; `make DEVICE=cpu demo` overrides it.
ifndef DEVICE
DEVICE := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo cuda || echo cpu)
endif
CONSTRAINTS := constraints/$(DEVICE).txt
TORCH  := $(shell sed -n 's/^torch==//p' $(CONSTRAINTS) 2>/dev/null)

PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo install test test-clients test-gpu lint bench docs coverage clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-$(DEVICE)
	@$(BIN)/taco demo

install: $(VENV)/.installed-$(DEVICE)

test: lint
	@$(BIN)/python -m pytest -m "not slow and not gpu" --timeout 300

# With the environment of the caller: machines with a GPU often have a torch of their own. Only files that have such tests
# are read: time on such machines is dear. Some containers round the factors of float32 products: not here.
test-gpu:
	@env -u TORCH_ALLOW_TF32_CUBLAS_OVERRIDE PYTHONPATH=".:$$PYTHONPATH" $(PYTHON) -m pytest -m gpu \
		`grep -rlE --include='test_*.py' 'pytest\.mark\.gpu|simulated_and_real_cuda' tests`

# Programs written for vLLM, unmodified, in an environment of their own.
test-clients: $(CLIENTS)/.installed-$(DEVICE)
	@$(CLIENTS)/bin/python -m pytest tests/clients

lint: $(VENV)/.tests-installed-$(DEVICE)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.tests-installed-$(DEVICE)
	@$(BIN)/python benchmarks/offline.py

docs: $(VENV)/.installed-$(DEVICE)
	@$(BIN)/python docs/build_api.py

coverage: $(VENV)/.tests-installed-$(DEVICE)
	@$(BIN)/coverage run -m pytest -m "not slow and not gpu" --timeout 300
	@$(BIN)/coverage report

clean:
	rm -rf $(VENV) $(CLIENTS) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build dist *.egg-info
	find taco tests benchmarks docs examples -name __pycache__ -type d -prune -exec rm -rf {} +

# What is installed is recorded in files, so that a second `make demo` starts at once.

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "taco needs Python 3.10 or newer, and '$(PYTHON)' was not found."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "taco needs Python 3.10 or newer, and $(PYTHON) is `$(PYTHON) --version 2>&1`."; \
		echo "Name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv or ensurepip module, which are needed to make $(VENV)."; \
		echo "On Debian and Ubuntu install python3-venv; or name another one: make PYTHON=... $(MAKECMDGOALS)"; exit 1; }
	@echo "[1/3] making $(VENV) with `$(PYTHON) --version 2>&1`"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# The CPU build is called 2.13.0+cpu on Linux. Package indexes and mirrors that have it are tried before the index of
# the PyTorch project, which not every network reaches. PyPI itself has only the CUDA build for Linux: it works on a CPU,
# but is large, and comes last. On macOS the plain version is the CPU build.
$(VENV)/.torch-cpu: constraints/cpu.txt | $(VENV)/.created
	@echo "[2/3] installing torch $(TORCH) for CPU"
	@if [ "`uname -s`" != Linux ]; then $(PIP) torch==$(TORCH); else \
		$(PIP) torch==$(TORCH)+cpu 2>/dev/null \
		|| $(PIP) torch==$(TORCH)+cpu --extra-index-url $(TORCH_CPU_INDEX) 2>/dev/null \
		|| { echo "      no CPU build of torch $(TORCH) can be reached; installing the default build (several GB)"; \
		     $(PIP) torch==$(TORCH); }; fi
	@touch $@

$(VENV)/.torch-cuda: constraints/cuda.txt | $(VENV)/.created
	@echo "[2/3] installing torch $(TORCH) for CUDA (several GB)"
	@# A CPU build from an earlier DEVICE=cpu would satisfy the same version.
	@$(BIN)/python -m pip uninstall -qq --yes torch
	@$(PIP) torch==$(TORCH)
	@touch $@

# Compiles the CPU kernels too, where there is a C compiler.
$(VENV)/.installed-$(DEVICE): $(VENV)/.torch-$(DEVICE) pyproject.toml $(wildcard taco/kernels/native/src/*)
	@echo "[3/3] installing taco and its libraries"
	@$(PIP) -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.tests-installed-$(DEVICE): $(VENV)/.installed-$(DEVICE)
	@echo "[+] installing the test tools"
	@$(PIP) -c $(CONSTRAINTS) -e '.[test]'
	@touch $@

# It finds torch, transformers, the test tools and taco after its own packages, so that it needs none of them itself.
$(CLIENTS)/.installed-$(DEVICE): constraints/clients.txt $(VENV)/.tests-installed-$(DEVICE)
	@echo "[+] installing programs written for vLLM into $(CLIENTS)"
	@$(BIN)/python -m venv $(CLIENTS)
	@{ $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; pwd; } \
		>"`$(CLIENTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/taco.pth"
	@$(CLIENTS)/bin/python -m pip install -qq --disable-pip-version-check --no-input \
		-c $(CONSTRAINTS) -r constraints/clients.txt
	@touch $@
