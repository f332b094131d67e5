# Every target sets up what it needs; a set-up is repeated only when these files change.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt# empty: the newest versions that pyproject.toml admits
SPEC := pyproject.toml setup.py Makefile
# --no-compile: Python writes bytecode at the first import, of what is imported.
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --no-compile

# CompVis ldm and MONAI, hosts in the tests. What ldm requires is pinned to versions of its time.
HOSTS := stable-diffusion-sdkit==2.1.5 monai==1.6.1

# Installed without bytecode, and a process that may write none compiles PyTorch at each start.
export PYTHONDONTWRITEBYTECODE :=

.NOTPARALLEL:
.PHONY: help demo test prove lint test-triton36 targets fuzz mutants bench readme gpu-parity gpu-bench gpu-unet clean

help: ## print this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([^:]+):.*## (.*)/make \1\t\2/' | expand -t 20

demo: .venv/.demo ## train and sample a small U-Net with the fused ops; pictures in runs/demo
	.venv/bin/python -m fastunet demo --out runs/demo

# The `pytest` script, not `python -m pytest`: that would put this folder on sys.path, where
# kernels/ hides Hugging Face's package of that name. Two processes, because Triton decides at its
# first import whether kernels are interpreted or compiled.
test: .venv/.dev ## all tests: kernels in Triton's interpreter, then compiled offline for real GPUs
	.venv/bin/pytest -n 2 --dist worksteal
	TRITON_INTERPRET=0 .venv/bin/pytest tests/offline -n 2 --dist worksteal

prove: .venv/.dev ## faults planted in kernels are seen, no kernel is less exact; more is compiled
	.venv/bin/pytest -m proof -n 2 --dist worksteal
	TRITON_INTERPRET=0 .venv/bin/pytest tests/offline -m proof -n 2 --dist worksteal

lint: .venv/.dev ## ruff (rules and format) and pyright
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python

test-triton36: .venv-triton36/.dev ## the kernel tests on Triton 3.6, in a venv of its own
	.venv-triton36/bin/pytest tests/kernels tests/test_interpreter.py -n 2 --fuzz 500
	TRITON_INTERPRET=0 .venv-triton36/bin/pytest tests/offline -n 2

# What has not changed since the last call is taken from build/targets. UPDATE=--update writes the table.
targets: .venv/.dev .venv-triton36/.dev ## compile all for 8 GPUs on both Tritons, compare with docs/targets.md
	TRITON_INTERPRET=0 .venv/bin/python tests/tools/targets.py $(UPDATE)

fuzz: .venv/.dev ## 10,000 random calls of the ops against fp64, others each time, and 500 models
	.venv/bin/pytest tests/kernels/test_fuzz.py tests/hosts/test_random.py --fuzz 10000 --models 500 -n 2

mutants: .venv/.dev ## break the kernels in 120 ways: are 95 % seen, and the others explained?
	.venv/bin/python tests/tools/mutate.py --count 120

bench: .venv/.dev ## time ops, U-Nets, loops and starts beside their peers; small without a GPU
	.venv/bin/python -m fastunet bench

readme: .venv/.dev ## write README's figures and plots of a GPU anew from benchmarks/results
	.venv/bin/python -m fastunet.benchmarks.readme

# They take whatever Python has torch, Triton, diffusers and this package; what is done is not repeated.
RESULTS ?= runs/gpu
gpu-parity: ## on a GPU: parity at full size, sanitizers, the suite; results in runs/gpu
	$(PYTHON) benchmarks/gpu.py parity --out $(RESULTS)

gpu-bench: ## on a GPU: limits, launch tables, every op against PyTorch
	$(PYTHON) benchmarks/gpu.py bench --out $(RESULTS)

gpu-unet: ## on a GPU: a step of the U-Nets of SD 1.5 and SDXL, eager, accelerated and compiled
	$(PYTHON) benchmarks/gpu.py unet --out $(RESULTS)

clean: ## remove both venvs, builds and caches (runs/ stays)
	rm -rf .venv .venv-triton36 build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: $(SPEC) $(CONSTRAINTS) | .venv/bin/python
	.venv/bin/python $(PIP_INSTALL) $(addprefix -c ,$(CONSTRAINTS)) -e ".[demo]"
	touch $@

.venv/.dev: $(SPEC) $(CONSTRAINTS) | .venv/bin/python
	.venv/bin/python $(PIP_INSTALL) $(addprefix -c ,$(CONSTRAINTS)) -e ".[dev]"
	.venv/bin/python $(PIP_INSTALL) --no-deps $(HOSTS)
	touch $@ .venv/.demo # dev holds demo

.venv-triton36/.dev: $(SPEC) constraints-triton36.txt
	$(PYTHON) -m venv .venv-triton36
	.venv-triton36/bin/python $(PIP_INSTALL) -c constraints-triton36.txt -e . pytest pytest-xdist hypothesis
	touch $@
