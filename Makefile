# Two commands do all the set-up: `make demo` and `make test`. Each needs only Python 3.10 or newer and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check format lock bench bundled clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/collapse-probe demo --output demo

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2

check: test

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(VENV)/.installed
	$(BIN)/python -m pip freeze --exclude-editable | grep -v ' @ ' > requirements.lock

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/overhead.py

bundled: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python experiments/bundle_models.py bundled-runs

clean:
	rm -rf $(VENV) build dist *.egg-info
