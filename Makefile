# Two commands for a stranger: `make demo` runs the main job, `make test` the tests. Both set up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: setup demo test kernels kernels-oldest kernels-newest kernels-static rivals lint types bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "zoo needs Python 3.11 or newer; try: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

demo: setup
	$(BIN)/zoo search spaces/hybrid-bytes --data bytes:stdlib --objective bits_per_byte,latency \
		--budget "params<=1M latency<=15ms@cpu{seq=128}" --trials 10 --steps 50 --batch 8 --context 128 \
		--learning-rate 4e-3 --threads 1 --out runs/demo
	$(BIN)/zoo build runs/demo/best.yaml
	$(BIN)/zoo train runs/demo/best.yaml --data bytes:stdlib --steps 80 --batch 8 --context 128 \
		--learning-rate 4e-3 --threads 1 --out runs/demo/winner
	@echo "Now open runs/demo/report.html; the winner is the spec runs/demo/best.yaml."

test: setup
	$(BIN)/python -m pytest --zoo-specs specs -n 2 --dist worksteal

kernels: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels

# The oldest and the newest torch and Triton, each in an environment of its own. The interpreter of Triton 3.6 does not
# know numpy 2.4.
kernels-oldest: ENDS := torch==2.11.0 triton==3.6.0 'numpy<2.4'
kernels-newest: ENDS := torch triton numpy
kernels-oldest kernels-newest: kernels-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade $(ENDS) --editable '.[test]'
	.venv-$*/bin/python -m pytest -n 2 --dist worksteal tests/kernels

kernels-static: setup
	$(BIN)/python -m bench.kernels_static

# What bench.gpu compares with, in a folder to carry to a machine with a GPU: PYTHONPATH=rivals. Of mamba_ssm the Triton
# path, without its CUDA extension, which the package would import.
rivals: setup
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target rivals fla-core einops liger-kernel
	$(BIN)/python -m pip install --quiet setuptools wheel packaging
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(BIN)/python -m pip install --quiet --upgrade --no-deps \
		--no-build-isolation --no-binary mamba-ssm --target rivals mamba-ssm packaging
	: > rivals/mamba_ssm/__init__.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

bench: setup
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest rivals build dist runs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
