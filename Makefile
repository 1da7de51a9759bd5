# Every target does its own set-up: on a fresh machine with Python 3.11, git and make, `make demo` or `make test` is enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Two threads for the whole machine would fight with the frames in flight, each of which has a thread of its own.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo quality test test-live check gpu-acceptance format clean

help:
	@echo "make demo    upscale the sample clip; prints where the video and the before/after picture are"
	@echo "make test    run the tests"
	@echo "make test-live   run the camera's tests with a real screen, browser and servers (Debian; needs root to install them)"
	@echo "make check   ruff format --check, ruff check, mypy --strict"
	@echo "make gpu-acceptance   prove everything that needs an NVIDIA GPU, and measure it (GPU_PYTHON: whose torch sees it)"
	@echo "make format  let ruff rewrite the code"
	@echo "make quality STILLS=... CLIPS=...   measure the shipped models, and write the README's table"
	@echo "make clean   remove the virtual environment and the demo's files"

# torch goes first and alone: any other package that asks for it first would bring another build (constraints.txt).
# spandrel, the tests' reference HAT, goes without its dependencies: its torchvision would pull a newer torch.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'spandrel==0.4.2'
	touch $(READY)

quality: $(READY)
	$(BIN)/python benchmarks/quality.py --stills $(STILLS) --clips $(CLIPS)

demo: $(READY)
	$(BIN)/python samples/demo.py

# A failure is shown when it happens. instafail comes before xdist, which tells the reporter of then to name no files.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -p instafail --instafail $(ARGS)

# What a camera's tests need of the system: a screen, a browser, and an FFmpeg with SRT.
test-live: $(READY)
	@for tool in Xvfb chromium ffmpeg; do command -v $$tool > /dev/null || missing=1; done; test -z "$$missing" || { \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq xvfb chromium ffmpeg; }
	$(BIN)/python -m pytest -m live $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# With the torch that is there, and no network: nothing is installed.
GPU_PYTHON ?= $(PYTHON)
gpu-acceptance:
	HAT_VIDEO_REQUIRE_GPU=1 $(GPU_PYTHON) -m pytest -m gpu -p no:xdist tests/test_gpu.py tests/test_nvdec.py tests/test_dali.py $(ARGS)
	$(GPU_PYTHON) benchmarks/gpu.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache
