# Everything runs in .venv, which the first call makes. PYTHON picks the interpreter it is made from (>= 3.10).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow lint format evaluate verify-guarantees bench bench-peers bench-serve bench-serve-peers bench-score simulate gpu-check test-triton test-score test-scale test-docker lock test-zoo sanitize soak fuzz wheel clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create .venv with everything a CPU machine needs

$(STAMP): pyproject.toml kernels/CMakeLists.txt $(wildcard kernels/*.cmake kernels/csrc/* runtime/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "trivium needs Python >= 3.10, $(PYTHON) is older")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing trivium and its packages into $(VENV) (the first time: a few GB, some minutes)"
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[all,dev]'
	@$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/stubs tensorrt-stubs==10.13.0.35.1
	@touch $@

demo: venv  ## the main job on Fashion-MNIST: train, export, serve, ask, report (build/demo)
	$(BIN)/trivium demo --out build/demo

test: lint  ## lint, types and all fast tests
	$(BIN)/python -m pytest

test-slow: venv  ## the tests marked slow
	$(BIN)/python -m pytest -m slow

lint: venv  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv  ## rewrite the sources in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

evaluate: venv  ## every method on two data sets with three seeds, up to three hours (train/RESULTS.md; goes on after a kill)
	$(BIN)/trivium data fashion-mnist
	$(BIN)/trivium data renditions
	$(BIN)/python -m trivium.train.studies.trade_off --out build/studies --results build/studies/trade-off.json
	$(BIN)/trivium study fashion-mnist renditions --out build/studies --trade-off build/studies/trade-off.json \
	  --results train/RESULTS.json --page train/RESULTS.md

verify-guarantees: venv  ## 200 calibrations of two models against their promises (train/GUARANTEES.md; goes on after a kill)
	$(BIN)/trivium data fashion-mnist
	$(BIN)/trivium data renditions
	$(BIN)/trivium study fashion-mnist renditions --rows three-heads --seeds 0 --out build/studies
	@for set in fashion-mnist renditions; do set -e; at=build/guarantees/$$set; \
	  test -d $$at || $(BIN)/trivium export build/studies/$$set/three-heads/0/run $$at; \
	  $(BIN)/trivium verify-guarantees $$at --out $$at.verification --results train/GUARANTEES-$$set.json \
	    --page train/GUARANTEES.md; \
	done

bench: venv  ## CPU benchmarks into build/bench
	$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench.precision
	$(BIN)/python -m tests.bench.guarantees

bench-peers: venv  ## the same with torch-uncertainty and baal, in an environment of their own
	$(BIN)/python -m tests.bench --peers

bench-serve: venv  ## the server beside its engine (build/bench/serve.json)
	$(BIN)/python -m tests.bench.serve --open 0.5 0.8 --jpeg

bench-serve-peers: venv  ## the same graph by six other servers, each in an environment of its own
	$(BIN)/python -m tests.bench.serve --peers

bench-score: venv  ## offline scoring beside the limit of two engine sessions (build/bench/score.json)
	$(BIN)/python -m tests.bench.score

simulate: venv  ## four replicas, real and simulated, and what 10,000 requests a second take (docker/CAPACITY.md)
	$(BIN)/python -m tests.scale.capacity --docs docker

sanitize:  ## the CPU kernels and the HTTP/2 engine under the address and undefined-behaviour sanitizers
	sh tests/kernels/sanitize.sh
	sh tests/http2/sanitize.sh

test-triton: venv  ## the exported model repository in a real tritonserver, which is installed into build/triton
	$(BIN)/python -m tests.triton.server
	$(BIN)/python -m pytest -m "" tests/triton tests/integration/test_protocol.py

RAY := build/ray

test-score: venv  ## offline scoring killed at random moments, also on Ray, which is installed into build/ray
	@test -d $(RAY)/ray || $(BIN)/python -m pip install --quiet --no-deps --target $(RAY) 'ray[data]>=2.40,<2.64' msgpack
	PYTHONPATH=$(RAY) $(BIN)/python -m pytest -m "" --timeout 1200 tests/unit/test_score.py

test-scale: venv  ## replicas killed, drained and frozen under their clients, for a minute, also behind envoy
	TRIVIUM_SCALE_SECONDS=60 $(BIN)/python -m pytest -s --timeout 600 -m "" tests/scale

test-docker: venv  ## what the images and compose.yaml promise, and their commands carried out without Docker
	$(BIN)/python -m tests.docker.promtool
	$(BIN)/python -m pytest --timeout 1200 -m "" tests/docker

UV := build/uv/bin/uv pip compile --quiet --no-config --upgrade --generate-hashes --no-header --no-annotate \
      --python-platform x86_64-manylinux_2_28
LOCKS := docker/requirements

lock: venv  ## the newest allowed versions into the images (docker/requirements)
	@test -x build/uv/bin/uv || $(BIN)/python -m pip install --quiet --target build/uv uv
	$(UV) pyproject.toml --extra cpu --python-version 3.11 --output-file $(LOCKS)/cpu.txt
	$(UV) pyproject.toml --extra gpu --python-version 3.12 --output-file $(LOCKS)/gpu.txt
	echo 'numpy<2' | $(UV) pyproject.toml --extra cpu --python-version 3.10 --constraints - --output-file $(LOCKS)/triton.txt
	printf '%s\n' pip 'scikit-build-core>=1.0' cmake ninja \
	  | $(UV) - --python-version 3.10 --allow-unsafe --output-file $(LOCKS)/build.txt

test-zoo: venv  ## a timm model of each family through the export (minutes; writes export/ZOO.md)
	OMP_NUM_THREADS=1 nice -n 10 $(BIN)/python -m tests.zoo
	$(BIN)/python -m pytest -m "" tests/zoo

gpu-check:  ## on a machine with a card: build, check and time the CUDA kernels (kernels/GPU.md)
	PYTHONPATH=.namespace $(PYTHON) -m tests.gpu_check

soak: venv  ## ten minutes of clients that misbehave
	TRIVIUM_SOAK_SECONDS=600 $(BIN)/python -m pytest -s --timeout 1200 tests/integration/fire

FUZZ := build/fuzz/packages

fuzz: venv  ## a quarter of a million hostile inputs at every entrance (build/fuzz/targets)
	@test -d $(FUZZ)/atheris || $(BIN)/python -m pip install --quiet --no-deps --target $(FUZZ) 'atheris>=3,<4'
	PYTHONPATH=$(FUZZ) OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz

wheel: venv  ## one wheel for every Python, in dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean:  ## remove everything that was built, .venv included
	rm -rf build dist $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
