# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

.PHONY: demo test check compare clean

demo: $(STAMP)  ## install, train a MoE-Mamba on the standard library's sources, evaluate, generate
	$(BIN)/ssmoe train demo --out runs/demo --overwrite
	$(BIN)/ssmoe eval runs/demo --bigram
	$(BIN)/ssmoe generate runs/demo --prompt "def read_lines(path):" --max-new-tokens 96 --temperature 0.6

test: $(DEV_STAMP)  ## the whole test suite
	$(BIN)/python -m pytest

check: $(DEV_STAMP)  ## format, lint, types, fast tests: before every commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -m "not slow"

compare: $(STAMP)  ## Mamba and MoE-Mamba of equal active size, side by side
	$(BIN)/ssmoe compare mamba-tuned-tiny moe-mamba-tuned-tiny --out runs/compare --overwrite

# torch first: the CPU kernels are compiled against it, where there is a C++ compiler
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ssmoe needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[plots]'
	$(BIN)/ssmoe doctor
	touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info src/ssmoe/ops/cpu/*.so src/ssmoe/ops/cpu/_not_built.txt
