# make demo   the main job on the embedded corpus: shards, pretraining, translation, scores (no GPU needed)
# make test   the tests; test-slow: those that take minutes; test-slurm: those on a SLURM controller of their own; test-gpu: on a GPU
# Each sets up what it needs in .venv first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
RANKS ?= $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)" 2>/dev/null || echo 2)
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
# Where there is a GPU, the tests that want none run on CPU processes all the same: it would hold one rank, they want four.
ON_CPU := $(if $(shell nvidia-smi -L 2>/dev/null),CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu)

.PHONY: demo test test-slow test-slurm test-gpu lint setup clean

demo: setup
	$(BIN)/deepspeed --num_gpus $(RANKS) sltscale/train.py --deepspeed ds_configs/zero2.json

test: setup
	$(ON_CPU) $(PYTEST) -m "not slow and not gpu and not slurm"

test-slow: setup
	$(ON_CPU) $(PYTEST) -m slow --timeout 3600

test-slurm: setup
	@{ command -v slurmctld && command -v munged; } >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get -qq update && \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install slurm-wlm munge shellcheck; } || \
	    echo "SLURM (Debian: slurm-wlm, munge) is not here and could not be installed: the tests are skipped"
	$(ON_CPU) $(PYTEST) -m slurm

test-gpu: setup
	$(PYTEST) -m gpu --timeout 900

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: .venv/.installed

# torch first and by exact version: where a CPU build is at hand, a version range would pass it over for a CUDA one.
.venv/.installed: pyproject.toml constraints.txt
	@echo "setting up .venv: a few minutes, once"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs shards/demo shards/.demo* features/demo
