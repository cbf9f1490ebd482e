# Python 3.11 or later, a C++ compiler and a package index are all it takes.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin

.PHONY: demo test check bench soak clean

demo: .venv/.ready
	$(BIN)/terrane run jobs/recipes/tiny.yaml

test: .venv/.ready
	$(BIN)/pytest

check: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/unit -q

bench: .venv/.ready
	$(BIN)/pytest tests/benchmarks --override-ini python_files='bench_*.py' -s

soak: .venv/.ready
	$(BIN)/pytest tests -m soak --override-ini addopts=-ra

# The exact environment, and DeepSpeed's CPU op, which the first worker would otherwise stop to compile.
.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/terrane doctor
	touch $@

clean:
	rm -rf .venv .venv-peers .venv-stream-peers .mypy_cache .ruff_cache .pytest_cache *.egg-info
