# make demo: text streams from the built-in checkpoint.   make test: the suite, but for the longer sweeps,
# which are make test-slow.   make test-tp: the runtime's tests with the model on two devices.
# make test-gpu: the Triton kernels' tests, compiled, on an NVIDIA GPU.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-tp test-slow test-gpu lint format bench clean

demo: .venv/.core
	@$(BIN)/vsurge demo

test: .venv/.dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=10 -m "not slow"

test-tp: .venv/.dev
	VSURGE_TEST_TP=2 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" tests/runtime

test-slow: .venv/.dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m slow

# XLA_FLAGS: not those by which the suite compiles without optimizing.
test-gpu: .venv/.cuda
	XLA_FLAGS= JAX_PLATFORMS=cuda,cpu $(BIN)/python -m pytest -q -k triton tests/kernels \
		tests/runtime/test_interpreted_kernels.py

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev
	$(BIN)/python -m vsurge.benchmarks.side_by_side

clean:
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.core: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/.cuda: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --editable '.[dev,cuda]'
	@touch $@ .venv/.core .venv/.dev

.venv/.dev: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@ .venv/.core
