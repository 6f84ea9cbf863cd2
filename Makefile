# Every command builds what it needs; on a fresh machine start with `make demo` or `make test`.
PYTHON ?= python3
PIP = pip install --disable-pip-version-check --constraint constraints.txt
PACKAGES = -c "import sysconfig; print(sysconfig.get_path('purelib'))"
# `make test` runs on the pinned release, `make floors` on the lowest.
RELEASES = 4.57.6 5.0.0 5.3.0 5.17.0 5.24.0
# The tests that meet transformers itself: loading, saving, training, the numbers and the messages.
MATRIX_TESTS = tests/card/test_loads.py tests/card/test_parity.py tests/card/test_conversion.py tests/model tests/loading \
	tests/scripts/test_checkpoint_conversion.py tests/scripts/test_hub.py
TEXT ?= I [MASK] to the store yesterday.
OUT ?= runs/gpu-report

.PHONY: demo card test engines matrix floors releases gpu gpu-report lint clean
.DELETE_ON_ERROR:
.PRECIOUS: .venv-%/ready

demo: .venv/demo  ## fill a mask with the shipped checkpoint
	.venv/bin/python scripts/fill_mask.py "$(TEXT)"

test: .venv/test  ## the default suite, one process per core with one thread each
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

card: .venv/test  ## what the package promises: it loads, is the published model, extrapolates, converts
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal tests/card

engines: .venv/test .venv/engines/ready  ## exports in llama.cpp, transformers.js and, where there is one, Chromium
	.venv/bin/python -m pytest tests/serving

gpu: .venv/test  ## the tests that need a CUDA or ROCm device, and the card on it
	.venv/bin/python -m pytest -m "gpu or card"

# With the packages that $(PYTHON) has: a machine with a GPU may have no network, and has its own torch.
gpu-report:  ## tests, benchmarks and a sweep on one GPU in at most 8 minutes, written to the folder OUT
	$(PYTHON) benchmarks/gpu_report.py --out $(OUT)

lint: .venv/lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

matrix: floors $(RELEASES:%=matrix-%)  ## what meets transformers, on each supported release; run two at a time with -j2

floors: .venv-floors/ready  ## the same and the Triton kernels, with the lowest version that setup.cfg allows of each package
	OMP_WAIT_POLICY=passive .venv-floors/bin/python -m pytest -k "not compiled" $(MATRIX_TESTS) tests/kernels

matrix-%: .venv-%/ready
	OMP_WAIT_POLICY=passive .venv-$*/bin/python -m pytest -k "not compiled and not interpreter" $(MATRIX_TESTS)

# About 5 GB on Linux, where torch 2.6 comes with the libraries of CUDA. The package installer of uv can choose the lowest.
.venv-floors/ready: setup.cfg | .venv/test
	.venv/bin/uv venv --quiet --clear --seed --python $(PYTHON) .venv-floors
	.venv/bin/uv pip install --quiet --python .venv-floors/bin/python --resolution lowest-direct --requirements setup.cfg --extra test
	.venv/bin/uv pip install --quiet --python .venv-floors/bin/python setuptools
	touch $@

releases: .venv/test  ## loading, tying and saving on every minor release of transformers; its table is docs/releases.md
	OMP_NUM_THREADS=1 .venv/bin/python tests/loading/releases.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: constraints.txt | .venv/bin/python
	.venv/bin/$(PIP) torch transformers
	touch $@

.venv/test: constraints.txt setup.cfg | .venv/bin/python
	.venv/bin/$(PIP) setuptools torch
	.venv/bin/$(PIP) ".[test]"
	.venv/bin/pip uninstall --quiet --yes mosaicbert
	touch $@ .venv/demo

# Prebuilt binaries come as packages; scripts of packages would download others.
.venv/engines/ready: Makefile
	npm install --prefix .venv/engines --ignore-scripts --no-audit --no-fund \
		node-llama-cpp@3.21.1 @huggingface/transformers@4.3.2
	touch $@

.venv/lint: constraints.txt | .venv/bin/python
	.venv/bin/$(PIP) ruff
	touch $@

# The environments of the matrix read torch, the largest package, from this one.
.venv-matrix/ready: constraints.txt
	$(PYTHON) -m venv .venv-matrix
	.venv-matrix/bin/$(PIP) setuptools torch accelerate einops pytest
	touch $@

# A release brings its own huggingface_hub and tokenizers. What it finds in .venv-matrix is not installed again.
.venv-%/ready: .venv-matrix/ready
	$(PYTHON) -m venv --without-pip .venv-$*
	.venv-matrix/bin/python $(PACKAGES) > $$(.venv-$*/bin/python $(PACKAGES))/matrix.pth
	.venv-matrix/bin/pip --python .venv-$*/bin/python install --disable-pip-version-check transformers==$*
	touch $@

clean:
	rm -rf .venv .venv-* build *.egg-info
