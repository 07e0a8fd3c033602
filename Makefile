# `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO = runs/demo
MINUTES ?= 30
KILLS ?= 50
OUT ?= runs/gpu
PINS ?=  # other versions, such as "torch==2.11.0 torchvision==0.26.0"; with a VENV of their own

.PHONY: demo quality soak gpu test test-cluster check clean

demo: $(VENV)/demo
	$(BIN)/python -m vae_scale.pack --source photos --out data/demo
	$(BIN)/accelerate launch --config_file launch/cpu.yaml -m vae_scale.train --config configs/demo.yaml
	$(BIN)/python -m vae_scale.sample --run $(DEMO) --num 64 --out $(DEMO)/samples.png
	$(BIN)/python -m vae_scale.sample --run $(DEMO) --num 8 --interpolate --out $(DEMO)/interpolations.png
	$(BIN)/python -m vae_scale.sample --run $(DEMO) --num 32 --reconstruct --out $(DEMO)/reconstructions.png
	@echo
	@echo "New images:        $(DEMO)/samples.png"
	@echo "Between samples:   $(DEMO)/interpolations.png"
	@echo "Reconstructions:   $(DEMO)/reconstructions.png"
	@echo "As it learned:     $(DEMO)/samples/"

# Compares ways to generate images after equal compute; MINUTES of CPU (of a GPU, if there is one) for each.
quality: $(VENV)/quality
	@test -n "$(SHARDS)" || { echo "error: make quality SHARDS=DIR, a folder of packed images" >&2; exit 2; }
	$(BIN)/python tests/benchmarks/quality.py --shards "$(SHARDS)" --minutes $(MINUTES)

# Kills runs again and again and checks that nothing is lost; half an hour or more.
soak: $(VENV)/dev
	$(BIN)/python tests/benchmarks/soak.py --kills $(KILLS) --processes 1 --precision fp32
	$(BIN)/python tests/benchmarks/soak.py --kills $(KILLS) --processes 1 --precision bf16
	$(BIN)/python tests/benchmarks/soak.py --kills $(KILLS) --processes 2 --precision fp32
	$(BIN)/python tests/benchmarks/soak.py --kills $(KILLS) --processes 2 --precision bf16

# Checks and measures everything on a machine with a GPU, with the Python there: nothing is installed.
gpu: MINUTES = 15
gpu:
	@test -n "$(SHARDS)" || { echo "error: make gpu SHARDS=DIR, a folder of packed images" >&2; exit 2; }
	$(PYTHON) tests/gpu/run.py --minutes $(MINUTES) --shards "$(SHARDS)" --out "$(OUT)"

test: $(VENV)/dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# On a real SLURM, and on hosts with networks of their own; as root. What is not installed is skipped.
test-cluster: $(VENV)/dev
	$(BIN)/python -m pytest -m cluster -rs

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/demo $(VENV)/dev $(VENV)/quality: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip  # which finds what goes together in seconds; Python 3.11's own takes minutes
	$(BIN)/python -m pip install --quiet --editable ".[$(@F)]" $(PINS)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
